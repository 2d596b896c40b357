// mq_ao::selective_scan and its gradient for PyTorch's CPU dispatch key; the schemas are defined in Python.

#include <ATen/ops/empty_like.h>

#include "last_state.h"
#include "scan_backward.h"
#include "scan_glue.h"

namespace mq_ao {
namespace {

std::tuple<Tensor, Tensor> selective_scan(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state) {
  const ScanTensors given{u, delta, A, B, C, D, delta_bias, delta_softplus, initial_state};
  if (!given.native())
    return call_reference<decltype(selective_scan)>(
        "selective_scan", u, delta, A, B, C, D, delta_bias, delta_softplus, initial_state);
  const ScanTensors in = given.readable();
  Tensor y = empty(u.sizes(), u.options());
  Tensor last_state = StateMemory::take({u.size(0), A.size(0), A.size(1)}, u.options().dtype(at::kFloat));
  const auto run = [&](auto type) {
    using T = decltype(type);
    run_scan(in.inputs<T>(), rows<T>(y), last_state.data_ptr<float>(), TorchThreads());
  };
  u.scalar_type() == at::kFloat ? run(float{}) : run(BFloat16{});
  return {y, last_state};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_backward(
    const Tensor& dy, const Tensor& dlast_state, const Tensor& u, const Tensor& delta, const Tensor& A,
    const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& delta_bias, bool delta_softplus,
    const OptionalTensor& initial_state) {
  const ScanTensors given{u, delta, A, B, C, D, delta_bias, delta_softplus, initial_state};
  if (!given.native())
    return call_reference<decltype(selective_scan_backward)>(
        "selective_scan_backward", dy, dlast_state, u, delta, A, B, C, D, delta_bias, delta_softplus, initial_state);
  const ScanTensors in = given.readable();
  const Tensor grad = dense_rows(dy.to(u.scalar_type())), dlast = dlast_state.to(at::kFloat).contiguous();
  const auto options = u.options().dtype(at::kFloat);
  const int64_t batch = u.size(0), length = u.size(1), channels = u.size(2), d_state = A.size(1);
  const ScanTasks tasks{{batch, length, channels, in.groups(), d_state}, kGradientRange};

  Tensor du = empty(u.sizes(), u.options()), ddelta = empty(u.sizes(), u.options());
  Tensor dA = empty({batch, channels, d_state}, options), dinit = at::empty_like(dA);
  Tensor dD = empty({batch, channels}, options), dbias = at::empty_like(dD);
  Tensor dB = empty({tasks.ranges(), batch, length, in.groups(), d_state}, options), dC = at::empty_like(dB);
  const auto run = [&](auto type) {
    using T = decltype(type);
    const ScanInputs<T> inputs = in.inputs<T>();
    const ScanGradients<T> out{
        rows<const T>(grad), dlast.const_data_ptr<float>(), rows<T>(du), rows<T>(ddelta), dA.data_ptr<float>(),
        dD.data_ptr<float>(), dbias.data_ptr<float>(), dinit.data_ptr<float>(), dB.data_ptr<float>(),
        dC.data_ptr<float>()};
    TorchThreads{}(tasks.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        GradientTask<T>(inputs, tasks.task(i), i % tasks.ranges(), out).run();
    });
  };
  u.scalar_type() == at::kFloat ? run(float{}) : run(BFloat16{});

  // Sums over ranges and batch run in a fixed order, so gradients do not depend on the number of threads.
  const auto like = [&](const Tensor& sum, const OptionalTensor& operand) {
    return operand ? sum.to(operand->scalar_type()) : empty({0}, options);
  };
  return {du, ddelta, dA.sum(0).to(A.scalar_type()), dB.sum(0).view(B.sizes()).to(B.scalar_type()),
          dC.sum(0).view(C.sizes()).to(C.scalar_type()), like(dD.sum(0), D), like(dbias.sum(0), delta_bias),
          like(dinit, initial_state)};
}

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) {
  m.impl("selective_scan", selective_scan);
  m.impl("selective_scan_backward", selective_scan_backward);
}

}  // namespace
}  // namespace mq_ao
