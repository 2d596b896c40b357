// Exact sums of one tile of a linear layer: some rows of activations with up to 64 outputs of one panel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "qgemm_dot.h"
#include "qgemm_wide.h"

namespace mq_ao::qgemm {

// Weights of LANES * 16 outputs from some input on, as they lie in a panel.
struct Weights {
  const int8_t* data;
  int64_t step;  // bytes from 4 inputs to the next 4
  bool nibbles;
  const wide::Operands* wide = nullptr;  // these weights, and all rows of a block from `first_row` on, in 16 bits
  int64_t first_row = 0;
};

// ROWS rows of `depth` inputs, `stride` bytes apart; sums lie kPanel apart. The sums stay in registers throughout.
// `D` is a parameter since only some variants of Dot load nibbles.
template <int ROWS, int LANES, bool NIBBLES, typename D = Dot>
__attribute__((noinline)) void dot_tile(const uint8_t* x, int64_t stride, const int8_t* weights, int64_t step,
                                        int64_t depth, int32_t* sums) {
  // Few rows are bound by memory; hardware prefetchers stop at every page, so look one page ahead.
  constexpr int64_t kAhead = 4096;
  constexpr int kVectors = NIBBLES ? LANES / 2 : LANES;
  const uint8_t* rows[ROWS];
  typename D::Sum sum[ROWS][LANES];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    rows[m] = x + m * stride;
#pragma GCC unroll 4
    for (int v = 0; v < LANES; ++v) sum[m][v] = D::zero();
  }
  for (int64_t k = 0; k < depth; k += 4, weights += step) {
    typename D::Weights b[LANES];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (ROWS <= 4) __builtin_prefetch(weights + 64 * v + kAhead);
      if constexpr (NIBBLES) {
        D::load_nibbles(weights + 64 * v, b + 2 * v);
      } else {
        b[v] = D::load_weights(weights + 64 * v);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const typename D::Activation a = D::load_activation(rows[m] + k);
#pragma GCC unroll 4
      for (int v = 0; v < LANES; ++v) {
        if constexpr (NIBBLES) {
          D::dot_nibbles(sum[m][v], a, b[v]);
        } else {
          D::dot(sum[m][v], a, b[v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < LANES; ++v) D::store(sum[m][v], sums + m * kPanel + v * kLane);
  }
}

// The shift is not in `dot_tile`: GCC would spill inside its loop.
template <int ROWS, int LANES, typename D = Dot>
inline void dot_nibbles(const uint8_t* x, int64_t stride, const int8_t* weights, int64_t step, int64_t depth,
                        int32_t* sums) {
  dot_tile<ROWS, LANES, true>(x, stride, weights, step, depth, sums);
  if constexpr (D::kNibbleShift) {
    for (int i = 0; i < ROWS * kPanel; ++i) sums[i] >>= D::kNibbleShift;
  }
}

template <int ROWS>
inline void dot_lanes(int lanes, const uint8_t* x, int64_t stride, const Weights& w, int64_t depth, int32_t* sums) {
  if constexpr (Dot::kNibbles) {
    if (w.nibbles && lanes > 2) {
      if constexpr (Dot::kSums >= 4 * ROWS) return dot_nibbles<ROWS, 4>(x, stride, w.data, w.step, depth, sums);
      dot_nibbles<ROWS, 2>(x, stride, w.data + 64, w.step, depth, sums + 2 * kLane);
    }
    if (w.nibbles) return dot_nibbles<ROWS, 2>(x, stride, w.data, w.step, depth, sums);
  }
  constexpr int kMost = std::clamp(Dot::kSums / ROWS, 1, 4);
  const int8_t* data = w.data;
  for (; lanes > kMost; lanes -= kMost, data += 4 * kLane * kMost, sums += kLane * kMost) {
    dot_tile<ROWS, kMost, false>(x, stride, data, w.step, depth, sums);
  }
  switch (lanes) {
    case 1: return dot_tile<ROWS, 1, false>(x, stride, data, w.step, depth, sums);
    case 2: return dot_tile<ROWS, std::min(2, kMost), false>(x, stride, data, w.step, depth, sums);
    case 3: return dot_tile<ROWS, std::min(3, kMost), false>(x, stride, data, w.step, depth, sums);
    default: return dot_tile<ROWS, kMost, false>(x, stride, data, w.step, depth, sums);
  }
}

// Any number of rows, as many at once as the registers hold.
inline void dot_rows(int64_t rows, int lanes, const uint8_t* x, int64_t stride, const Weights& w, int64_t depth,
                     int32_t* sums) {
  constexpr int most = Dot::kRows;
  for (; rows > 0; rows -= most, x += most * stride, sums += most * kPanel) {
    switch (rows) {
      case 1: dot_lanes<1>(lanes, x, stride, w, depth, sums); break;
      case 2: dot_lanes<std::min(2, most)>(lanes, x, stride, w, depth, sums); break;
      case 3: dot_lanes<std::min(3, most)>(lanes, x, stride, w, depth, sums); break;
      case 4: dot_lanes<std::min(4, most)>(lanes, x, stride, w, depth, sums); break;
      case 5: dot_lanes<std::min(5, most)>(lanes, x, stride, w, depth, sums); break;
      default: dot_lanes<most>(lanes, x, stride, w, depth, sums); break;
    }
  }
}

}  // namespace mq_ao::qgemm
