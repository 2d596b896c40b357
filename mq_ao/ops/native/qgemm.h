// Integer matrix product for linear layers: activations of unsigned bytes, signed weights of 8 or 4 bits, exact 32-bit
// sums, float32 epilogue. No torch types and no threads: the caller hands out the parts of a `Plan`.
//
// A tile of the output (6 rows of 64 columns with AVX-512, 32 with AMX, 6 of 16 with AVX2) stays in registers over all
// inputs, or over one group of them where groups have scales of their own. There is no other blocking over inputs: a
// panel of 5120 inputs still fits the second-level cache. For few rows, weights of 4 bits are taken apart in registers;
// for many, and by instruction sets without that kernel, a panel is expanded to bytes once, and used while it is in the
// cache. With AVX2 alone, bytes of many rows are multiplied in 16 bits (qgemm_wide.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>

#include "pinned.h"
#include "qgemm_amx.h"
#include "qgemm_tile.h"
#include "quantize_rows.h"
#include "vec.h"

namespace mq_ao::qgemm {

// Rows of activations. Each consists of `planes` rows of bytes:
//   1: bytes that stand for (byte - zero_point);
//   3: the lowest, middle and highest bytes of 24-bit numbers whose zero point is 2^23.
struct Activations {
  const uint8_t* data;           // every row of bytes readable up to padded_inputs(k), whatever lies there
  int64_t stride;                // from one row of bytes to the next
  const float* scale = nullptr;  // of the highest plane: scale[row * scale_step + group * group_step]
  int64_t scale_step = 0;        // 0: one scale for all rows; else from one row's to the next
  int32_t zero_point = 0;        // of the highest plane; the others have 0
  int64_t planes = 1;
  int64_t group_step = 0;        // 0: one scale for a row; 1: one for each group of the weights
};

struct Linear {
  Layout layout;
  const int8_t* packed;
  const float* scale;  // (groups, n)
  const float* bias;   // (n), or null
};

// Contiguous rows of n values: float32, or uint8 where `requantize` is set.
struct Output {
  void* data;
  bool requantize = false;
  float inverse_scale = 1.0f;
  int32_t zero_point = 0;
};

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

// What is left to do with the sums of `rows` rows from `row` and some columns from `column`.
struct Tile {
  int64_t row, rows, column;
};

// Where a tile's results go: `count` columns of rows that are `stride` values apart.
template <typename Value>
struct Target {
  Value* data;
  int64_t stride, count;
};

inline IntVec load_sums(const int32_t* p) {
  IntVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The value that the sums of PLANES planes stand for, in units of the highest plane.
template <int PLANES>
inline Vec combined(const int32_t* sums, const IntVec (&correction)[PLANES]) {
  const Vec top = __builtin_convertvector(load_sums(sums + (PLANES - 1) * kPanel) - correction[PLANES - 1], Vec);
  if constexpr (PLANES == 1) {
    return top;
  } else {
    const Vec low = __builtin_convertvector(load_sums(sums) - correction[0], Vec);
    const Vec middle = __builtin_convertvector(load_sums(sums + kPanel) - correction[1], Vec);
    // Only additions round here: the factors are powers of two.
    return top + (middle * 0x1p-8f + low * 0x1p-16f);
  }
}

// Finishes one group's sums of LANES vectors of outputs: scaled, added to those of the groups `before` it (rows kPanel
// apart, or null) and to the bias (or null). `quantize` makes of a Vec what is stored.
template <int PLANES, int LANES, typename Value, typename Quantize>
inline void finish_tile(const int32_t* sums, const float* before, const Activations& x, const Linear& w, int64_t group,
                        const Tile& at, const float* bias_or_null, const Target<Value>& target, Quantize quantize) {
  constexpr int kVectors = LANES * kLane / kWidth;
  const Layout& l = w.layout;
  const int8_t* weight_sums = w.packed + l.sums(at.column, group);
  IntVec correction[kVectors][PLANES];
  Vec scale[kVectors], bias[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const int64_t n = at.column + v * kWidth;
    const int count = static_cast<int>(std::clamp<int64_t>(l.n - n, 0, kWidth));
    IntVec weight_sum;
    std::memcpy(&weight_sum, weight_sums + 4 * v * kWidth, sizeof weight_sum);
#pragma GCC unroll 4
    for (int p = 0; p < PLANES; ++p) {
      correction[v][p] = weight_sum * ((p == PLANES - 1 ? x.zero_point : 0) - Dot::kOffset);
    }
    scale[v] = load(w.scale + group * l.n + n, count);
    bias[v] = bias_or_null ? load(bias_or_null + n, count) : Vec{};
  }
  // The last columns may not all exist: those rows are made here and copied.
  Value spare[LANES * kLane];
  const bool whole = target.count == LANES * kLane;
  Value* out = target.data;
  for (int64_t m = 0; m < at.rows; ++m, out += target.stride) {
    const float row_scale = x.scale[(at.row + m) * x.scale_step + group * x.group_step];
    Value* to = whole ? out : spare;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const Vec value = combined<PLANES>(sums + m * PLANES * kPanel + v * kWidth, correction[v]);
      Vec y = pinned(value * pinned(scale[v] * row_scale));
      if (before) y = load(before + m * kPanel + v * kWidth) + y;
      const auto result = quantize(y + bias[v]);
      std::memcpy(to + v * kWidth, &result, sizeof result);
    }
    if (!whole) std::memcpy(out, spare, target.count * sizeof(Value));
  }
}

// Rows of activations in a tile.
inline int64_t tile_rows(int64_t planes) { return std::max<int64_t>(1, Dot::kRows / planes); }

// ... in one of AMX, where there are at least `amx::kRows`: so many that their rows of bytes fill whole tiles.
inline int64_t amx_tile_rows(int64_t planes) { return planes == 1 ? 2 * amx::kRows : amx::kRows; }

inline constexpr auto kAsIs = [](Vec y) { return y; };

// Few rows are bound by memory, and a group's scales lie far from those of the group before, where hardware
// prefetchers do not look.
inline constexpr int64_t kFew = 4;

template <int LANES>
inline void fetch_scales(const Linear& w, int64_t group, int64_t column) {
#pragma GCC unroll 4
  for (int v = 0; v < LANES; ++v) __builtin_prefetch(w.scale + group * w.layout.n + column + v * kLane);
}

// One tile of LANES vectors of outputs, whose weights begin at `weights`.
template <int LANES>
inline void tile(const Activations& x, const Linear& w, const Weights& weights, const Output& out, const Tile& at) {
  constexpr int64_t kMost = (amx::kPresent ? 3 * amx::kRows : std::max<int64_t>(Dot::kRows, wide::kRows)) * kPanel;
  alignas(64) int32_t sums[kMost];
  alignas(64) float partial[kMost];
  const Layout& l = w.layout;
  const int64_t depth = l.depth(), group = l.group_size ? l.group_size : depth, last = l.groups() - 1;
  const uint8_t* rows = x.data + at.row * x.planes * x.stride;
  const auto dot = [&](int64_t g) {
    const int64_t begin = g * group, end = std::min(depth, begin + group);
    if (wide::kPresent && weights.wide) {
      const int64_t first = (at.row - weights.first_row) * x.planes;
      return wide::dot_rows(*weights.wide, at.rows * x.planes, first, at.column % kPanel, begin, end, sums);
    }
    const Weights from{weights.data + begin / 4 * weights.step, weights.step, weights.nibbles};
    if (at.rows >= amx::kRows) {
      return amx::dot_rows(at.rows * x.planes, LANES, rows + begin, x.stride, from.data, from.step, end - begin, sums);
    }
    dot_rows(at.rows * x.planes, LANES, rows + begin, x.stride, from, end - begin, sums);
  };
  const float* before = nullptr;
  for (int64_t g = 0; g < last; ++g, before = partial) {
    if (at.rows <= kFew) fetch_scales<LANES>(w, std::min(last, g + 2), at.column);
    dot(g);
    const Target<float> target{partial, kPanel, LANES * kLane};
    if (x.planes == 1) {
      finish_tile<1, LANES>(sums, before, x, w, g, at, nullptr, target, kAsIs);
    } else {
      finish_tile<3, LANES>(sums, before, x, w, g, at, nullptr, target, kAsIs);
    }
  }
  dot(last);
  const int64_t offset = at.row * l.n + at.column, count = std::min<int64_t>(LANES * kLane, l.n - at.column);
  const Target<float> target{static_cast<float*>(out.data) + offset, l.n, count};
  if (out.requantize) {
    const Target<uint8_t> bytes{static_cast<uint8_t*>(out.data) + offset, l.n, count};
    finish_tile<1, LANES>(sums, before, x, w, last, at, w.bias, bytes, Requantizer(out));
  } else if (x.planes == 1) {
    finish_tile<1, LANES>(sums, before, x, w, last, at, w.bias, target, kAsIs);
  } else {
    finish_tile<3, LANES>(sums, before, x, w, last, at, w.bias, target, kAsIs);
  }
}

// Columns [column, end) of one panel, whose weights begin at `panel`, for the rows of one tile.
inline void strip(const Activations& x, const Linear& w, const Weights& panel, const Output& out, int64_t row,
                  int64_t row_end, int64_t column, int64_t end) {
  const Tile at{row, row_end - row, column};
  const int64_t inside = column % kPanel * (panel.nibbles ? 2 : 4);
  const Weights weights{panel.data + inside, panel.step, panel.nibbles};
  switch ((end - column + kLane - 1) / kLane) {
    case 1: return panel.nibbles ? tile<2>(x, w, weights, out, at) : tile<1>(x, w, weights, out, at);
    case 2: return tile<2>(x, w, weights, out, at);
    case 3: return panel.nibbles ? tile<4>(x, w, weights, out, at) : tile<3>(x, w, weights, out, at);
    default: return tile<4>(x, w, weights, out, at);
  }
}

// Start of part `i` of `parts` equal parts of [begin, end).
inline int64_t cut(int64_t begin, int64_t end, int64_t i, int64_t parts) { return begin + (end - begin) * i / parts; }

// The same of rows: parts but the last are a number of AMX's tiles, where there are enough rows.
inline int64_t cut_rows(int64_t begin, int64_t end, int64_t i, int64_t parts) {
  const int64_t at = cut(begin, end, i, parts), unit = amx::allowed() && end - begin >= parts * amx::kRows ? amx::kRows : 1;
  return i == parts ? end : begin + (at - begin) / unit * unit;
}

// Room for one panel of 4-bit weights as bytes.
class Expanded {
 public:
  Weights operator()(const Linear& w, int64_t first) {
    const Layout& l = w.layout;
    const int64_t width = l.width(first), vectors = l.depth() * width / 128;
    if (!lines_) lines_.reset(new Line[2 * vectors]);  // no later panel is wider
    expand_panel(w.packed + l.panel(first), vectors, lines_[0].bytes);
    return {lines_[0].bytes, 4 * width, false};
  }

 private:
  struct alignas(64) Line {
    int8_t bytes[64];
  };
  std::unique_ptr<Line[]> lines_;
};

// Taking 4-bit weights apart costs a quarter of a tile's instructions, which only some processors hide; expanding a
// panel costs as much as half a strip of rows.
inline constexpr int64_t kMostDirectStrips = 4;

// Several rows in 16 bits; see `block`.
inline void wide_block(const Activations& x, const Linear& w, const Output& out, int64_t row, int64_t row_end,
                       int64_t column, int64_t column_end) {
  const Layout& l = w.layout;
  const int64_t together = std::max<int64_t>(1, wide::kRows / x.planes);
  // So many activations stay in the second-level cache while the weights pass.
  const int64_t most = std::max<int64_t>(4 * together, (128 << 10) / (l.depth() * x.planes));
  const int64_t blocks = (row_end - row + most - 1) / most;
  wide::Operands operands(std::min(most, row_end - row) * x.planes, l.depth());
  Expanded expanded;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = cut(row, row_end, i, blocks), end = cut(row, row_end, i + 1, blocks);
    const int64_t strips = (end - begin + together - 1) / together;
    operands.take_rows(x.data + begin * x.planes * x.stride, x.stride, (end - begin) * x.planes);
    for (int64_t n = column, first; n < column_end; n = std::min(column_end, first + kPanel)) {
      first = n / kPanel * kPanel;
      const Weights panel =
          l.bits == 4 ? expanded(w, first) : Weights{w.packed + l.panel(first), 4 * l.width(first), false};
      operands.take_panel(panel.data, panel.step);
      const Weights weights{nullptr, 0, false, &operands, begin};
      for (int64_t at = n; at < std::min(column_end, first + kPanel); at += kLane) {
        for (int64_t s = 0; s < strips; ++s) {
          const int64_t from = cut(begin, end, s, strips);
          tile<1>(x, w, weights, out, {from, cut(begin, end, s + 1, strips) - from, at});
        }
      }
    }
  }
}

// Rows [row, row_end) of columns [column, column_end); `column` is a multiple of the layout's unit.
inline void block(const Activations& x, const Linear& w, const Output& out, int64_t row, int64_t row_end,
                  int64_t column, int64_t column_end) {
  const Layout& l = w.layout;
  if (wide::kPresent && (row_end - row) * x.planes >= wide::few(l.bits)) {
    return wide_block(x, w, out, row, row_end, column, column_end);
  }
  const int64_t together = tile_rows(x.planes);
  // So many activations stay in the second-level cache while the panels pass.
  const int64_t most = std::max<int64_t>(4 * together, (256 << 10) / (l.depth() * x.planes));
  const int64_t blocks = (row_end - row + most - 1) / most;
  std::optional<amx::Tiles> tiles;
  if (amx::allowed() && row_end - row >= amx::kRows) tiles.emplace();
  Expanded expanded;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = cut_rows(row, row_end, i, blocks), end = cut_rows(row, row_end, i + 1, blocks);
    const int64_t tiled = tiles ? (end - begin) / amx::kRows * amx::kRows : 0, rest = begin + tiled;
    const int64_t strips = (end - rest + together - 1) / together;
    const bool expand = l.bits == 4 && (tiled || !(Dot::kNibbles && strips <= kMostDirectStrips));
    for (int64_t n = column; n < column_end;) {
      const int64_t first = n / kPanel * kPanel, panel_end = std::min(column_end, first + kPanel);
      const Weights panel = expand ? expanded(w, first)
                                   : Weights{w.packed + l.panel(first), l.width(first) * l.bits / 2, l.bits == 4};
      for (int64_t s = begin; s < rest; s += amx_tile_rows(x.planes)) {
        strip(x, w, panel, out, s, std::min(rest, s + amx_tile_rows(x.planes)), n, panel_end);
      }
      for (int64_t s = 0; s < strips; ++s) {
        strip(x, w, panel, out, cut(rest, end, s, strips), cut(rest, end, s + 1, strips), n, panel_end);
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

// Nanoseconds on one core: weights come from memory at some 40 GB/s, rows cost some 0.5 T products a second, 2 T by
// AMX, 0.1 T in 16 bits.
inline double cost(int64_t m, int64_t n, const Layout& l) {
  const double bytes = static_cast<double>(l.bits) / 8;
  const double rate = amx::allowed() && m >= amx::kRows ? 2000 : wide::kPresent ? 100 : 500;
  return static_cast<double>(n) * static_cast<double>(l.k) * (bytes / 40 + static_cast<double>(m) / rate);
}

// Waking a thread costs a microsecond or two; it should have as much to do.
constexpr double kThreadCost = 2000;

inline Plan plan(int64_t m, const Layout& l, int64_t threads, int64_t planes = 1) {
  threads = std::clamp<int64_t>(static_cast<int64_t>(cost(m * planes, l.n, l) / kThreadCost), 1, threads);
  const int64_t together = tile_rows(planes);
  const int64_t strips = (m + together - 1) / together, units = l.outputs() / l.unit();
  Plan best;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t rows = std::min(threads, std::max<int64_t>(strips, 1)); rows >= 1; --rows) {
    const int64_t columns = std::min(units, threads / rows);
    const int64_t most_rows = (strips + rows - 1) / rows * together * planes;
    const double part = cost(most_rows, (units + columns - 1) / columns * l.unit(), l);
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
  const Layout& l = w.layout;
  const int64_t r = part / plan.columns, c = part % plan.columns, units = l.outputs() / l.unit();
  block(x, w, out, cut_rows(0, m, r, plan.rows), cut_rows(0, m, r + 1, plan.rows), l.unit() * cut(0, units, c, plan.columns),
        std::min(l.n, l.unit() * cut(0, units, c + 1, plan.columns)));
}

}  // namespace mq_ao::qgemm
