// What the PyTorch operators on qgemm.h share: checks of their operands, and the way from tensors to the core.
#pragma once

#include "glue.h"
#include "qgemm.h"

namespace mq_ao {

using qgemm::Activations;
using qgemm::Layout;
using qgemm::Linear;
using qgemm::Output;

inline bool is_layout(const Layout& l) {
  return l.n >= 1 && l.k >= 1 && l.k <= qgemm::kMaxInputs && (l.bits == 8 || l.bits == 4) && l.group_size >= 0 &&
         l.group_size % 4 == 0;
}

inline bool is_packed(const Tensor& packed, const Layout& l) {
  return is_layout(l) && packed.scalar_type() == at::kChar && packed.is_contiguous() && packed.numel() == l.bytes();
}

inline bool is_vector(const Tensor& t, int64_t n) {
  return t.scalar_type() == at::kFloat && t.dim() == 1 && t.size(0) == n && t.is_contiguous();
}

inline bool is_scale(const Tensor& t, const Layout& l) {
  if (!l.group_size) return is_vector(t, l.n);
  return t.scalar_type() == at::kFloat && t.dim() == 2 && t.size(1) == l.groups();
}

// The layout that an operator's arguments speak of; one without outputs, which `is_layout` refuses, where they do not.
inline Layout layout_of(const Tensor& x, const Tensor& weight_scale, int64_t bits, int64_t group_size) {
  if (x.dim() == 0 || weight_scale.dim() == 0) return {0, 0};
  return {weight_scale.size(0), x.size(-1), bits, group_size};
}

inline bool is_linear(const Layout& l, const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias) {
  return is_packed(packed, l) && is_scale(weight_scale, l) && (!bias || is_vector(*bias, l.n));
}

inline bool is_zero_point(int64_t value) { return value >= 0 && value <= 255; }

inline bool is_output(std::optional<double> scale, int64_t zero_point) {
  return !scale || (*scale > 0 && is_zero_point(zero_point));
}

// x as (rows, inputs) with adjacent inputs; a view wherever the strides allow one.
inline Tensor as_rows(const Tensor& x) {
  const int64_t k = x.size(-1);
  return dense_rows(x.dim() == 2 ? x : x.reshape({x.numel() / k, k}));
}

// Rows that a thread should at least have where they are only copied or quantized.
inline int64_t row_grain(int64_t k) { return std::max<int64_t>(1, 16384 / k); }

// The rows of uint8 activations with room to read up to `Layout::depth`. `storage` holds what had to be copied.
inline Activations readable_rows(const Tensor& rows, const Layout& l, at::DataPtr* storage) {
  Activations a{rows.const_data_ptr<uint8_t>(), rows.stride(0)};
  if (l.depth() == l.k) return a;
  const int64_t m = rows.size(0), depth = l.depth();
  *storage = Workspace::memory(m * depth);
  auto* bytes = static_cast<uint8_t*>(storage->get());
  at::parallel_for(0, m, row_grain(l.k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(bytes + i * depth, a.data + i * a.stride, l.k);
  });
  a.data = bytes;
  a.stride = depth;
  return a;
}

// y (..., n) of activations whose rows are `a` and whose shape is that of `x`.
inline Tensor multiply(const Tensor& x, const Activations& a, const Layout& l, const Tensor& packed,
                       const Tensor& weight_scale, const OptionalTensor& bias, std::optional<double> out_scale,
                       int64_t out_zero_point) {
  at::DimVector sizes(x.sizes());
  sizes.back() = l.n;
  Tensor y = empty(sizes, x.options().dtype(out_scale ? at::kByte : at::kFloat));
  Output out{y.mutable_data_ptr()};
  if (out_scale) {
    out = {out.data, true, static_cast<float>(1.0 / *out_scale), static_cast<int32_t>(out_zero_point)};
  }
  // Scales of groups are wanted group by group, which costs nothing where they are stored so.
  const Tensor scale = l.group_size ? weight_scale.t().contiguous() : weight_scale;
  const Linear w{l, packed.const_data_ptr<int8_t>(), scale.const_data_ptr<float>(), data_or_null(bias)};
  const int64_t m = x.numel() / l.k;
  const qgemm::Plan plan = qgemm::plan(m, l, at::get_num_threads(), a.planes);
  at::parallel_for(0, plan.parts(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) qgemm::run_part(a, w, out, m, plan, part);
  });
  return y;
}

// Calls task(row index, pointer to the row) for all rows of float32 or bfloat16, in parallel.
template <typename Task>
void for_rows(const Tensor& rows, Task&& task) {
  const auto run = [&](const auto* data) {
    at::parallel_for(0, rows.size(0), row_grain(rows.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(i, data + i * rows.stride(0));
    });
  };
  if (rows.scalar_type() == at::kFloat) {
    run(rows.const_data_ptr<float>());
  } else {
    run(reinterpret_cast<const BFloat16*>(rows.const_data_ptr<at::BFloat16>()));
  }
}

}  // namespace mq_ao
