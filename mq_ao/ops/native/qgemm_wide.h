// Exact sums by products of 16-bit numbers, for processors with AVX2 that have no dot products of bytes. Widening bytes
// costs as much as multiplying them, so for several rows it is done once: of all rows of a block, and of a panel.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#if defined(__AVX2__) && !defined(__AVXVNNI__) && !(defined(__AVX512F__) && defined(__AVX512VNNI__))
#include <immintrin.h>
#define MQ_AO_WIDE 1
#endif

#include "qgemm_layout.h"

namespace mq_ao::qgemm::wide {

inline constexpr int64_t kRows = 6;  // of activations in a tile

// Fewer rows of bytes are as quick without; weights of 4 bits fit into products of bytes.
inline int64_t few(int64_t bits) { return bits == 4 ? 16 : 6; }

#ifdef MQ_AO_WIDE
inline constexpr bool kPresent = true;
#else
inline constexpr bool kPresent = false;
#endif

// Rows [rows][depth] of activations, and the weights of a panel: [depth / 2][16][2] for each 16 outputs.
class Operands {
 public:
  Operands(int64_t rows, int64_t depth)
      : depth_(depth), rows_(new Line[(rows * depth + 31) / 32]), weights_(new Line[depth * kPanel / 32]) {}

  // Takes `count` rows of bytes, `stride` bytes apart.
  void take_rows(const uint8_t* x, int64_t stride, int64_t count) {
    for (int64_t m = 0; m < count; ++m) {
      int16_t* to = rows_[0].values + m * depth_;
      for (int64_t k = 0; k < depth_; ++k) to[k] = x[m * stride + k];
    }
  }

  // Takes a panel, whose groups of 4 inputs lie `step` bytes apart.
  void take_panel(const int8_t* panel, int64_t step);

  // Sums of ROWS rows from `row` on with the 16 outputs from `column` of the panel on, from input `begin` to `end`;
  // they lie kPanel apart.
  template <int ROWS>
  void dot_tile(int64_t row, int64_t column, int64_t begin, int64_t end, int32_t* sums) const;

 private:
  struct alignas(64) Line {
    int16_t values[32];
  };

  int64_t depth_;
  std::unique_ptr<Line[]> rows_, weights_;
};

#ifdef MQ_AO_WIDE

// Pairs of inputs of 8 outputs each, [2][8][2], of 4 inputs of 8 outputs, [8][4].
inline void split_pairs(const int8_t* w, __m256i* first, __m256i* second) {
  auto* v = reinterpret_cast<const __m128i*>(w);
  const __m256 low = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm_loadu_si128(v)));
  const __m256 high = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm_loadu_si128(v + 1)));
  // Works within 128-bit halves: outputs come out as 0 1 4 5 | 2 3 6 7.
  _mm256_store_si256(first, _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88)), 0xd8));
  _mm256_store_si256(second, _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xdd)), 0xd8));
}

inline void Operands::take_panel(const int8_t* panel, int64_t step) {
  constexpr int64_t kAhead = 4096;  // hardware prefetchers stop at every page
  const int64_t lane = depth_ * kLane / 16;
  auto* to = reinterpret_cast<__m256i*>(weights_[0].values);
  for (int64_t k = 0; k < depth_; k += 4, panel += step, to += 4) {
    for (int64_t v = 0; v < step / 64; ++v) {
      __builtin_prefetch(panel + 64 * v + kAhead);
      split_pairs(panel + 64 * v, to + v * lane, to + v * lane + 2);
      split_pairs(panel + 64 * v + 32, to + v * lane + 1, to + v * lane + 3);
    }
  }
}

template <int ROWS>
__attribute__((noinline)) void Operands::dot_tile(int64_t row, int64_t column, int64_t begin, int64_t end,
                                                   int32_t* sums) const {
  const int16_t* x[ROWS];
  __m256i sum[ROWS][2];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    x[m] = rows_[0].values + (row + m) * depth_;
    sum[m][0] = sum[m][1] = _mm256_setzero_si256();
  }
  auto* w = reinterpret_cast<const __m256i*>(weights_[0].values + column * depth_ + begin * kLane);
  for (int64_t k = begin; k < end; k += 2, w += 2) {
    const __m256i low = _mm256_load_si256(w), high = _mm256_load_si256(w + 1);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      int32_t two;
      std::memcpy(&two, x[m] + k, sizeof two);
      const __m256i a = _mm256_set1_epi32(two);
      sum[m][0] = _mm256_add_epi32(sum[m][0], _mm256_madd_epi16(a, low));
      sum[m][1] = _mm256_add_epi32(sum[m][1], _mm256_madd_epi16(a, high));
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    for (int i = 0; i < 2; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(sums + m * kPanel) + i, sum[m][i]);
  }
}

// Up to kRows rows.
inline void dot_rows(const Operands& from, int64_t rows, int64_t row, int64_t column, int64_t begin, int64_t end,
                     int32_t* sums) {
  switch (rows) {
    case 1: return from.dot_tile<1>(row, column, begin, end, sums);
    case 2: return from.dot_tile<2>(row, column, begin, end, sums);
    case 3: return from.dot_tile<3>(row, column, begin, end, sums);
    case 4: return from.dot_tile<4>(row, column, begin, end, sums);
    case 5: return from.dot_tile<5>(row, column, begin, end, sums);
    default: return from.dot_tile<6>(row, column, begin, end, sums);
  }
}

#else

inline void Operands::take_panel(const int8_t*, int64_t) {}

inline void dot_rows(const Operands&, int64_t, int64_t, int64_t, int64_t, int64_t, int32_t*) {}

#endif

}  // namespace mq_ao::qgemm::wide
