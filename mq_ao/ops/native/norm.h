// The residual sum, RMSNorm and quantization, row by row: the portable core, without torch types.
//
//   t = x + residual,   y = t / sqrt(mean(t^2) + eps) * weight,   q = quantized y
// A row stays in the first-level cache from the sum to the integers.
#pragma once

#include "gate.h"

namespace mq_ao::norm {

struct Norm {
  const float* x;
  int64_t stride;         // from row to row
  const float* residual;  // null: none
  int64_t residual_stride;
  const float* weight;  // (n), or null for ones
  float eps;
  int64_t n;
  float* total;  // (rows, n), where there is a residual

  // One row as floats.
  void run(int64_t row, float* y) const {
    const float *from = x + row * stride, *more = residual ? residual + row * residual_stride : nullptr;
    Vec squares{};
    for_vectors(n, [&](int64_t i, auto lanes) {
      Vec v = load(from + i, lanes);
      if (more) {
        v += load(more + i, lanes);
        store(v, total + row * n + i, lanes);
      }
      store(v, y + i, lanes);
      squares = multiply_add(v, v, squares);
    });
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += squares[i];
    const float factor = 1.0f / std::sqrt(sum / float(n) + eps);
    for_vectors(n, [&](int64_t i, auto lanes) {
      const Vec v = load(y + i, lanes) * factor;
      store(weight ? v * load(weight + i, lanes) : v, y + i, lanes);
    });
  }
};

}  // namespace mq_ao::norm
