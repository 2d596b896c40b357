// mq_ao::causal_conv1d and mq_ao::qcausal_conv1d for ExecuTorch.

#include "conv.h"

#include "operands.h"
#include "qconv.h"
#include "tasks.h"

namespace mq_ao::et {
namespace {

using Activation = std::optional<std::string_view>;

// Whether everything but the dtypes of x and weight is as the operators take it.
bool fit(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_state,
    const Activation& activation) {
  if (!require(x.dim() == 3 && x.size(1) > 0, "conv: x", "be (batch, length, channels) with length above 0", x) ||
      !require(weight.dim() == 2 && weight.size(1) > 0, "conv: weight", "be (channels, d_conv)", weight))
    return false;
  const int64_t batch = x.size(0), channels = x.size(2), taps = weight.size(1);
  if (activation && *activation != "silu") {
    ET_LOG(Error, "mq_ao::conv: the activation must be silu or none");
    return false;
  }
  return fits("conv: x", x, x.scalar_type(), {batch, x.size(1), channels}) &&
      fits("conv: weight", weight, weight.scalar_type(), {channels, taps}) &&
      fits("conv: bias", bias, ScalarType::Float, {channels}) &&
      fits("conv: initial_state", initial_state, ScalarType::Float, {batch, taps - 1, channels});
}

ConvShape shape_of(const Tensor& x, const Tensor& weight) {
  return {x.size(0), x.size(1), x.size(2), weight.size(1)};
}

bool prepare_results(const ConvShape& s, Tensor& y, ScalarType y_dtype, Tensor& last_state) {
  return prepare("conv: y", y, y_dtype, {s.batch, s.length, s.channels}) &&
      prepare("conv: last_state", last_state, ScalarType::Float, {s.batch, s.d_conv - 1, s.channels});
}

void causal_conv1d(
    Context& context, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& initial_state, const Activation& activation, Tensor& y, Tensor& last_state) {
  MQ_AO_REQUIRE(
      context,
      require(is_float(x), "causal_conv1d: x", "be float32", x) &&
          require(is_float(weight), "causal_conv1d: weight", "be float32", weight) &&
          fit(x, weight, bias, initial_state, activation));
  const ConvShape s = shape_of(x, weight);
  MQ_AO_REQUIRE(context, prepare_results(s, y, ScalarType::Float, last_state));
  const ConvInputs<float> in{
      s,
      rows(x.const_data_ptr<float>(), x),
      weight.const_data_ptr<float>(),
      data_or_null<float>(bias),
      data_or_null<float>(initial_state),
      activation.has_value()};
  const Rows<float> out = rows(y.mutable_data_ptr<float>(), y);
  float* last = last_state.mutable_data_ptr<float>();
  for_channel_ranges(
      s.batch, s.length, s.channels, RuntimeThreads{context},
      [&](const ChannelTask& task) { conv_task(in, task, out, last); });
}

void qcausal_conv1d(
    Context& context, const Tensor& x, double x_scale, int64_t x_zero_point, const Tensor& weight,
    const Tensor& weight_scale, const OptionalTensor& bias, const OptionalTensor& initial_state,
    const Activation& activation, std::optional<double> out_scale, int64_t out_zero_point, Tensor& y,
    Tensor& last_state) {
  MQ_AO_REQUIRE(
      context,
      require(is_byte(x), "qcausal_conv1d: x", "be uint8 or int8", x) &&
          require(is_grid(is_signed(x), x_scale, x_zero_point), "qcausal_conv1d: x",
                  "have a positive scale and a zero point of its dtype", x) &&
          require(weight.scalar_type() == ScalarType::Char, "qcausal_conv1d: weight", "be int8", weight) &&
          fit(x, weight, bias, initial_state, activation) &&
          fits("qcausal_conv1d: weight_scale", weight_scale, ScalarType::Float, {x.size(2)}) &&
          require(!out_scale || is_grid(is_signed(x), *out_scale, out_zero_point), "qcausal_conv1d: y",
                  "have a positive scale and a zero point of x's dtype", y));
  const ConvShape s = shape_of(x, weight);
  MQ_AO_REQUIRE(context, prepare_results(s, y, out_scale ? x.scalar_type() : ScalarType::Float, last_state));
  const QConvInputs in{
      s,
      rows(static_cast<const uint8_t*>(x.const_data_ptr()), x),
      Grid(is_signed(x), x_scale, x_zero_point),
      weight.const_data_ptr<int8_t>(),
      weight_scale.const_data_ptr<float>(),
      data_or_null<float>(bias),
      data_or_null<float>(initial_state),
      activation.has_value()};
  const QOutput out(
      y.mutable_data_ptr(), y.strides()[0], y.strides()[1], is_signed(x), out_scale, out_zero_point);
  float* last = last_state.mutable_data_ptr<float>();
  for_channel_ranges(
      s.batch, s.length, s.channels, RuntimeThreads{context},
      [&](const ChannelTask& task) { qconv_task(in, task, out, last); });
}

[[maybe_unused]] const bool entered =
    enter<causal_conv1d>("mq_ao::causal_conv1d.out") && enter<qcausal_conv1d>("mq_ao::qcausal_conv1d.out");

}  // namespace
}  // namespace mq_ao::et
