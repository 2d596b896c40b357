// mq_ao::gate, mq_ao::qgate and mq_ao::qgate_per_token for PyTorch's CPU dispatch key; the schemas are defined in Python.

#include "gate.h"

#include "glue.h"

namespace mq_ao {
namespace {

bool is_operand(const Tensor& t, int64_t zero_point) {
  return t.scalar_type() == at::kFloat || (t.scalar_type() == at::kByte && zero_point >= 0 && zero_point <= 255);
}

bool is_native(const Tensor& y, int64_t y_zero_point, const Tensor& z, int64_t z_zero_point, const OptionalTensor& s,
               bool hadamard) {
  if (y.dim() < 1 || y.sizes() != z.sizes() || y.size(-1) == 0) return false;
  return is_operand(y, y_zero_point) && is_operand(z, z_zero_point) &&
         (!s || (s->scalar_type() == at::kFloat && has_shape(s, {y.size(-1)}))) &&
         (!hadamard || hadamard::find_plan(y.size(-1)));
}

template <typename T>
gate::Operand<T> operand(const Tensor& rows, double scale, int64_t zero_point) {
  return {rows.const_data_ptr<T>(), rows.stride(0), float(scale), float(zero_point)};
}

// Calls quantize(row number, row of n floats) for the gated rows, in parallel.
template <typename Quantize>
void for_gated_rows(const Tensor& y, double y_scale, int64_t y_zero_point, const Tensor& z, double z_scale,
                    int64_t z_zero_point, const OptionalTensor& s, bool hadamard, Quantize&& quantize) {
  const int64_t n = y.size(-1);
  const Tensor y_rows = dense_rows(y.reshape({-1, n})), z_rows = dense_rows(z.reshape({-1, n}));
  const OptionalTensor s_ = float_contiguous(s);
  const auto run = [&]<typename Y, typename Z>(const Y*, const Z*) {
    const gate::Gate<Y, Z> gated{operand<Y>(y_rows, y_scale, y_zero_point), operand<Z>(z_rows, z_scale, z_zero_point),
                                 data_or_null(s_), n, hadamard ? hadamard::find_plan(n) : nullptr};
    gate::for_ranges(y_rows.size(0), n, TorchThreads(), [&](int64_t begin, int64_t end) {
      const Scratch<float> row(n), work(gated.work_size());
      for (int64_t i = begin; i < end; ++i) {
        gated.run(i, row.get(), work.get());
        quantize(i, row.get());
      }
    });
  };
  constexpr const float* floats = nullptr;
  constexpr const uint8_t* bytes = nullptr;
  const bool float_y = y.scalar_type() == at::kFloat, float_z = z.scalar_type() == at::kFloat;
  if (float_y)
    float_z ? run(floats, floats) : run(floats, bytes);
  else
    float_z ? run(bytes, floats) : run(bytes, bytes);
}

Tensor float_gate(const Tensor& y, const Tensor& z, const OptionalTensor& s, bool hadamard) {
  if (y.scalar_type() != at::kFloat || z.scalar_type() != at::kFloat || !is_native(y, 0, z, 0, s, hadamard))
    return call_reference<decltype(float_gate)>("gate", y, z, s, hadamard);
  const int64_t n = y.size(-1);
  const Tensor y_rows = dense_rows(y.reshape({-1, n})), z_rows = dense_rows(z.reshape({-1, n}));
  const OptionalTensor s_ = float_contiguous(s);
  const Tensor x = empty(y.sizes(), y.options());
  const gate::Gate<float, float> gated{operand<float>(y_rows, 1.0, 0), operand<float>(z_rows, 1.0, 0),
                                       data_or_null(s_), n, hadamard ? hadamard::find_plan(n) : nullptr};
  gate::run_rows(gated, y_rows.size(0), x.mutable_data_ptr<float>(), TorchThreads());
  return x;
}

Tensor qgate(const Tensor& y, double y_scale, int64_t y_zero_point, const Tensor& z, double z_scale,
             int64_t z_zero_point, const OptionalTensor& s, bool hadamard, double out_scale, int64_t out_zero_point) {
  if (!is_native(y, y_zero_point, z, z_zero_point, s, hadamard) || !(out_scale > 0) || out_zero_point < 0 ||
      out_zero_point > 255) {
    return call_reference<decltype(qgate)>("qgate", y, y_scale, y_zero_point, z, z_scale, z_zero_point, s, hadamard,
                                           out_scale, out_zero_point);
  }
  const int64_t n = y.size(-1);
  Tensor q = empty(y.sizes(), y.options().dtype(at::kByte));
  uint8_t* out = q.mutable_data_ptr<uint8_t>();
  const qgemm::Requantizer requantize({out, true, float(1.0 / out_scale), int32_t(out_zero_point)});
  for_gated_rows(y, y_scale, y_zero_point, z, z_scale, z_zero_point, s, hadamard,
                 [&](int64_t i, const float* row) { gate::quantize_row(row, n, requantize, out + i * n); });
  return q;
}

std::tuple<Tensor, Tensor> qgate_per_token(const Tensor& y, double y_scale, int64_t y_zero_point, const Tensor& z,
                                           double z_scale, int64_t z_zero_point, const OptionalTensor& s,
                                           bool hadamard, int64_t bits, int64_t group_size) {
  const qgemm::TokenGrid grid{bits, group_size};
  if (!is_native(y, y_zero_point, z, z_zero_point, s, hadamard) || !grid.fits(y.size(-1))) {
    return call_reference<decltype(qgate_per_token)>("qgate_per_token", y, y_scale, y_zero_point, z, z_scale,
                                                     z_zero_point, s, hadamard, bits, group_size);
  }
  const int64_t n = y.size(-1);
  at::DimVector sizes(y.sizes());
  const int64_t count = sizes.back() = grid.scales(n);
  Tensor q = empty(y.sizes(), y.options().dtype(at::kByte));
  Tensor scale = empty(sizes, y.options().dtype(at::kFloat));
  uint8_t* out = q.mutable_data_ptr<uint8_t>();
  float* scales = scale.mutable_data_ptr<float>();
  for_gated_rows(y, y_scale, y_zero_point, z, z_scale, z_zero_point, s, hadamard,
                 [&](int64_t i, const float* row) { grid.quantize(row, n, out + i * n, scales + i * count); });
  return {q, scale};
}

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) {
  m.impl("gate", float_gate);
  m.impl("qgate", qgate);
  m.impl("qgate_per_token", qgate_per_token);
}

}  // namespace
}  // namespace mq_ao
