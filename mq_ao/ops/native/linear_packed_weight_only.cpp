// PyTorch operator on qgemm.h: mq_ao::linear_packed_weight_only, integer weights with float activations.
//
// Activations become 24-bit integers, row by row, in three planes of bytes: converting them costs little, while every
// weight converted to a float would cost more than three integer products. The sums are exact.
// Bad input goes to the Python reference, which says what is wrong with it.
#include "linear_glue.h"

namespace mq_ao {
namespace {

Tensor linear_packed_weight_only(
    const Tensor& x, const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias, int64_t bits,
    int64_t group_size) {
  const Layout l = layout_of(x, weight_scale, bits, group_size);
  if (!is_native_dtype(x) || !is_linear(l, packed, weight_scale, bias)) {
    return call_reference<decltype(linear_packed_weight_only)>(
        "linear_packed_weight_only", x, packed, weight_scale, bias, bits, group_size);
  }
  constexpr int64_t kPlanes = 3;
  const Tensor rows = as_rows(x);
  const int64_t m = rows.size(0), depth = l.depth();
  const at::DataPtr storage = Workspace::memory(m * (kPlanes * depth + sizeof(float)));
  auto* scale = static_cast<float*>(storage.get());
  auto* q = reinterpret_cast<uint8_t*>(scale + m);
  for_rows(rows, [&](int64_t i, const auto* row) {
    scale[i] = qgemm::quantize_planes(row, l.k, q + i * kPlanes * depth, depth);
  });
  return multiply(x, {q, depth, scale, 1, 128, kPlanes}, l, packed, weight_scale, bias, std::nullopt, 0);
}

}  // namespace

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) { m.impl("linear_packed_weight_only", linear_packed_weight_only); }

}  // namespace mq_ao
