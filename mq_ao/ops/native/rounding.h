// Greedy rounding with feedback along both axes of a tile: the portable core, without torch types.
//
//   w'_rc = w_rc - sum over r' < r of outputs_r'r (o_r'c + e_r'c) - o_rc,   q_rc = round(w'_rc / s_rc),
//   e_rc = w'_rc - q_rc s_rc,   o_rc = owed_rc + sum over c' < c of e_rc' inputs_c'c
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace mq_ao::rounding {

// A matrix whose rows are dense.
struct Matrix {
  const double* data;
  int64_t stride;
  const double* operator[](int64_t row) const { return data + row * stride; }
};

struct Tile {
  int64_t height, width;
  Matrix weight, scale, owed;  // (height, width)
  Matrix inputs;               // (width, width), read above the diagonal
  Matrix outputs;              // (height, height), likewise
  double low, high;

  // `values` and `errors` are (height, width); so is `off`, which holds o + e of the rows that are done.
  void run(double* values, double* errors, double* off) const {
    for (int64_t r = 0; r < height; ++r) {
      double *left = values + r * width, *error = errors + r * width, *owing = off + r * width;
      std::copy_n(weight[r], width, left);
      std::copy_n(owed[r], width, owing);
      for (int64_t above = 0; above < r; ++above) {
        const double *other = off + above * width, factor = outputs[above][r];
        for (int64_t c = 0; c < width; ++c) left[c] -= factor * other[c];
      }
      const double* step = scale[r];
      for (int64_t c = 0; c < width; ++c) {
        const double wanted = left[c] - owing[c], *asks = inputs[c];
        left[c] = std::min(std::max(std::nearbyint(wanted / step[c]), low), high);
        const double rest = error[c] = wanted - left[c] * step[c];
        for (int64_t later = c + 1; later < width; ++later) owing[later] += rest * asks[later];
      }
      for (int64_t c = 0; c < width; ++c) owing[c] += error[c];
    }
  }
};

}  // namespace mq_ao::rounding
