// PyTorch operators on qgemm.h: mq_ao::linear_packed, quantize_per_token, linear_packed_per_token.
// Bad input goes to the Python references, which say what is wrong with it.
#include "linear_glue.h"

namespace mq_ao {
namespace {

Tensor linear_packed(
    const Tensor& x, double x_scale, int64_t x_zero_point, const Tensor& packed, const Tensor& weight_scale,
    const OptionalTensor& bias, std::optional<double> out_scale, int64_t out_zero_point, int64_t bits,
    int64_t group_size) {
  const Layout l = layout_of(x, weight_scale, bits, group_size);
  if (x.scalar_type() != at::kByte || !is_linear(l, packed, weight_scale, bias) || !is_zero_point(x_zero_point) ||
      !is_output(out_scale, out_zero_point)) {
    return call_reference<decltype(linear_packed)>(
        "linear_packed", x, x_scale, x_zero_point, packed, weight_scale, bias, out_scale, out_zero_point, bits,
        group_size);
  }
  at::DataPtr storage;
  const Tensor rows = as_rows(x);
  Activations a = readable_rows(rows, l, &storage);
  const float scale = static_cast<float>(x_scale);
  a.scale = &scale;
  a.scale_step = 0;
  a.zero_point = static_cast<int32_t>(x_zero_point);
  return multiply(x, a, l, packed, weight_scale, bias, out_scale, out_zero_point);
}

std::tuple<Tensor, Tensor> quantize_per_token(const Tensor& x, int64_t bits, int64_t group_size) {
  const qgemm::TokenGrid grid{bits, group_size};
  if (!is_native_dtype(x) || x.dim() == 0 || x.size(-1) == 0 || !grid.fits(x.size(-1))) {
    return call_reference<decltype(quantize_per_token)>("quantize_per_token", x, bits, group_size);
  }
  const Tensor rows = as_rows(x);
  const int64_t k = x.size(-1);
  at::DimVector sizes(x.sizes());
  Tensor q = empty(sizes, x.options().dtype(at::kByte));
  const int64_t count = sizes.back() = grid.scales(k);
  Tensor scale = empty(sizes, x.options().dtype(at::kFloat));
  auto* bytes = q.mutable_data_ptr<uint8_t>();
  auto* scales = scale.mutable_data_ptr<float>();
  for_rows(rows, [&](int64_t i, const auto* row) { grid.quantize(row, k, bytes + i * k, scales + i * count); });
  return {q, scale};
}

Tensor linear_packed_per_token(
    const Tensor& q, const Tensor& scale, const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias,
    std::optional<double> out_scale, int64_t out_zero_point, int64_t bits, int64_t group_size) {
  const Layout l = layout_of(q, weight_scale, bits, group_size);
  at::DimVector scale_sizes(q.sizes());
  // One scale a row, or one for each group of the weights.
  const bool grouped = group_size && scale.dim() && scale.size(-1) == l.groups();
  const int64_t count = grouped ? l.groups() : 1;
  if (!scale_sizes.empty()) scale_sizes.back() = count;
  if (q.scalar_type() != at::kByte || !is_linear(l, packed, weight_scale, bias) ||
      scale.scalar_type() != at::kFloat || scale.sizes() != scale_sizes || !is_output(out_scale, out_zero_point)) {
    return call_reference<decltype(linear_packed_per_token)>(
        "linear_packed_per_token", q, scale, packed, weight_scale, bias, out_scale, out_zero_point, bits, group_size);
  }
  at::DataPtr storage;
  const Tensor rows = as_rows(q), scales = scale.contiguous();
  Activations a = readable_rows(rows, l, &storage);
  a.scale = scales.const_data_ptr<float>();
  a.scale_step = count;
  a.group_step = grouped;
  a.zero_point = qgemm::kTokenZeroPoint;
  return multiply(q, a, l, packed, weight_scale, bias, out_scale, out_zero_point);
}

}  // namespace

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) {
  m.impl("linear_packed", linear_packed);
  m.impl("quantize_per_token", quantize_per_token);
  m.impl("linear_packed_per_token", linear_packed_per_token);
}

}  // namespace mq_ao
