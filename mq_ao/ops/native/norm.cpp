// mq_ao::qrms_norm, mq_ao::qgated_norm and mq_ao::quantize_per_tensor for PyTorch's CPU dispatch key; the schemas
// are defined in Python.

#include "norm.h"

#include "glue.h"

namespace mq_ao {
namespace {

bool is_byte_point(int64_t zero_point) { return zero_point >= 0 && zero_point <= 255; }

bool is_grid(const std::optional<double>& scale, int64_t zero_point) {
  return !scale || (*scale > 0 && is_byte_point(zero_point));
}

bool is_weight(const OptionalTensor& weight, int64_t n) {
  return !weight || (weight->scalar_type() == at::kFloat && has_shape(weight, {n}));
}

// Rows of the shape of `like` in 8 bits: all by one scale, or each by itself.
struct QuantizedRows {
  const int64_t n;
  const qgemm::TokenGrid grid;
  const bool one_scale;
  const Tensor q, scale;
  uint8_t* const bytes;
  float* const scales;
  const qgemm::Requantizer requantize;

  QuantizedRows(const Tensor& like, const std::optional<double>& out_scale, int64_t zero_point,
                const qgemm::TokenGrid& grid)
      : n(like.size(-1)),
        grid(grid),
        one_scale(out_scale.has_value()),
        q(empty(like.sizes(), like.options().dtype(at::kByte))),
        scale(empty(one_scale ? at::DimVector{0} : of_each(like, grid.scales(n)), like.options())),
        bytes(q.mutable_data_ptr<uint8_t>()),
        scales(scale.mutable_data_ptr<float>()),
        requantize({bytes, true, float(1.0 / out_scale.value_or(1.0)), int32_t(zero_point)}) {}

  void take(int64_t row, const float* values) const {
    if (one_scale)
      gate::quantize_row(values, n, requantize, bytes + row * n);
    else
      grid.quantize(values, n, bytes + row * n, scales + row * grid.scales(n));
  }

  static at::DimVector of_each(const Tensor& like, int64_t count) {
    at::DimVector sizes(like.sizes());
    sizes.back() = count;
    return sizes;
  }
};

std::tuple<Tensor, Tensor, Tensor> qrms_norm(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, double eps,
    std::optional<double> out_scale, int64_t out_zero_point, int64_t bits, int64_t group_size) {
  const qgemm::TokenGrid grid{bits, group_size};
  const bool fits = x.dim() > 0 && x.size(-1) > 0 && x.scalar_type() == at::kFloat &&
      (!residual || (residual->scalar_type() == at::kFloat && residual->sizes() == x.sizes())) &&
      is_weight(weight, x.size(-1)) && is_grid(out_scale, out_zero_point) && grid.fits(x.size(-1));
  if (!fits)
    return call_reference<decltype(qrms_norm)>("qrms_norm", x, residual, weight, eps, out_scale, out_zero_point, bits,
                                               group_size);
  const int64_t n = x.size(-1);
  const Tensor rows = dense_rows(x.reshape({-1, n})), more = residual ? dense_rows(residual->reshape({-1, n})) : Tensor();
  const OptionalTensor weight_ = float_contiguous(weight);
  const QuantizedRows out(x, out_scale, out_zero_point, grid);
  const Tensor total = empty(residual ? x.sizes() : at::IntArrayRef({0}), x.options());
  const norm::Norm given{rows.const_data_ptr<float>(),
                         rows.stride(0),
                         residual ? more.const_data_ptr<float>() : nullptr,
                         residual ? more.stride(0) : 0,
                         data_or_null(weight_),
                         float(eps),
                         n,
                         total.mutable_data_ptr<float>()};
  for_row_ranges(rows.size(0), n, 16384, TorchThreads(), [&](int64_t begin, int64_t end) {
    const Scratch<float> row(n);
    for (int64_t i = begin; i < end; ++i) {
      given.run(i, row.get());
      out.take(i, row.get());
    }
  });
  return {out.q, out.scale, total};
}

std::tuple<Tensor, Tensor> qgated_norm(const Tensor& y, const Tensor& z, const OptionalTensor& weight, double eps,
                                       bool hadamard, std::optional<double> out_scale, int64_t out_zero_point,
                                       int64_t bits, int64_t group_size) {
  const qgemm::TokenGrid grid{bits, group_size};
  const bool fits = y.dim() > 0 && y.size(-1) > 0 && y.scalar_type() == at::kFloat && z.scalar_type() == at::kFloat &&
      y.sizes() == z.sizes() && is_weight(weight, y.size(-1)) && is_grid(out_scale, out_zero_point) &&
      grid.fits(y.size(-1)) &&
      (!hadamard || hadamard::find_plan(y.size(-1)));
  if (!fits) {
    return call_reference<decltype(qgated_norm)>("qgated_norm", y, z, weight, eps, hadamard, out_scale,
                                                 out_zero_point, bits, group_size);
  }
  const int64_t n = y.size(-1);
  const Tensor y_rows = dense_rows(y.reshape({-1, n})), z_rows = dense_rows(z.reshape({-1, n}));
  const OptionalTensor weight_ = float_contiguous(weight);
  const hadamard::Plan* plan = hadamard ? hadamard::find_plan(n) : nullptr;
  const QuantizedRows out(y, out_scale, out_zero_point, grid);
  const gate::Gate<float, float> gated{{y_rows.const_data_ptr<float>(), y_rows.stride(0), 1.0f, 0.0f},
                                       {z_rows.const_data_ptr<float>(), z_rows.stride(0), 1.0f, 0.0f},
                                       nullptr, n, nullptr};
  gate::for_ranges(y_rows.size(0), n, TorchThreads(), [&](int64_t begin, int64_t end) {
    const Scratch<float> row(n), work(plan ? plan->work_size() : 0);
    const norm::Norm given{row.get(), 0, nullptr, 0, data_or_null(weight_), float(eps), n, nullptr};
    for (int64_t i = begin; i < end; ++i) {
      gated.run(i, row.get(), nullptr);
      given.run(0, row.get());
      if (plan) hadamard::rotate(*plan, row.get(), work.get());
      out.take(i, row.get());
    }
  });
  return {out.q, out.scale};
}

// How many of the last values lie side by side, where not all do: parts of wider rows need not be copied.
int64_t adjacent(const Tensor& x) {
  int64_t n = 1;
  for (int64_t d = x.dim() - 1; d >= 0 && (x.size(d) == 1 || x.stride(d) == n); --d) n *= x.size(d);
  return n;
}

Tensor quantize_per_tensor(const Tensor& x, double out_scale, int64_t out_zero_point) {
  if (x.scalar_type() != at::kFloat || !(out_scale > 0) || !is_byte_point(out_zero_point))
    return call_reference<decltype(quantize_per_tensor)>("quantize_per_tensor", x, out_scale, out_zero_point);
  const Tensor q = empty(x.sizes(), x.options().dtype(at::kByte));
  if (x.numel() == 0) return q;
  const int64_t last = x.dim() ? x.size(-1) : 1, n = x.is_contiguous() ? last : std::max(last, adjacent(x));
  const Tensor rows = dense_rows(x.reshape({-1, n}));
  uint8_t* bytes = q.mutable_data_ptr<uint8_t>();
  const qgemm::Requantizer requantize({bytes, true, float(1.0 / out_scale), int32_t(out_zero_point)});
  for_row_ranges(rows.size(0), n, 16384, TorchThreads(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      gate::quantize_row(rows.const_data_ptr<float>() + i * rows.stride(0), n, requantize, bytes + i * n);
  });
  return q;
}

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) {
  m.impl("qrms_norm", qrms_norm);
  m.impl("qgated_norm", qgated_norm);
  m.impl("quantize_per_tensor", quantize_per_tensor);
}

}  // namespace
}  // namespace mq_ao
