// Integer matrix product y = (x - zero point) w^T for linear layers: unsigned 8-bit activations, signed 8-bit weights,
// exact 32-bit sums, float32 epilogue. No torch types and no threads: the caller hands out the parts of a `Plan`.
//
// One packed copy of the weights (N outputs, K inputs) serves one row and thousands. Outputs are padded with zeros to a
// multiple of 16, inputs to a multiple of 4, and cut into panels of 64 outputs (the last may be narrower):
//   a panel is [K4 / 4][width][4] bytes, so that 4 consecutive inputs of 16 outputs are one 64-byte vector;
//   after the last panel: the int32 sum of each padded output's weights, which the zero point needs.
// A tile of the output (6 rows of 64 columns with AVX-512) stays in registers over all of K. There is no blocking over
// K: a panel of 5120 inputs still fits the second-level cache.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "qgemm_dot.h"
#include "vec.h"

namespace mq_ao::qgemm {

inline constexpr int64_t kPanel = 64;
// Sums of so many products of 8-bit numbers (255 * 128 * K) fit in 32 bits.
inline constexpr int64_t kMaxInputs = 65536;

inline int64_t padded_inputs(int64_t k) { return (k + 3) / 4 * 4; }
inline int64_t padded_outputs(int64_t n) { return (n + kLane - 1) / kLane * kLane; }
inline int64_t packed_bytes(int64_t n, int64_t k) { return padded_outputs(n) * (padded_inputs(k) + 4); }

// Where the weight of output `row` and input `column` lies in the packed bytes.
inline int64_t packed_offset(int64_t n, int64_t k, int64_t row, int64_t column) {
  const int64_t first = row / kPanel * kPanel;
  const int64_t width = std::min(kPanel, padded_outputs(n) - first);
  return first * padded_inputs(k) + (column / 4 * width + row - first) * 4 + column % 4;
}

inline void pack(const int8_t* weight, int64_t n, int64_t k, int8_t* packed) {
  std::memset(packed, 0, packed_bytes(n, k));
  int8_t* sums = packed + padded_outputs(n) * padded_inputs(k);
  for (int64_t row = 0; row < n; ++row) {
    int32_t sum = 0;
    for (int64_t column = 0; column < k; ++column) {
      const int8_t value = weight[row * k + column];
      packed[packed_offset(n, k, row, column)] = value;
      sum += value;
    }
    std::memcpy(sums + 4 * row, &sum, sizeof sum);
  }
}

inline void unpack(const int8_t* packed, int64_t n, int64_t k, int8_t* weight) {
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t column = 0; column < k; ++column) {
      weight[row * k + column] = packed[packed_offset(n, k, row, column)];
    }
  }
}

struct Activations {
  const uint8_t* data;  // every row readable up to padded_inputs(k) bytes; the padding may hold anything
  int64_t stride;       // bytes from row to row
  const float* scale;   // scale[row * scale_step]
  int64_t scale_step;   // 0: one scale for all rows; 1: one for each row
  int32_t zero_point;
};

struct Linear {
  const int8_t* packed;
  int64_t n, k;
  const float* scale;  // (n)
  const float* bias;   // (n), or null
};

// Contiguous rows of n values: float32, or uint8 where `requantize` is set.
struct Output {
  void* data;
  bool requantize = false;
  float inverse_scale = 1.0f;
  int32_t zero_point = 0;
};

// A value the optimiser knows nothing of. Keeps a product from being fused with the addition that uses it, and a
// division from becoming a product, so that results equal the PyTorch reference bit for bit whatever the flags.
template <typename T>
inline T pinned(T value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__SSE2__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  volatile T copy = value;
  value = copy;
#endif
  return value;
}

// 32-bit values in a vector; divides kLane.
inline constexpr int kWidth = mq_ao::kLanes;
typedef uint8_t ByteVec __attribute__((vector_size(kWidth)));

// What `Output` says, as vectors.
struct Requantizer {
  Vec inverse_scale, low, high;
  IntVec zero_point;

  explicit Requantizer(const Output& out)
      : inverse_scale(broadcast(out.inverse_scale)),
        low(broadcast(static_cast<float>(-out.zero_point))),
        high(broadcast(static_cast<float>(255 - out.zero_point))),
        zero_point(IntVec{} + out.zero_point) {}

  ByteVec operator()(Vec y) const {
    y = pinned(y * inverse_scale);
    // The bounds are integers, so that clamping may come before rounding; NaN becomes `low`.
    y = y > low ? y : low;
    y = y < high ? y : high;
    // Rounds half to even: a float of 1.5 * 2^23 has no bits for a fraction.
    const Vec rounded = pinned(y + 12582912.0f) - 12582912.0f;
    return __builtin_convertvector(__builtin_convertvector(rounded, IntVec) + zero_point, ByteVec);
  }
};

// Writes ROWS rows of LANES groups of outputs from their exact sums, which lie kPanel apart from row to row.
// `quantize` makes of a Vec what is stored.
template <int ROWS, int LANES, typename Value, typename Quantize>
inline void finish_tile(const int32_t* sums, const Activations& x, const Linear& w, Value* out, int64_t row,
                        int64_t column, Quantize quantize) {
  constexpr int kVectors = LANES * kLane / kWidth;
  const int8_t* weight_sums = w.packed + padded_outputs(w.n) * padded_inputs(w.k);
  IntVec correction[kVectors];
  Vec scale[kVectors], bias[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const int64_t n = column + v * kWidth;
    const int count = static_cast<int>(std::clamp<int64_t>(w.n - n, 0, kWidth));
    std::memcpy(&correction[v], weight_sums + 4 * n, sizeof correction[v]);
    correction[v] *= x.zero_point - Dot::kOffset;
    scale[v] = load(w.scale + n, count);
    bias[v] = w.bias ? load(w.bias + n, count) : Vec{};
  }
  float row_scale[ROWS];
  for (int m = 0; m < ROWS; ++m) row_scale[m] = x.scale[(row + m) * x.scale_step];
  // The last columns may not all exist: those rows are made here and copied.
  Value spare[LANES * kLane];
  const int64_t stride = w.n, count = std::min<int64_t>(LANES * kLane, w.n - column);
  const bool whole = count == LANES * kLane;
  out += row * stride + column;
  for (int m = 0; m < ROWS; ++m, out += stride) {
    Value* to = whole ? out : spare;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      IntVec sum;
      std::memcpy(&sum, sums + m * kPanel + v * kWidth, sizeof sum);
      const Vec product = __builtin_convertvector(sum - correction[v], Vec) * pinned(scale[v] * row_scale[m]);
      const auto y = quantize(pinned(product) + bias[v]);
      std::memcpy(to + v * kWidth, &y, sizeof y);
    }
    if (!whole) std::memcpy(out, spare, count * sizeof(Value));
  }
}

// A tile of ROWS rows from `row` and LANES groups of 16 columns from `column`, all of one panel.
template <int ROWS, int LANES>
inline void tile(const Activations& x, const Linear& w, const Output& out, int64_t row, int64_t column) {
  // Few rows are bound by memory; hardware prefetchers stop at every page, so look one page ahead.
  constexpr int64_t kAhead = 4096;
  const int64_t depth = padded_inputs(w.k), first = column / kPanel * kPanel;
  const int64_t step = 4 * std::min(kPanel, padded_outputs(w.n) - first);
  const int8_t* weights = w.packed + first * depth + (column - first) * 4;
  const uint8_t* rows[ROWS];
  typename Dot::Sum sum[ROWS][LANES];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    rows[m] = x.data + (row + m) * x.stride;
#pragma GCC unroll 4
    for (int v = 0; v < LANES; ++v) sum[m][v] = Dot::zero();
  }
  for (int64_t k = 0; k < depth; k += 4, weights += step) {
    typename Dot::Weights b[LANES];
#pragma GCC unroll 4
    for (int v = 0; v < LANES; ++v) {
      if (ROWS <= 4) __builtin_prefetch(weights + 64 * v + kAhead);
      b[v] = Dot::load_weights(weights + 64 * v);
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const typename Dot::Activation a = Dot::load_activation(rows[m] + k);
#pragma GCC unroll 4
      for (int v = 0; v < LANES; ++v) Dot::dot(sum[m][v], a, b[v]);
    }
  }
  // Through memory: with the epilogue on these registers, GCC spills inside the loop above.
  alignas(64) int32_t sums[ROWS * kPanel];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < LANES; ++v) Dot::store(sum[m][v], sums + m * kPanel + v * kLane);
  }
  if (out.requantize) {
    finish_tile<ROWS, LANES>(sums, x, w, static_cast<uint8_t*>(out.data), row, column, Requantizer(out));
  } else {
    finish_tile<ROWS, LANES>(sums, x, w, static_cast<float*>(out.data), row, column, [](Vec y) { return y; });
  }
}

template <int ROWS>
inline void tile_of(int lanes, const Activations& x, const Linear& w, const Output& out, int64_t row, int64_t column) {
  if constexpr (Dot::kLanes == 4) {
    if (lanes == 4) return tile<ROWS, 4>(x, w, out, row, column);
    if (lanes == 3) return tile<ROWS, 3>(x, w, out, row, column);
    if (lanes == 2) return tile<ROWS, 2>(x, w, out, row, column);
  }
  tile<ROWS, 1>(x, w, out, row, column);
}

// Columns [column, end) of one panel for rows [row, row_end), at most Dot::kRows of them.
inline void strip(const Activations& x, const Linear& w, const Output& out, int64_t row, int64_t row_end,
                  int64_t column, int64_t end) {
  constexpr int most = Dot::kRows;
  for (; column < end; column += kLane * Dot::kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(Dot::kLanes, (end - column + kLane - 1) / kLane));
    switch (row_end - row) {
      case 1: tile_of<1>(lanes, x, w, out, row, column); break;
      case 2: tile_of<std::min(2, most)>(lanes, x, w, out, row, column); break;
      case 3: tile_of<std::min(3, most)>(lanes, x, w, out, row, column); break;
      case 4: tile_of<std::min(4, most)>(lanes, x, w, out, row, column); break;
      case 5: tile_of<std::min(5, most)>(lanes, x, w, out, row, column); break;
      default: tile_of<most>(lanes, x, w, out, row, column); break;
    }
  }
}

// Start of part `i` of `parts` equal parts of [begin, end).
inline int64_t cut(int64_t begin, int64_t end, int64_t i, int64_t parts) { return begin + (end - begin) * i / parts; }

// Rows [row, row_end) of columns [column, column_end); `column` is a multiple of kLane.
inline void block(const Activations& x, const Linear& w, const Output& out, int64_t row, int64_t row_end,
                  int64_t column, int64_t column_end) {
  // So many activations stay in the second-level cache while the panels pass.
  const int64_t most = std::max<int64_t>(4 * Dot::kRows, (256 << 10) / padded_inputs(w.k));
  const int64_t blocks = (row_end - row + most - 1) / most;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = cut(row, row_end, i, blocks), end = cut(row, row_end, i + 1, blocks);
    const int64_t groups = (end - begin + Dot::kRows - 1) / Dot::kRows;
    for (int64_t n = column; n < column_end;) {
      const int64_t panel_end = std::min(column_end, (n / kPanel + 1) * kPanel);
      for (int64_t g = 0; g < groups; ++g) {
        strip(x, w, out, cut(begin, end, g, groups), cut(begin, end, g + 1, groups), n, panel_end);
      }
      n = panel_end;
    }
  }
}

// A grid of parts of about equal cost: `rows` times `columns` of them.
struct Plan {
  int64_t rows = 1, columns = 1;
  int64_t parts() const { return rows * columns; }
};

// Nanoseconds on one core: weights come from memory at some 40 GB/s, rows cost some 0.5 T products a second.
inline double cost(int64_t m, int64_t n, int64_t k) {
  return static_cast<double>(n) * static_cast<double>(k) * (1.0 / 40 + static_cast<double>(m) / 500);
}

inline Plan plan(int64_t m, int64_t n, int64_t k, int64_t threads) {
  // Waking a thread costs a microsecond or two; it should have as much to do.
  threads = std::clamp<int64_t>(static_cast<int64_t>(cost(m, n, k) / 2000), 1, threads);
  const int64_t groups = (m + Dot::kRows - 1) / Dot::kRows, lanes = padded_outputs(n) / kLane;
  Plan best;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t rows = std::min(threads, std::max<int64_t>(groups, 1)); rows >= 1; --rows) {
    const int64_t columns = std::min(lanes, threads / rows);
    const double part = cost((groups + rows - 1) / rows * Dot::kRows, (lanes + columns - 1) / columns * kLane, k);
    // Whole rows of output are kinder to what reads them next, and worth a few per cent.
    if (part < 0.97 * least) {
      least = part;
      best = {rows, columns};
    }
  }
  return best;
}

inline void run_part(const Activations& x, const Linear& w, const Output& out, int64_t m, const Plan& plan,
                     int64_t part) {
  const int64_t r = part / plan.columns, c = part % plan.columns, lanes = padded_outputs(w.n) / kLane;
  block(x, w, out, cut(0, m, r, plan.rows), cut(0, m, r + 1, plan.rows), kLane * cut(0, lanes, c, plan.columns),
        std::min(w.n, kLane * cut(0, lanes, c + 1, plan.columns)));
}

inline constexpr int32_t kTokenZeroPoint = 128;

// Quantizes one token: scale = max|x| / 127, at least the smallest normal float; q = round half even(x * (1 / scale)),
// stored with zero point 128. A row with NaN or infinity gets scale NaN. `Value`: float or BFloat16.
template <typename Value>
inline float quantize_token(const Value* x, int64_t k, uint8_t* q) {
  std::memset(q + k, 0, padded_inputs(k) - k);
  // As integers, the bits of non-negative floats have the floats' order, with infinity and then NaN on top.
  int32_t top = 0;
  for (int64_t i = 0; i < k; ++i) top = std::max(top, bit_cast<int32_t>(to_float(x[i])) & 0x7fffffff);
  if (top >= 0x7f800000) {
    std::memset(q, kTokenZeroPoint, k);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::max(bit_cast<float>(top) / pinned(127.0f), FLT_MIN);
  const float inverse = 1.0f / pinned(scale);
  // |x * inverse| is at most 127 and a few ulp, so that no clamp is needed.
  for (int64_t i = 0; i < k; ++i) {
    q[i] = static_cast<uint8_t>(static_cast<int32_t>(std::rint(to_float(x[i]) * inverse)) + kTokenZeroPoint);
  }
  return scale;
}

}  // namespace mq_ao::qgemm
