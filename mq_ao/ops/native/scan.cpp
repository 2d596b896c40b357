// mq_ao::selective_scan and its gradient for PyTorch's CPU dispatch key; the schemas are defined in Python.

#include <ATen/ops/empty_like.h>

#include "glue.h"
#include "scan.h"
#include "scan_backward.h"

namespace mq_ao {
namespace {

struct ScanTensors {
  Tensor u, delta, A, B, C;
  OptionalTensor D, delta_bias;
  bool delta_softplus;
  OptionalTensor initial_state;

  int64_t groups() const { return B.dim() == 4 ? B.size(2) : 1; }

  // Whether the native kernel takes these operands. Everything else goes to the reference.
  bool native() const {
    if (u.dim() != 3 || A.dim() != 2 || (B.dim() != 3 && B.dim() != 4) || !is_native_dtype(u)) return false;
    const auto batch = u.size(0), length = u.size(1), channels = u.size(2), d_state = A.size(1);
    if (length == 0 || d_state == 0 || groups() == 0 || channels % groups() != 0) return false;
    const at::DimVector state_shape{batch, channels, d_state};
    at::DimVector matrix_shape{batch, length, d_state};
    if (B.dim() == 4) matrix_shape = {batch, length, groups(), d_state};
    for (const Tensor* t : {&delta, &B, &C})
      if (t->scalar_type() != u.scalar_type()) return false;
    return delta.sizes() == u.sizes() && A.size(0) == channels && B.sizes() == matrix_shape &&
        C.sizes() == matrix_shape && has_shape(D, {channels}) && has_shape(delta_bias, {channels}) &&
        has_shape(initial_state, state_shape);
  }

  // Copies only what the cores cannot read in place.
  ScanTensors readable() const {
    return {dense_rows(u), dense_rows(delta), A.to(at::kFloat).contiguous(), dense_rows(B), dense_rows(C),
            float_contiguous(D), float_contiguous(delta_bias), delta_softplus, float_contiguous(initial_state)};
  }

  // Of tensors that are `readable`.
  template <typename T>
  ScanInputs<T> inputs() const {
    return {{u.size(0), u.size(1), u.size(2), groups(), A.size(1)},
            rows<const T>(u),
            rows<const T>(delta),
            rows<const T>(B),
            rows<const T>(C),
            A.const_data_ptr<float>(),
            data_or_null(D),
            data_or_null(delta_bias),
            data_or_null(initial_state),
            delta_softplus};
  }
};

template <typename T>
void run_scan(const ScanInputs<T>& in, Rows<T> y, float* last_state) {
  const ScanShape& s = in.shape;
  if (s.length == 1 && s.d_state % kLanes == 0) {
    const ScanTasks tasks{s, kLanes};
    // A thread is woken for 32768 states, some microseconds of work.
    const int64_t grain = std::max<int64_t>(1, 32768 / (kLanes * s.d_state));
    at::parallel_for(0, tasks.count(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) scan_step(in, tasks.task(i), y, last_state);
    });
    return;
  }
  const ScanTasks tasks{s, kRangeBlocks * kLanes};
  at::parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) scan_task(in, tasks.task(i), y, last_state);
  });
}

std::tuple<Tensor, Tensor> selective_scan(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state) {
  const ScanTensors given{u, delta, A, B, C, D, delta_bias, delta_softplus, initial_state};
  if (!given.native())
    return call_reference<decltype(selective_scan)>(
        "selective_scan", u, delta, A, B, C, D, delta_bias, delta_softplus, initial_state);
  const ScanTensors in = given.readable();
  Tensor y = at::empty(u.sizes(), u.options());
  Tensor last_state = at::empty({u.size(0), A.size(0), A.size(1)}, u.options().dtype(at::kFloat));
  const auto run = [&](auto type) {
    using T = decltype(type);
    run_scan(in.inputs<T>(), rows<T>(y), last_state.data_ptr<float>());
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

  Tensor du = at::empty(u.sizes(), u.options()), ddelta = at::empty(u.sizes(), u.options());
  Tensor dA = at::empty({batch, channels, d_state}, options), dinit = at::empty_like(dA);
  Tensor dD = at::empty({batch, channels}, options), dbias = at::empty_like(dD);
  Tensor dB = at::empty({tasks.ranges(), batch, length, in.groups(), d_state}, options), dC = at::empty_like(dB);
  const auto run = [&](auto type) {
    using T = decltype(type);
    const ScanInputs<T> inputs = in.inputs<T>();
    const ScanGradients<T> out{
        rows<const T>(grad), dlast.const_data_ptr<float>(), rows<T>(du), rows<T>(ddelta), dA.data_ptr<float>(),
        dD.data_ptr<float>(), dbias.data_ptr<float>(), dinit.data_ptr<float>(), dB.data_ptr<float>(),
        dC.data_ptr<float>()};
    at::parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        GradientTask<T>(inputs, tasks.task(i), i % tasks.ranges(), out).run();
    });
  };
  u.scalar_type() == at::kFloat ? run(float{}) : run(BFloat16{});

  // Sums over ranges and batch run in a fixed order, so gradients do not depend on the number of threads.
  const auto like = [&](const Tensor& sum, const OptionalTensor& operand) {
    return operand ? sum.to(operand->scalar_type()) : at::empty({0}, options);
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
