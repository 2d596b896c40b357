// mq_ao::causal_conv1d and its gradient for PyTorch's CPU dispatch key; the schemas are defined in Python.

#include "conv.h"

#include <ATen/ops/empty_like.h>

#include "glue.h"
#include "last_state.h"

namespace mq_ao {
namespace {

using Activation = std::optional<c10::string_view>;

bool is_native(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_state,
    const Activation& activation) {
  if (x.dim() != 3 || weight.dim() != 2 || !is_native_dtype(x) || x.size(1) == 0 || weight.size(1) == 0) return false;
  const int64_t channels = x.size(2);
  return weight.size(0) == channels && has_shape(bias, {channels}) &&
      has_shape(initial_state, {x.size(0), weight.size(1) - 1, channels}) && (!activation || *activation == "silu");
}

template <typename T>
ConvInputs<T> inputs(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_state, bool silu) {
  return {{x.size(0), x.size(1), x.size(2), weight.size(1)},
          rows<const T>(x),
          weight.const_data_ptr<float>(),
          data_or_null(bias),
          data_or_null(initial_state),
          silu};
}

std::tuple<Tensor, Tensor> causal_conv1d(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_state,
    Activation activation) {
  if (!is_native(x, weight, bias, initial_state, activation))
    return call_reference<decltype(causal_conv1d)>("causal_conv1d", x, weight, bias, initial_state, activation);
  const Tensor x_ = dense_rows(x), weight_ = weight.to(at::kFloat).contiguous();
  const OptionalTensor bias_ = float_contiguous(bias), state = float_contiguous(initial_state);
  const int64_t batch = x.size(0), length = x.size(1), channels = x.size(2), taps = weight.size(1);
  Tensor y = empty(x.sizes(), x.options());
  Tensor last_state = StateMemory::take({batch, taps - 1, channels}, x.options().dtype(at::kFloat));
  const auto run = [&](auto type) {
    using T = decltype(type);
    const ConvInputs<T> in = inputs<T>(x_, weight_, bias_, state, activation.has_value());
    const Rows<T> out = rows<T>(y);
    for_channel_ranges(batch, length, channels, TorchThreads(), [&](const ChannelTask& task) {
      conv_task(in, task, out, last_state.data_ptr<float>());
    });
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(BFloat16{});
  return {y, last_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(
    const Tensor& dy, const Tensor& dlast_state, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& initial_state, Activation activation) {
  if (!is_native(x, weight, bias, initial_state, activation))
    return call_reference<decltype(causal_conv1d_backward)>(
        "causal_conv1d_backward", dy, dlast_state, x, weight, bias, initial_state, activation);
  const Tensor x_ = dense_rows(x), weight_ = weight.to(at::kFloat).contiguous();
  const OptionalTensor bias_ = float_contiguous(bias), state = float_contiguous(initial_state);
  const Tensor grad = dense_rows(dy.to(x.scalar_type())), dlast = dlast_state.to(at::kFloat).contiguous();
  const auto options = x.options().dtype(at::kFloat);
  const int64_t batch = x.size(0), channels = x.size(2), taps = weight.size(1);
  Tensor dx = empty(x.sizes(), x.options());
  Tensor dweight = empty({batch, channels, taps}, options), dbias = empty({batch, channels}, options);
  Tensor dinit = empty({batch, taps - 1, channels}, options);
  const auto run = [&](auto type) {
    using T = decltype(type);
    const ConvInputs<T> in = inputs<T>(x_, weight_, bias_, state, activation.has_value());
    const ConvGradients<T> out{rows<const T>(grad), dlast.const_data_ptr<float>(), rows<T>(dx),
                               dweight.data_ptr<float>(), dbias.data_ptr<float>(), dinit.data_ptr<float>()};
    const int64_t blocks = ceil_div(channels, kLanes);
    at::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
      const Scratch<Vec> memory(4 * taps);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = i % blocks * kLanes;
        const int lanes = int(std::min<int64_t>(kLanes, channels - c));
        for_taps(taps, [&](auto constant) {
          conv_gradient_block<decltype(constant)::value>(in, i / blocks, c, lanes, out, memory.get());
        });
      }
    });
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(BFloat16{});
  const auto like = [&](const Tensor& sum, const OptionalTensor& operand) {
    return operand ? sum.to(operand->scalar_type()) : empty({0}, options);
  };
  return {dx, dweight.sum(0).to(weight.scalar_type()), like(dbias.sum(0), bias), like(dinit, initial_state)};
}

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) {
  m.impl("causal_conv1d", causal_conv1d);
  m.impl("causal_conv1d_backward", causal_conv1d_backward);
}

}  // namespace
}  // namespace mq_ao
