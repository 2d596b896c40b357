// mq_ao::selective_scan and mq_ao::qselective_scan for ExecuTorch.

#include "scan.h"

#include "qoperands.h"

namespace mq_ao::et {
namespace {

// What both operators share.
struct Operands {
  const Tensor &u, &delta, &A, &B, &C;
  const OptionalTensor &D, &delta_bias, &initial_state;

  int64_t groups() const { return B.dim() == 4 ? B.size(2) : 1; }
  ScanShape shape() const { return {u.size(0), u.size(1), u.size(2), groups(), A.size(1)}; }

  bool fit(ScalarType state) const {
    if (!require(u.dim() == 3 && u.size(1) > 0, "scan: u", "be (batch, length, channels) with length above 0", u) ||
        !require(A.dim() == 2 && A.size(1) > 0, "scan: A", "be (channels, d_state)", A) ||
        !require((B.dim() == 3 || B.dim() == 4) && groups() > 0 && u.size(2) % groups() == 0, "scan: B",
                 "be (batch, length, d_state) or (batch, length, groups, d_state), groups dividing channels", B))
      return false;
    const ScanShape s = shape();
    const auto matrix_fits = [&](const char* label, const Tensor& t) {
      return B.dim() == 3 ? fits(label, t, t.scalar_type(), {s.batch, s.length, s.d_state})
                          : fits(label, t, t.scalar_type(), {s.batch, s.length, s.groups, s.d_state});
    };
    return fits("scan: u", u, u.scalar_type(), {s.batch, s.length, s.channels}) &&
        fits("scan: delta", delta, delta.scalar_type(), {s.batch, s.length, s.channels}) &&
        fits("scan: A", A, ScalarType::Float, {s.channels, s.d_state}) && matrix_fits("scan: B", B) &&
        matrix_fits("scan: C", C) && fits("scan: D", D, ScalarType::Float, {s.channels}) &&
        fits("scan: delta_bias", delta_bias, ScalarType::Float, {s.channels}) &&
        fits("scan: initial_state", initial_state, state, {s.batch, s.channels, s.d_state});
  }
};

bool prepare_results(
    const ScanShape& s, Tensor& y, ScalarType y_dtype, Tensor& last_state, ScalarType state_dtype) {
  return prepare("scan: y", y, y_dtype, {s.batch, s.length, s.channels}) &&
      prepare("scan: last_state", last_state, state_dtype, {s.batch, s.channels, s.d_state});
}

void selective_scan(
    Context& context, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& delta_bias, bool delta_softplus,
    const OptionalTensor& initial_state, Tensor& y, Tensor& last_state) {
  const Operands given{u, delta, A, B, C, D, delta_bias, initial_state};
  const bool floats = require(is_float(u), "selective_scan: u", "be float32", u) &&
      require(is_float(delta), "selective_scan: delta", "be float32", delta) &&
      require(is_float(B), "selective_scan: B", "be float32", B) &&
      require(is_float(C), "selective_scan: C", "be float32", C);
  MQ_AO_REQUIRE(context, floats && given.fit(ScalarType::Float));
  const ScanShape shape = given.shape();
  MQ_AO_REQUIRE(context, prepare_results(shape, y, ScalarType::Float, last_state, ScalarType::Float));
  const ScanInputs<float> in{
      shape,
      rows(u.const_data_ptr<float>(), u),
      rows(delta.const_data_ptr<float>(), delta),
      rows(B.const_data_ptr<float>(), B),
      rows(C.const_data_ptr<float>(), C),
      A.const_data_ptr<float>(),
      data_or_null<float>(D),
      data_or_null<float>(delta_bias),
      data_or_null<float>(initial_state),
      delta_softplus};
  run_scan(in, rows(y.mutable_data_ptr<float>(), y), last_state.mutable_data_ptr<float>(), RuntimeThreads{context});
}

void qselective_scan(
    Context& context, const Tensor& u, double u_scale, int64_t u_zero_point, const Tensor& delta, double delta_scale,
    int64_t delta_zero_point, const Tensor& A, const Tensor& B, double B_scale, int64_t B_zero_point, const Tensor& C,
    double C_scale, int64_t C_zero_point, const OptionalTensor& D, const OptionalTensor& delta_bias,
    bool delta_softplus, const OptionalTensor& initial_state, const OptionalTensor& state_scale,
    std::optional<double> out_scale, int64_t out_zero_point, Tensor& y, Tensor& last_state) {
  const Operand qu{u, u_scale, u_zero_point}, qdelta{delta, delta_scale, delta_zero_point};
  const Operand qB{B, B_scale, B_zero_point}, qC{C, C_scale, C_zero_point};
  const Operands given{u, delta, A, B, C, D, delta_bias, initial_state};
  const ScalarType state_dtype = state_scale ? ScalarType::Char : ScalarType::Float;
  const ScalarType y_dtype =
      !out_scale ? ScalarType::Float : is_signed(u) ? ScalarType::Char : ScalarType::Byte;
  MQ_AO_REQUIRE(
      context,
      qu.good("qselective_scan: u") && qdelta.good("qselective_scan: delta") && qB.good("qselective_scan: B") &&
          qC.good("qselective_scan: C") && given.fit(state_dtype) &&
          fits("qselective_scan: state_scale", state_scale, ScalarType::Float, {A.size(0), A.size(1)}) &&
          require(!out_scale || is_grid(is_signed(u), *out_scale, out_zero_point), "qselective_scan: y",
                  "have a positive scale and a zero point of its dtype", y));
  const ScanShape shape = given.shape();
  MQ_AO_REQUIRE(context, prepare_results(shape, y, y_dtype, last_state, state_dtype));

  const FloatMatrix float_B(qB), float_C(qC);
  const QStates<const void> first{
      initial_state ? initial_state->const_data_ptr() : nullptr, data_or_null<float>(state_scale)};
  const ScanOperands<QRows, float, QStates<const void>> in{
      shape,
      qu.rows(),
      qdelta.rows(),
      float_B.rows(),
      float_C.rows(),
      A.const_data_ptr<float>(),
      data_or_null<float>(D),
      data_or_null<float>(delta_bias),
      first,
      delta_softplus};
  const QOutput out(
      y.mutable_data_ptr(), y.strides()[0], y.strides()[1], is_signed(u), out_scale, out_zero_point);
  run_scan(in, out, QStates<void>{last_state.mutable_data_ptr(), first.scale}, RuntimeThreads{context});
}

[[maybe_unused]] const bool entered =
    enter<selective_scan>("mq_ao::selective_scan.out") && enter<qselective_scan>("mq_ao::qselective_scan.out");

}  // namespace
}  // namespace mq_ao::et
