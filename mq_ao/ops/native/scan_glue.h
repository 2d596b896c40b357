// What the registrations of the scans share: their operands as tensors.
#pragma once

#include "glue.h"
#include "scan.h"

namespace mq_ao {

struct ScanTensors {
  Tensor u, delta, A, B, C;
  OptionalTensor D, delta_bias;
  bool delta_softplus;
  OptionalTensor initial_state;

  int64_t groups() const { return B.dim() == 4 ? B.size(2) : 1; }

  // Whether the native kernels take these operands. Everything else goes to the reference.
  bool native() const {
    for (const Tensor* t : {&delta, &B, &C})
      if (t->scalar_type() != u.scalar_type()) return false;
    return is_native_dtype(u) && shapes_fit();
  }

  bool shapes_fit() const {
    if (u.dim() != 3 || A.dim() != 2 || (B.dim() != 3 && B.dim() != 4)) return false;
    const auto batch = u.size(0), length = u.size(1), channels = u.size(2), d_state = A.size(1);
    if (length == 0 || d_state == 0 || groups() == 0 || channels % groups() != 0) return false;
    const at::DimVector state_shape{batch, channels, d_state};
    at::DimVector matrix_shape{batch, length, d_state};
    if (B.dim() == 4) matrix_shape = {batch, length, groups(), d_state};
    return delta.sizes() == u.sizes() && A.size(0) == channels && B.sizes() == matrix_shape &&
        C.sizes() == matrix_shape && has_shape(D, {channels}) && has_shape(delta_bias, {channels}) &&
        has_shape(initial_state, state_shape);
  }

  // Copies only what the cores cannot read in place.
  ScanTensors readable() const {
    return {dense_rows(u), dense_rows(delta), A.to(at::kFloat).contiguous(), dense_rows(B), dense_rows(C),
            float_contiguous(D), float_contiguous(delta_bias), delta_softplus, float_contiguous(initial_state)};
  }

  ScanShape shape() const { return {u.size(0), u.size(1), u.size(2), groups(), A.size(1)}; }

  // Of tensors that are `readable`.
  template <typename T>
  ScanInputs<T> inputs() const {
    return {shape(),
            rows<const T>(u),
            rows<const T>(delta),
            rows<const T>(B),
            rows<const T>(C),
            A.const_data_ptr<float>(),
            data_or_null(D),
            data_or_null(delta_bias),
            data_or_null(initial_state),
            delta_softplus};
  }
};

}  // namespace mq_ao
