// mq_ao::ssd_scan for PyTorch's CPU dispatch key; the schema is defined in Python.

#include "last_state.h"
#include "ssd_glue.h"

namespace mq_ao {
namespace {

std::tuple<Tensor, Tensor> ssd_scan(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& dt_bias, bool dt_softplus, double dt_min, std::optional<double> dt_max,
    const OptionalTensor& initial_state, const OptionalTensor& seq_idx) {
  const SsdTensors given{x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx};
  if (!given.native())
    return call_reference<decltype(ssd_scan)>(
        "ssd_scan", x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx);
  const SsdTensors in = given.readable();
  Tensor y = empty(x.sizes(), x.options());
  const auto options = x.options().dtype(at::kFloat);
  Tensor last_state = StateMemory::take({x.size(0), x.size(2), x.size(3), B.size(3)}, options);
  const auto run = [&](auto type) {
    using T = decltype(type);
    run_ssd(in.operands<T>(rows<const T>(in.x), rows<const T>(in.dt)), rows<T>(y), last_state.data_ptr<float>(),
            TorchThreads());
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(BFloat16{});
  return {y, last_state};
}

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) { m.impl("ssd_scan", ssd_scan); }

}  // namespace
}  // namespace mq_ao
