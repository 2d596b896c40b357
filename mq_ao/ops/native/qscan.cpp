// mq_ao::qselective_scan and mq_ao::scan_states for PyTorch's CPU dispatch key; the schemas are defined in Python.

#include "last_state.h"
#include "qglue.h"
#include "scan_glue.h"

namespace mq_ao {
namespace {

bool good_states(const Tensor& A, const OptionalTensor& initial_state, const OptionalTensor& scale) {
  if (scale && (scale->scalar_type() != at::kFloat || scale->sizes() != A.sizes())) return false;
  return !initial_state || (scale ? initial_state->scalar_type() == at::kChar : initial_state->is_floating_point());
}

std::tuple<Tensor, Tensor> qselective_scan(
    const Tensor& u, double u_scale, int64_t u_zero_point, const Tensor& delta, double delta_scale,
    int64_t delta_zero_point, const Tensor& A, const Tensor& B, double B_scale, int64_t B_zero_point, const Tensor& C,
    double C_scale, int64_t C_zero_point, const OptionalTensor& D, const OptionalTensor& delta_bias,
    bool delta_softplus, const OptionalTensor& initial_state, const OptionalTensor& state_scale,
    std::optional<double> out_scale, int64_t out_zero_point) {
  const Operand qu{u, u_scale, u_zero_point}, qdelta{delta, delta_scale, delta_zero_point};
  const Operand qB{B, B_scale, B_zero_point}, qC{C, C_scale, C_zero_point};
  const ScanTensors given{u, delta, A, B, C, D, delta_bias, delta_softplus, initial_state};
  if (!qu.native() || !qdelta.native() || !qB.native() || !qC.native() || !given.shapes_fit() ||
      !good_states(A, initial_state, state_scale) || (out_scale && !is_grid(is_signed(u), *out_scale, out_zero_point)))
    return call_reference<decltype(qselective_scan)>(
        "qselective_scan", u, u_scale, u_zero_point, delta, delta_scale, delta_zero_point, A, B, B_scale, B_zero_point,
        C, C_scale, C_zero_point, D, delta_bias, delta_softplus, initial_state, state_scale, out_scale, out_zero_point);
  ScanTensors in = given;
  if (state_scale) in.initial_state.reset();  // would become float
  in = in.readable();
  const OptionalTensor step = float_contiguous(state_scale);
  const OptionalTensor start = initial_state && step ? initial_state->contiguous() : in.initial_state;
  in.B = float_matrix(in.B, qB);
  in.C = float_matrix(in.C, qC);
  Tensor y = empty(u.sizes(), u.options().dtype(!out_scale ? at::kFloat : is_signed(u) ? at::kChar : at::kByte));
  const auto options = A.options().dtype(step ? at::kChar : at::kFloat);
  Tensor last_state = StateMemory::take({u.size(0), A.size(0), A.size(1)}, options);

  const QStates<const void> first{start ? start->const_data_ptr() : nullptr, data_or_null(step)};
  const ScanOperands<QRows, float, QStates<const void>> operands{
      in.shape(), channel_rows({in.u, u_scale, u_zero_point}), channel_rows({in.delta, delta_scale, delta_zero_point}),
      rows<const float>(in.B), rows<const float>(in.C), in.A.const_data_ptr<float>(), data_or_null(in.D),
      data_or_null(in.delta_bias), first, delta_softplus};
  const QOutput out(y.data_ptr(), y.stride(0), y.stride(1), is_signed(u), out_scale, out_zero_point);
  run_scan(operands, out, QStates<void>{last_state.data_ptr(), first.scale}, TorchThreads());
  return {y, last_state};
}

std::tuple<Tensor, Tensor> scan_states(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const OptionalTensor& delta_bias,
    bool delta_softplus, const OptionalTensor& initial_state) {
  const ScanTensors given{u, delta, A, B, B, {}, delta_bias, delta_softplus, initial_state};
  if (!given.native() || u.scalar_type() != at::kFloat)
    return call_reference<decltype(scan_states)>(
        "scan_states", u, delta, A, B, delta_bias, delta_softplus, initial_state);
  const ScanTensors in = given.readable();
  Tensor all = empty({u.size(0), u.size(1), A.size(0), A.size(1)}, u.options());
  Tensor last_state = empty({u.size(0), A.size(0), A.size(1)}, u.options());
  const ScanInputs<float> inputs = in.inputs<float>();
  const ScanTasks tasks{inputs.shape, kRangeBlocks * kLanes};
  TorchThreads{}(tasks.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      states_task(inputs, tasks.task(i), all.data_ptr<float>(), last_state.data_ptr<float>());
  });
  return {all, last_state};
}

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) {
  m.impl("qselective_scan", qselective_scan);
  m.impl("scan_states", scan_states);
}

}  // namespace
}  // namespace mq_ao
