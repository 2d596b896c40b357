// mq_ao::qssd_scan for PyTorch's CPU dispatch key; the schema is defined in Python.

#include "last_state.h"
#include "qglue.h"
#include "ssd_glue.h"

namespace mq_ao {
namespace {

std::tuple<Tensor, Tensor> qssd_scan(
    const Tensor& x, double x_scale, int64_t x_zero_point, const Tensor& dt, double dt_scale, int64_t dt_zero_point,
    const Tensor& A, const Tensor& B, double B_scale, int64_t B_zero_point, const Tensor& C, double C_scale,
    int64_t C_zero_point, const OptionalTensor& D, const OptionalTensor& dt_bias, bool dt_softplus, double dt_min,
    std::optional<double> dt_max, const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
    std::optional<double> out_scale, int64_t out_zero_point) {
  const Operand qx{x, x_scale, x_zero_point}, qdt{dt, dt_scale, dt_zero_point};
  const Operand qB{B, B_scale, B_zero_point}, qC{C, C_scale, C_zero_point};
  const SsdTensors given{x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx};
  if (!qx.native() || !qdt.native() || !qB.native() || !qC.native() || !given.fit() ||
      (out_scale && !is_grid(is_signed(x), *out_scale, out_zero_point)))
    return call_reference<decltype(qssd_scan)>(
        "qssd_scan", x, x_scale, x_zero_point, dt, dt_scale, dt_zero_point, A, B, B_scale, B_zero_point, C, C_scale,
        C_zero_point, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, out_scale, out_zero_point);
  SsdTensors in = given.readable();
  in.B = float_matrix(in.B, qB);
  in.C = float_matrix(in.C, qC);
  Tensor y = empty(x.sizes(), x.options().dtype(!out_scale ? at::kFloat : is_signed(x) ? at::kChar : at::kByte));
  const auto options = x.options().dtype(at::kFloat);
  Tensor last_state = StateMemory::take({x.size(0), x.size(2), x.size(3), B.size(3)}, options);
  const QOutput out(y.data_ptr(), y.stride(0), y.stride(1), is_signed(x), out_scale, out_zero_point);
  run_ssd(in.operands<float>(channel_rows({in.x, x_scale, x_zero_point}),
                             channel_rows({in.dt, dt_scale, dt_zero_point})),
          out, last_state.data_ptr<float>(), TorchThreads());
  return {y, last_state};
}

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) { m.impl("qssd_scan", qssd_scan); }

}  // namespace
}  // namespace mq_ao
