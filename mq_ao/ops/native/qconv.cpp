// mq_ao::qcausal_conv1d for PyTorch's CPU dispatch key; the schema is defined in Python.

#include "qconv.h"

#include "last_state.h"
#include "qglue.h"

namespace mq_ao {
namespace {

using Activation = std::optional<c10::string_view>;

bool is_native(
    const Tensor& x, double x_scale, int64_t x_zero_point, const Tensor& weight, const Tensor& weight_scale,
    const OptionalTensor& bias, const OptionalTensor& initial_state, const Activation& activation) {
  if (x.dim() != 3 || weight.dim() != 2 || x.size(1) == 0 || weight.size(1) == 0) return false;
  const int64_t channels = x.size(2);
  return is_byte(x) && is_grid(is_signed(x), x_scale, x_zero_point) && weight.scalar_type() == at::kChar &&
      weight_scale.scalar_type() == at::kFloat && weight_scale.numel() == channels && weight.size(0) == channels &&
      has_shape(bias, {channels}) && has_shape(initial_state, {x.size(0), weight.size(1) - 1, channels}) &&
      (!activation || *activation == "silu");
}

std::tuple<Tensor, Tensor> qcausal_conv1d(
    const Tensor& x, double x_scale, int64_t x_zero_point, const Tensor& weight, const Tensor& weight_scale,
    const OptionalTensor& bias, const OptionalTensor& initial_state, Activation activation,
    std::optional<double> out_scale, int64_t out_zero_point) {
  if (!is_native(x, x_scale, x_zero_point, weight, weight_scale, bias, initial_state, activation) ||
      (out_scale && !is_grid(is_signed(x), *out_scale, out_zero_point)))
    return call_reference<decltype(qcausal_conv1d)>(
        "qcausal_conv1d", x, x_scale, x_zero_point, weight, weight_scale, bias, initial_state, activation, out_scale,
        out_zero_point);
  const Tensor x_ = dense_rows(x), weight_ = weight.contiguous(), scale_ = weight_scale.contiguous();
  const OptionalTensor bias_ = float_contiguous(bias), state = float_contiguous(initial_state);
  const int64_t batch = x.size(0), length = x.size(1), channels = x.size(2), taps = weight.size(1);
  Tensor y = empty(x.sizes(), x.options().dtype(out_scale ? x.scalar_type() : at::kFloat));
  Tensor last_state = StateMemory::take({batch, taps - 1, channels}, x.options().dtype(at::kFloat));
  const QConvInputs in{{batch, length, channels, taps},
                       byte_rows(x_),
                       Grid(is_signed(x), x_scale, x_zero_point),
                       weight_.const_data_ptr<int8_t>(),
                       scale_.const_data_ptr<float>(),
                       data_or_null(bias_),
                       data_or_null(state),
                       activation.has_value()};
  const QOutput out(y.data_ptr(), y.stride(0), y.stride(1), is_signed(x), out_scale, out_zero_point);
  float* last = last_state.data_ptr<float>();
  for_channel_ranges(batch, length, channels, TorchThreads(), [&](const ChannelTask& task) {
    qconv_task(in, task, out, last);
  });
  return {y, last_state};
}

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) { m.impl("qcausal_conv1d", qcausal_conv1d); }

}  // namespace
}  // namespace mq_ao
