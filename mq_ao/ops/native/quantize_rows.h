// Rows of floats as integers for qgemm.h: 8 bits with zero point 128, which may hold 4 bits, or 24 bits in three planes
// with zero point 2^23.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <limits>

#include "pinned.h"
#include "vec.h"

namespace mq_ao::qgemm {

inline constexpr int32_t kTokenZeroPoint = 128;
// The largest integers; with 24 bits some are left, since rounding the reciprocal of the scale may carry upwards.
inline constexpr float kTokenMost = 127.0f, kPlaneMost = 8388600.0f;
// The largest magnitude in 4 bits is this many steps, and cut to the integers that there are.
inline constexpr float kFourBitReach = 8.0f;
inline constexpr int32_t kFourBitLeast = -8, kFourBitMost = 7;

// Calls step(first element, count) for all vectors of a row.
template <typename Step>
inline void for_vectors(int64_t k, Step&& step) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) step(i, kLanes);
  if (i < k) step(i, static_cast<int>(k - i));
}

// max|x| / most, at least the smallest normal float; NaN where the row has a NaN or an infinity.
template <typename Value>
inline float row_scale(const Value* x, int64_t k, float most) {
  // As integers, the bits of non-negative floats have the floats' order, with infinity and then NaN on top.
  IntVec top{};
  for_vectors(k, [&](int64_t i, int count) {
    const IntVec bits = bit_cast<IntVec>(absolute(load(x + i, count)));
    top = bits > top ? bits : top;
  });
  int32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, top[i]);
  if (largest >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
  return std::max(bit_cast<float>(largest) / pinned(most), FLT_MIN);
}

// The lowest byte of each lane.
inline void store_bytes(IntVec v, uint8_t* p, int count) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(p, &bytes, count);
}

// q = round half even(x * (1 / scale)) + 128, and zeros where the scale is NaN. Returns the scale.
template <int kBits, typename Value>
inline float quantize_token(const Value* x, int64_t k, uint8_t* q) {
  static_assert(kBits == 4 || kBits == 8);
  const float scale = row_scale(x, k, kBits == 8 ? kTokenMost : kFourBitReach);
  if (scale != scale) {
    std::memset(q, kTokenZeroPoint, k);
    return scale;
  }
  const float inverse = 1.0f / pinned(scale);
  // In 8 bits |x * inverse| is at most 127 and a few ulp, so that no clamp is needed.
  for_vectors(k, [&](int64_t i, int count) {
    const Vec rounded = round_small(pinned(load(x + i, count) * inverse));
    IntVec value = __builtin_convertvector(rounded, IntVec);
    if constexpr (kBits == 4) {
      value = value > kFourBitMost ? IntVec{} + kFourBitMost : value;
      value = value < kFourBitLeast ? IntVec{} + kFourBitLeast : value;
    }
    store_bytes(value + kTokenZeroPoint, q + i, count);
  });
  return scale;
}

// How rows are rounded by themselves: to 8 bits or 4, the row as a whole or in groups of `group_size` values.
struct TokenGrid {
  int64_t bits, group_size;  // 0: the whole row

  bool fits(int64_t k) const {
    return (bits == 4 || bits == 8) && (group_size == 0 || (group_size > 0 && k % group_size == 0));
  }
  int64_t scales(int64_t k) const { return group_size ? k / group_size : 1; }

  // One row; its scales lie side by side.
  template <typename Value>
  void quantize(const Value* x, int64_t k, uint8_t* q, float* scale) const {
    const int64_t size = group_size ? group_size : k;
    for (int64_t i = 0; i < k; i += size)
      *scale++ = bits == 4 ? quantize_token<4>(x + i, size, q + i) : quantize_token<8>(x + i, size, q + i);
  }
};

// As `quantize_token`, in 24 bits: the lowest, middle and highest bytes are rows `stride` bytes apart. Returns the
// scale of the highest.
template <typename Value>
inline float quantize_planes(const Value* x, int64_t k, uint8_t* q, int64_t stride) {
  const float scale = row_scale(x, k, kPlaneMost);
  if (scale != scale) {
    for (int p = 0; p < 3; ++p) std::memset(q + p * stride, 0, k);
    return scale;
  }
  const float inverse = 1.0f / pinned(scale);
  for_vectors(k, [&](int64_t i, int count) {
    const Vec y = pinned(load(x + i, count) * inverse);
    // Nearest integer of |y| < 2^23: adding 2^23 of the same sign leaves no room for a fraction.
    const Vec magic = bit_cast<Vec>((bit_cast<UintVec>(y) & 0x80000000u) | 0x4b000000u);
    const IntVec value = __builtin_convertvector(pinned(y + magic) - magic, IntVec) + (1 << 23);
    for (int p = 0; p < 3; ++p) store_bytes(value >> (8 * p), q + p * stride + i, count);
  });
  return scale * 65536.0f;
}

}  // namespace mq_ao::qgemm
