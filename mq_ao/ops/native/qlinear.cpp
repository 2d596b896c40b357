// PyTorch operators on qgemm.h: mq_ao::qlinear_prepack, qlinear_unpack, qlinear, qlinear_dynamic.
// Bad input goes to the Python reference, which says what is wrong with it.
#include <c10/core/CPUAllocator.h>

#include "glue.h"
#include "qgemm.h"

namespace mq_ao {
namespace {

using qgemm::Activations;
using qgemm::Linear;
using qgemm::Output;

bool is_size(int64_t n, int64_t k) { return n >= 1 && k >= 1 && k <= qgemm::kMaxInputs; }

bool is_packed(const Tensor& packed, int64_t n, int64_t k) {
  return is_size(n, k) && packed.scalar_type() == at::kChar && packed.is_contiguous() &&
         packed.numel() == qgemm::packed_bytes(n, k);
}

bool is_vector(const Tensor& t, int64_t n) {
  return t.scalar_type() == at::kFloat && t.dim() == 1 && t.size(0) == n && t.is_contiguous();
}

bool is_linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias) {
  const int64_t n = weight_scale.numel();
  return x.dim() >= 1 && is_packed(packed, n, x.size(-1)) && is_vector(weight_scale, n) &&
         (!bias || is_vector(*bias, n));
}

bool is_zero_point(int64_t value) { return value >= 0 && value <= 255; }

Tensor qlinear_prepack(const Tensor& weight) {
  if (weight.dim() != 2 || weight.scalar_type() != at::kChar || !is_size(weight.size(0), weight.size(1))) {
    return call_reference<decltype(qlinear_prepack)>("qlinear_prepack", weight);
  }
  const int64_t n = weight.size(0), k = weight.size(1);
  const Tensor rows = weight.contiguous();
  Tensor packed = at::empty({qgemm::packed_bytes(n, k)}, weight.options());
  qgemm::pack(rows.const_data_ptr<int8_t>(), n, k, packed.mutable_data_ptr<int8_t>());
  return packed;
}

Tensor qlinear_unpack(const Tensor& packed, int64_t n, int64_t k) {
  if (!is_packed(packed, n, k)) return call_reference<decltype(qlinear_unpack)>("qlinear_unpack", packed, n, k);
  Tensor weight = at::empty({n, k}, packed.options());
  qgemm::unpack(packed.const_data_ptr<int8_t>(), n, k, weight.mutable_data_ptr<int8_t>());
  return weight;
}

Linear linear_of(const Tensor& x, const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias) {
  return {packed.const_data_ptr<int8_t>(), weight_scale.numel(), x.size(-1), weight_scale.const_data_ptr<float>(),
          data_or_null(bias)};
}

// x as (rows, inputs) with adjacent inputs; a view wherever the strides allow one.
Tensor as_rows(const Tensor& x) {
  const int64_t k = x.size(-1);
  return dense_rows(x.dim() == 2 ? x : x.reshape({x.numel() / k, k}));
}

Tensor empty_output(const Tensor& x, int64_t n, at::ScalarType dtype) {
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

// Rows that a thread should at least have where they are only copied or quantized.
int64_t row_grain(int64_t k) { return std::max<int64_t>(1, 16384 / k); }

Tensor qlinear(const Tensor& x, double x_scale, int64_t x_zero_point, const Tensor& packed, const Tensor& weight_scale,
               const OptionalTensor& bias, std::optional<double> out_scale, int64_t out_zero_point) {
  const bool good_output = !out_scale || (*out_scale > 0 && is_zero_point(out_zero_point));
  if (x.scalar_type() != at::kByte || !is_linear(x, packed, weight_scale, bias) || !is_zero_point(x_zero_point) ||
      !good_output) {
    return call_reference<decltype(qlinear)>("qlinear", x, x_scale, x_zero_point, packed, weight_scale, bias, out_scale,
                                             out_zero_point);
  }
  const Linear w = linear_of(x, packed, weight_scale, bias);
  Tensor y = empty_output(x, w.n, out_scale ? at::kByte : at::kFloat);
  Output out{y.mutable_data_ptr()};
  if (out_scale) {
    out = {y.mutable_data_ptr(), true, static_cast<float>(1.0 / *out_scale), static_cast<int32_t>(out_zero_point)};
  }
  const Tensor rows = as_rows(x);
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

Tensor qlinear_dynamic(const Tensor& x, const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias) {
  if (!is_native_dtype(x) || !is_linear(x, packed, weight_scale, bias)) {
    return call_reference<decltype(qlinear_dynamic)>("qlinear_dynamic", x, packed, weight_scale, bias);
  }
  const Linear w = linear_of(x, packed, weight_scale, bias);
  Tensor y = empty_output(x, w.n, at::kFloat);
  const Tensor rows = as_rows(x);
  const int64_t m = rows.size(0), depth = qgemm::padded_inputs(w.k);
  const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(m * (depth + sizeof(float)));
  auto* scale = static_cast<float*>(scratch.get());
  auto* q = reinterpret_cast<uint8_t*>(scale + m);
  if (x.scalar_type() == at::kFloat) {
    quantize_rows(rows.const_data_ptr<float>(), rows.stride(0), m, w.k, q, scale);
  } else {
    const auto* values = reinterpret_cast<const BFloat16*>(rows.const_data_ptr<at::BFloat16>());
    quantize_rows(values, rows.stride(0), m, w.k, q, scale);
  }
  multiply({q, depth, scale, 1, qgemm::kTokenZeroPoint}, w, {y.mutable_data_ptr()}, m);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) {
  m.impl("qlinear_prepack", qlinear_prepack);
  m.impl("qlinear_unpack", qlinear_unpack);
  m.impl("qlinear", qlinear);
  m.impl("qlinear_dynamic", qlinear_dynamic);
}

}  // namespace mq_ao
