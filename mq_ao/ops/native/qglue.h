// What the PyTorch registrations on 8-bit operands share.
#pragma once

#include "glue.h"
#include "qrows.h"

namespace mq_ao {

inline bool is_signed(const Tensor& t) { return t.scalar_type() == at::kChar; }
inline bool is_byte(const Tensor& t) { return t.scalar_type() == at::kByte || is_signed(t); }

// As `rows`, for uint8 and int8, which cores take for uint8.
inline Rows<const uint8_t> byte_rows(const Tensor& t) {
  return {static_cast<const uint8_t*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.dim() == 4 ? t.stride(2) : 0};
}

// An activation as the scans take it: 8-bit with its scale and zero point, or float32.
struct Operand {
  Tensor values;
  double scale;
  int64_t zero_point;

  bool integer() const { return is_byte(values); }
  bool native() const {
    return integer() ? is_grid(is_signed(values), scale, zero_point) : values.scalar_type() == at::kFloat;
  }
  Grid grid() const { return Grid(is_signed(values), scale, zero_point); }
};

inline QRows channel_rows(const Operand& x) {
  const Tensor& t = x.values;
  return {t.const_data_ptr(), t.stride(0), t.stride(1), x.integer(), x.grid()};
}

// B or C as float32. They are small, and many channels read them.
inline Tensor float_matrix(const Tensor& dense, const Operand& given) {
  if (!given.integer()) return dense;
  const Tensor values = empty(dense.sizes(), dense.options().dtype(at::kFloat));
  const Rows<const uint8_t> from = byte_rows(dense);
  const Rows<float> to = rows<float>(values);
  const int64_t groups = dense.dim() == 4 ? dense.size(2) : 1, d_state = dense.size(-1);
  for (int64_t b = 0; b < dense.size(0); ++b)
    for (int64_t t = 0; t < dense.size(1); ++t)
      for (int64_t g = 0; g < groups; ++g) dequantize(from.at(b, t, g), given.grid(), d_state, to.at(b, t, g));
  return values;
}

}  // namespace mq_ao
