// What ExecuTorch's kernels of scans on 8-bit operands share.
#pragma once

#include "operands.h"
#include "qrows.h"
#include "tasks.h"

namespace mq_ao::et {

// An activation as the integer operators take it: 8-bit with its scale and zero point, or float32.
struct Operand {
  const Tensor& values;
  double scale;
  int64_t zero_point;

  Grid grid() const { return is_float(values) ? Grid() : Grid(is_signed(values), scale, zero_point); }
  QRows rows() const {
    return {values.const_data_ptr(), values.strides()[0], values.strides()[1], !is_float(values), grid()};
  }
  bool good(const char* label) const {
    return require(is_float(values) || is_byte(values), label, "be uint8, int8 or float32", values) &&
        require(is_float(values) || is_grid(is_signed(values), scale, zero_point), label,
                "have a positive scale and a zero point of its dtype", values);
  }
};

// B or C as float32 rows: small matrices, which many channels read.
class FloatMatrix {
 public:
  explicit FloatMatrix(const Operand& matrix)
      : matrix_(matrix), copy_(is_float(matrix.values) ? 1 : matrix.values.numel()) {
    if (is_float(matrix.values)) return;
    dequantize(static_cast<const uint8_t*>(matrix.values.const_data_ptr()), matrix.grid(), matrix.values.numel(),
               copy_.get());
  }
  Rows<const float> rows() const {
    const float* data = is_float(matrix_.values) ? matrix_.values.const_data_ptr<float>() : copy_.get();
    return et::rows(data, matrix_.values);
  }

 private:
  const Operand& matrix_;
  Scratch<float> copy_;
};

}  // namespace mq_ao::et
