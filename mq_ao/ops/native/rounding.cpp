// mq_ao::round_tile for PyTorch's CPU dispatch key; its schema is defined in Python.

#include "rounding.h"

#include "glue.h"

namespace mq_ao {
namespace {

rounding::Matrix matrix(const Tensor& t) { return {t.const_data_ptr<double>(), t.stride(0)}; }

std::tuple<Tensor, Tensor> round_tile(
    const Tensor& weight, const Tensor& scale, const Tensor& owed, const Tensor& inputs, const Tensor& outputs,
    int64_t low, int64_t high) {
  const auto is = [](const Tensor& t, int64_t rows, int64_t columns) {
    return t.scalar_type() == at::kDouble && t.sizes() == at::IntArrayRef({rows, columns});
  };
  const int64_t h = weight.dim() == 2 ? weight.size(0) : 0, w = weight.dim() == 2 ? weight.size(1) : 0;
  const bool fits = weight.dim() == 2 && is(weight, h, w) && is(scale, h, w) && is(owed, h, w) && is(inputs, w, w) &&
      is(outputs, h, h) && low <= high;
  if (!fits)
    return call_reference<decltype(round_tile)>("round_tile", weight, scale, owed, inputs, outputs, low, high);
  const Tensor values = at::empty({h, w}, weight.options()), errors = at::empty({h, w}, weight.options());
  if (values.numel() == 0) return {values, errors};
  const Tensor off = at::empty({h, w}, weight.options());
  const Tensor weight_ = dense_rows(weight), scale_ = dense_rows(scale), owed_ = dense_rows(owed),
               inputs_ = dense_rows(inputs), outputs_ = dense_rows(outputs);
  rounding::Tile{h, w, matrix(weight_), matrix(scale_), matrix(owed_), matrix(inputs_), matrix(outputs_), double(low),
                 double(high)}
      .run(values.mutable_data_ptr<double>(), errors.mutable_data_ptr<double>(), off.mutable_data_ptr<double>());
  return {values, errors};
}

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) { m.impl("round_tile", round_tile); }

}  // namespace
}  // namespace mq_ao
