// PyTorch operators on qgemm_layout.h: mq_ao::linear_prepack, linear_unpack.
// Bad input goes to the Python reference, which says what is wrong with it.
#include "linear_glue.h"

namespace mq_ao {
namespace {

Tensor linear_prepack(const Tensor& weight, int64_t bits, int64_t group_size) {
  const auto refuse = [&] {
    return call_reference<decltype(linear_prepack)>("linear_prepack", weight, bits, group_size);
  };
  if (weight.dim() != 2 || weight.scalar_type() != at::kChar) return refuse();
  const Layout l{weight.size(0), weight.size(1), bits, group_size};
  if (!is_layout(l)) return refuse();
  const Tensor rows = weight.contiguous();
  const auto* values = rows.const_data_ptr<int8_t>();
  if (bits == 4 && std::any_of(values, values + l.n * l.k, [](int8_t w) { return w < -8 || w > 7; })) return refuse();
  Tensor packed = at::empty({l.bytes()}, weight.options());
  qgemm::pack(l, values, packed.mutable_data_ptr<int8_t>());
  return packed;
}

Tensor linear_unpack(const Tensor& packed, int64_t n, int64_t k, int64_t bits, int64_t group_size) {
  const Layout l{n, k, bits, group_size};
  if (!is_packed(packed, l)) {
    return call_reference<decltype(linear_unpack)>("linear_unpack", packed, n, k, bits, group_size);
  }
  Tensor weight = at::empty({n, k}, packed.options());
  qgemm::unpack(l, packed.const_data_ptr<int8_t>(), weight.mutable_data_ptr<int8_t>());
  return weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) {
  m.impl("linear_prepack", linear_prepack);
  m.impl("linear_unpack", linear_unpack);
}

}  // namespace mq_ao
