// PyTorch operators on qgemm.h: mq_ao::qlinear_prepack, qlinear_unpack, qlinear, qlinear_dynamic.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <optional>

#include "qgemm.h"

namespace {

using mq_ao::qgemm::Activations;
using mq_ao::qgemm::Linear;
using mq_ao::qgemm::Output;
namespace qgemm = mq_ao::qgemm;

void check_size(int64_t n, int64_t k) {
  TORCH_CHECK_VALUE(n >= 1 && k >= 1 && k <= qgemm::kMaxInputs, "a quantized linear layer has 1 to ",
                    qgemm::kMaxInputs, " inputs and at least 1 output, not ", k, " and ", n, ".");
}

at::Tensor prepack(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.scalar_type() == at::kChar,
                    "qlinear_prepack takes an int8 weight of shape (outputs, inputs), not ", weight.scalar_type(), " ",
                    weight.sizes(), ".");
  const int64_t n = weight.size(0), k = weight.size(1);
  check_size(n, k);
  const at::Tensor rows = weight.contiguous();
  at::Tensor packed = at::empty({qgemm::packed_bytes(n, k)}, weight.options());
  qgemm::pack(rows.const_data_ptr<int8_t>(), n, k, packed.mutable_data_ptr<int8_t>());
  return packed;
}

void check_packed(const at::Tensor& packed, int64_t n, int64_t k) {
  check_size(n, k);
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kChar && packed.is_contiguous() &&
                        packed.numel() == qgemm::packed_bytes(n, k),
                    "packed weights of ", n, " outputs and ", k, " inputs are ", qgemm::packed_bytes(n, k),
                    " contiguous int8 bytes, not ", packed.numel(), " of ", packed.scalar_type(),
                    ": make them with qlinear_prepack.");
}

at::Tensor unpack(const at::Tensor& packed, int64_t n, int64_t k) {
  check_packed(packed, n, k);
  at::Tensor weight = at::empty({n, k}, packed.options());
  qgemm::unpack(packed.const_data_ptr<int8_t>(), n, k, weight.mutable_data_ptr<int8_t>());
  return weight;
}

const float* checked_vector(const at::Tensor& vector, int64_t n, const char* name) {
  TORCH_CHECK_VALUE(vector.scalar_type() == at::kFloat && vector.dim() == 1 && vector.size(0) == n &&
                        vector.is_contiguous(),
                    name, " must be a contiguous float32 vector of ", n, " values, not ", vector.scalar_type(), " ",
                    vector.sizes(), ".");
  return vector.const_data_ptr<float>();
}

Linear linear_of(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale,
                 const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "a quantized linear layer takes x of shape (..., inputs), not a scalar.");
  const int64_t n = weight_scale.numel(), k = x.size(-1);
  check_packed(packed, n, k);
  return {packed.const_data_ptr<int8_t>(), n, k, checked_vector(weight_scale, n, "weight_scale"),
          bias ? checked_vector(*bias, n, "bias") : nullptr};
}

void check_zero_point(int64_t zero_point) {
  TORCH_CHECK_VALUE(zero_point >= 0 && zero_point <= 255, "a uint8 zero point lies in 0..255, not at ", zero_point, ".");
}

// x as (rows, inputs) with adjacent inputs; a view wherever the strides allow one.
at::Tensor as_rows(const at::Tensor& x, int64_t k) {
  const at::Tensor rows = x.dim() == 2 ? x : x.reshape({x.numel() / k, k});
  return rows.stride(1) == 1 || k == 1 ? rows : rows.contiguous();
}

at::Tensor empty_output(const at::Tensor& x, int64_t n, at::ScalarType dtype) {
  at::DimVector sizes(x.sizes());
  sizes.back() = n;
  return at::empty(sizes, x.options().dtype(dtype));
}

void multiply(const Activations& x, const Linear& w, const Output& out, int64_t m) {
  const qgemm::Plan plan = qgemm::plan(m, w.n, w.k, at::get_num_threads());
  at::parallel_for(0, plan.parts(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) qgemm::run_part(x, w, out, m, plan, part);
  });
}

// Rows a thread should at least have where a row is only copied or quantized.
int64_t row_grain(int64_t k) { return std::max<int64_t>(1, 16384 / k); }

at::Tensor qlinear(const at::Tensor& x, double x_scale, int64_t x_zero_point, const at::Tensor& packed,
                   const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias,
                   std::optional<double> out_scale, int64_t out_zero_point) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kByte, "qlinear takes uint8 activations, not ", x.scalar_type(), ".");
  const Linear w = linear_of(x, packed, weight_scale, bias);
  check_zero_point(x_zero_point);
  at::Tensor y = empty_output(x, w.n, out_scale ? at::kByte : at::kFloat);
  Output out{y.mutable_data_ptr()};
  if (out_scale) {
    TORCH_CHECK_VALUE(*out_scale > 0, "out_scale must be positive, not ", *out_scale, ".");
    check_zero_point(out_zero_point);
    out = {y.mutable_data_ptr(), true, static_cast<float>(1.0 / *out_scale), static_cast<int32_t>(out_zero_point)};
  }
  const at::Tensor rows = as_rows(x, w.k);
  const int64_t m = rows.size(0), depth = qgemm::padded_inputs(w.k);
  const float scale = static_cast<float>(x_scale);
  Activations a{rows.const_data_ptr<uint8_t>(), rows.stride(0), &scale, 0, static_cast<int32_t>(x_zero_point)};
  at::DataPtr copy;
  if (depth != w.k) {
    copy = c10::GetCPUAllocator()->allocate(m * depth);
    auto* bytes = static_cast<uint8_t*>(copy.get());
    at::parallel_for(0, m, row_grain(w.k), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) std::memcpy(bytes + i * depth, a.data + i * a.stride, w.k);
    });
    a.data = bytes;
    a.stride = depth;
  }
  multiply(a, w, out, m);
  return y;
}

template <typename Value>
void quantize_rows(const Value* x, int64_t stride, int64_t m, int64_t k, uint8_t* q, float* scale) {
  const int64_t depth = qgemm::padded_inputs(k);
  at::parallel_for(0, m, row_grain(k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) scale[i] = qgemm::quantize_token(x + i * stride, k, q + i * depth);
  });
}

at::Tensor qlinear_dynamic(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale,
                           const std::optional<at::Tensor>& bias) {
  const bool is_float = x.scalar_type() == at::kFloat;
  TORCH_CHECK_VALUE(is_float || x.scalar_type() == at::kBFloat16,
                    "qlinear_dynamic takes float32 or bfloat16 activations, not ", x.scalar_type(), ".");
  const Linear w = linear_of(x, packed, weight_scale, bias);
  at::Tensor y = empty_output(x, w.n, at::kFloat);
  const at::Tensor rows = as_rows(x, w.k);
  const int64_t m = rows.size(0), depth = qgemm::padded_inputs(w.k);
  const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(m * (depth + sizeof(float)));
  auto* scale = static_cast<float*>(scratch.get());
  auto* q = reinterpret_cast<uint8_t*>(scale + m);
  if (is_float) {
    quantize_rows(rows.const_data_ptr<float>(), rows.stride(0), m, w.k, q, scale);
  } else {
    const auto* bits = reinterpret_cast<const uint16_t*>(rows.const_data_ptr<at::BFloat16>());
    quantize_rows(bits, rows.stride(0), m, w.k, q, scale);
  }
  multiply({q, depth, scale, 1, qgemm::kTokenZeroPoint}, w, {y.mutable_data_ptr()}, m);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) {
  m.impl("qlinear_prepack", prepack);
  m.impl("qlinear_unpack", unpack);
  m.impl("qlinear", qlinear);
  m.impl("qlinear_dynamic", qlinear_dynamic);
}
