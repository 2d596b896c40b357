// What the registrations of the scans of Mamba-2 share: their operands as tensors.
#pragma once

#include <limits>

#include "glue.h"
#include "ssd.h"

namespace mq_ao {

struct SsdTensors {
  Tensor x, dt, A, B, C;
  OptionalTensor D, dt_bias;
  bool dt_softplus;
  double dt_min;
  std::optional<double> dt_max;
  OptionalTensor initial_state, seq_idx;

  double highest() const { return dt_max.value_or(std::numeric_limits<double>::infinity()); }

  // Whether the native kernels take these operands. Everything else goes to the reference.
  bool native() const {
    for (const Tensor* t : {&dt, &B, &C})
      if (t->scalar_type() != x.scalar_type()) return false;
    return is_native_dtype(x) && fit();
  }

  bool fit() const {
    if (x.dim() != 4 || B.dim() != 4 || x.numel() == 0 || B.numel() == 0) return false;
    const int64_t batch = x.size(0), length = x.size(1), heads = x.size(2), headdim = x.size(3);
    if (heads % B.size(2) != 0 || !(dt_min <= highest())) return false;
    if (seq_idx && !c10::isIntegralType(seq_idx->scalar_type(), true)) return false;
    if (initial_state && !initial_state->is_floating_point()) return false;
    return dt.sizes() == at::DimVector{batch, length, heads} && A.sizes() == at::DimVector{heads} &&
           B.sizes() == at::DimVector{batch, length, B.size(2), B.size(3)} && C.sizes() == B.sizes() &&
           (has_shape(D, {heads}) || has_shape(D, {heads, headdim})) && has_shape(dt_bias, {heads}) &&
           has_shape(initial_state, {batch, heads, headdim, B.size(3)}) && has_shape(seq_idx, {batch, length});
  }

  // Copies only what the core cannot read in place. x becomes (batch, length, heads * headdim).
  SsdTensors readable() const {
    const OptionalTensor index = seq_idx ? OptionalTensor(seq_idx->to(at::kLong).contiguous()) : seq_idx;
    return {dense_rows(x.flatten(2)), dense_rows(dt), A.to(at::kFloat).contiguous(), dense_rows(B), dense_rows(C),
            float_contiguous(D), float_contiguous(dt_bias), dt_softplus, dt_min, dt_max,
            float_contiguous(initial_state), index};
  }

  SsdShape shape() const {
    const int64_t heads = A.size(0);
    return {dt.size(0), dt.size(1), heads, x.numel() / dt.numel(), B.size(2), B.size(3)};
  }

  // Of tensors that are `readable`; rows of x and dt as the core's.
  template <typename T, typename Source>
  SsdOperands<Source, T> operands(const Source& x_rows, const Source& dt_rows) const {
    return {shape(),
            x_rows,
            dt_rows,
            rows<const T>(B),
            rows<const T>(C),
            A.const_data_ptr<float>(),
            data_or_null(D),
            data_or_null(dt_bias),
            data_or_null(initial_state),
            seq_idx ? seq_idx->const_data_ptr<int64_t>() : nullptr,
            D && D->dim() == 2,
            dt_softplus,
            float(dt_min),
            float(highest())};
  }
};

}  // namespace mq_ao
