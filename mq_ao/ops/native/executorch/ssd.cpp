// mq_ao::ssd_scan and mq_ao::qssd_scan for ExecuTorch.

#include "ssd.h"

#include <limits>

#include "qoperands.h"

namespace mq_ao::et {
namespace {

// What both operators share.
struct Ssd {
  const Tensor &x, &dt, &A, &B, &C;
  const OptionalTensor &D, &dt_bias;
  bool dt_softplus;
  double dt_min;
  std::optional<double> dt_max;
  const OptionalTensor &initial_state, &seq_idx;

  SsdShape shape() const { return {x.size(0), x.size(1), x.size(2), x.size(3), B.size(2), B.size(3)}; }
  double highest() const { return dt_max.value_or(std::numeric_limits<double>::infinity()); }

  bool fit() const {
    if (!require(x.dim() == 4 && x.numel() > 0, "ssd: x", "be (batch, length, heads, headdim), not empty", x) ||
        !require(B.dim() == 4 && B.numel() > 0 && x.size(2) % B.size(2) == 0, "ssd: B",
                 "be (batch, length, groups, d_state), groups dividing heads", B) ||
        !require(dt_min <= highest(), "ssd: dt", "have a dt_min that does not exceed dt_max", dt))
      return false;
    const SsdShape s = shape();
    const bool wide = D && D->dim() == 2;
    return fits("ssd: x", x, x.scalar_type(), {s.batch, s.length, s.heads, s.headdim}) &&
        fits("ssd: dt", dt, dt.scalar_type(), {s.batch, s.length, s.heads}) &&
        fits("ssd: A", A, ScalarType::Float, {s.heads}) &&
        fits("ssd: B", B, B.scalar_type(), {s.batch, s.length, s.groups, s.d_state}) &&
        fits("ssd: C", C, C.scalar_type(), {s.batch, s.length, s.groups, s.d_state}) &&
        (wide ? fits("ssd: D", D, ScalarType::Float, {s.heads, s.headdim})
              : fits("ssd: D", D, ScalarType::Float, {s.heads})) &&
        fits("ssd: dt_bias", dt_bias, ScalarType::Float, {s.heads}) &&
        fits("ssd: initial_state", initial_state, ScalarType::Float, {s.batch, s.heads, s.headdim, s.d_state}) &&
        fits("ssd: seq_idx", seq_idx, ScalarType::Long, {s.batch, s.length});
  }

  bool prepare_results(Tensor& y, ScalarType y_dtype, Tensor& last_state) const {
    const SsdShape s = shape();
    return prepare("ssd: y", y, y_dtype, {s.batch, s.length, s.heads, s.headdim}) &&
        prepare("ssd: last_state", last_state, ScalarType::Float, {s.batch, s.heads, s.headdim, s.d_state});
  }

  template <typename Source>
  SsdOperands<Source, float> operands(
      const Source& x_rows, const Source& dt_rows, Rows<const float> B_rows, Rows<const float> C_rows) const {
    return {shape(),
            x_rows,
            dt_rows,
            B_rows,
            C_rows,
            A.const_data_ptr<float>(),
            data_or_null<float>(D),
            data_or_null<float>(dt_bias),
            data_or_null<float>(initial_state),
            data_or_null<int64_t>(seq_idx),
            D && D->dim() == 2,
            dt_softplus,
            float(dt_min),
            float(highest())};
  }
};

// (batch, length, heads, headdim) as rows of heads * headdim columns.
template <typename T>
Rows<T> wide_rows(T* data, const Tensor& t) {
  return {data, t.strides()[0], t.strides()[1], 0};
}

void ssd_scan(
    Context& context, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& dt_bias, bool dt_softplus, double dt_min,
    std::optional<double> dt_max, const OptionalTensor& initial_state, const OptionalTensor& seq_idx, Tensor& y,
    Tensor& last_state) {
  const Ssd given{x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx};
  const bool floats = require(is_float(x), "ssd_scan: x", "be float32", x) &&
      require(is_float(dt), "ssd_scan: dt", "be float32", dt) &&
      require(is_float(B), "ssd_scan: B", "be float32", B) && require(is_float(C), "ssd_scan: C", "be float32", C);
  MQ_AO_REQUIRE(context, floats && given.fit() && given.prepare_results(y, ScalarType::Float, last_state));
  const auto in = given.operands(
      wide_rows(x.const_data_ptr<float>(), x), rows(dt.const_data_ptr<float>(), dt),
      rows(B.const_data_ptr<float>(), B), rows(C.const_data_ptr<float>(), C));
  run_ssd(in, wide_rows(y.mutable_data_ptr<float>(), y), last_state.mutable_data_ptr<float>(),
          RuntimeThreads{context});
}

void qssd_scan(
    Context& context, const Tensor& x, double x_scale, int64_t x_zero_point, const Tensor& dt, double dt_scale,
    int64_t dt_zero_point, const Tensor& A, const Tensor& B, double B_scale, int64_t B_zero_point, const Tensor& C,
    double C_scale, int64_t C_zero_point, const OptionalTensor& D, const OptionalTensor& dt_bias, bool dt_softplus,
    double dt_min, std::optional<double> dt_max, const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
    std::optional<double> out_scale, int64_t out_zero_point, Tensor& y, Tensor& last_state) {
  const Operand qx{x, x_scale, x_zero_point}, qdt{dt, dt_scale, dt_zero_point};
  const Operand qB{B, B_scale, B_zero_point}, qC{C, C_scale, C_zero_point};
  const Ssd given{x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx};
  const ScalarType y_dtype = !out_scale ? ScalarType::Float : is_signed(x) ? ScalarType::Char : ScalarType::Byte;
  MQ_AO_REQUIRE(
      context,
      qx.good("qssd_scan: x") && qdt.good("qssd_scan: dt") && qB.good("qssd_scan: B") && qC.good("qssd_scan: C") &&
          given.fit() &&
          require(!out_scale || is_grid(is_signed(x), *out_scale, out_zero_point), "qssd_scan: y",
                  "have a positive scale and a zero point of its dtype", y) &&
          given.prepare_results(y, y_dtype, last_state));
  const FloatMatrix float_B(qB), float_C(qC);
  const QOutput out(y.mutable_data_ptr(), y.strides()[0], y.strides()[1], is_signed(x), out_scale, out_zero_point);
  run_ssd(given.operands(qx.rows(), qdt.rows(), float_B.rows(), float_C.rows()), out,
          last_state.mutable_data_ptr<float>(), RuntimeThreads{context});
}

[[maybe_unused]] const bool entered =
    enter<ssd_scan>("mq_ao::ssd_scan.out") && enter<qssd_scan>("mq_ao::qssd_scan.out");

}  // namespace
}  // namespace mq_ao::et
