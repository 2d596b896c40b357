// Dot products of 4 unsigned activations with 4 signed weights for 16 output columns at a time, one variant for each
// instruction set. Every variant is exact: sums have 32 bits and no step saturates.
//
// A variant gives
//   kRows          rows of the largest tile;
//   kSums          so many sums of 16 columns fit the registers: of few rows, those of several groups of columns, so that
//                  weights are read in the order in which they lie;
//   kOffset        what it subtracts from each activation (128 where the instruction wants signed bytes);
//   kNibbles       whether it also takes weights of 4 bits as they are packed; others need `expand_panel` first;
//   kNibbleShift   such weights, and the sums, are multiplied by two to this power;
//   Activation, Weights, Sum, and the functions on them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "qgemm_layout.h"

namespace mq_ao::qgemm {

inline int32_t load_word(const void* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

#if defined(__AVX512F__) && defined(__AVX512VNNI__)

struct Dot {
  static constexpr int kRows = 6, kSums = 24, kOffset = 0, kNibbleShift = 4;
  static constexpr bool kNibbles = true;
  using Activation = __m512i;
  using Weights = __m512i;
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Activation load_activation(const uint8_t* p) { return _mm512_set1_epi32(load_word(p)); }
  static Weights load_weights(const int8_t* p) {
    Weights w = _mm512_loadu_si512(p);
    asm("" : "+v"(w));  // else GCC repeats the load in every use, and loads bound the tile
    return w;
  }
  // Two vectors of weights times 16, which still fit a signed byte: masks do without extending signs.
  static void load_nibbles(const int8_t* p, Weights* w) {
    typedef uint16_t Words __attribute__((vector_size(64)));
    const Words words = Words(_mm512_loadu_si512(p));
    w[0] = Weights(words << 4 & 0xf0f0);
    w[1] = Weights(words & 0xf0f0);
  }
  static void dot(Sum& sum, const Activation& a, const Weights& w) { sum = _mm512_dpbusd_epi32(sum, a, w); }
  static void dot_nibbles(Sum& sum, const Activation& a, const Weights& w) { dot(sum, a, w); }
  static void store(const Sum& sum, int32_t* p) { _mm512_store_si512(p, sum); }
};

#elif defined(__AVXVNNI__)

struct Dot {
  static constexpr int kRows = 6, kSums = 4, kOffset = 0;
  static constexpr bool kNibbles = false;
  using Activation = __m256i;
  struct Weights {
    __m256i part[2];
  };
  using Sum = Weights;
  static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Activation load_activation(const uint8_t* p) { return _mm256_set1_epi32(load_word(p)); }
  static Weights load_weights(const int8_t* p) {
    auto* v = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
  }
  static void dot(Sum& sum, const Activation& a, const Weights& w) {
    for (int i = 0; i < 2; ++i) sum.part[i] = _mm256_dpbusd_avx_epi32(sum.part[i], a, w.part[i]);
  }
  static void store(const Sum& sum, int32_t* p) { std::memcpy(p, &sum, sizeof sum); }
};

#elif defined(__AVX2__)

// maddubs sums two products in 16 bits and saturates: with 7 bits of an activation, and with the eighth, it cannot.
struct Dot {
  static constexpr int kRows = 2, kSums = 4, kOffset = 0, kNibbleShift = 0;
  static constexpr bool kNibbles = true;
  struct Activation {
    __m256i all, low, high;
  };
  struct Weights {
    __m256i part[2];
  };
  using Sum = Weights;
  static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Activation load_activation(const uint8_t* p) {
    const __m256i a = _mm256_set1_epi32(load_word(p)), top = _mm256_set1_epi8(-128);
    return {a, _mm256_andnot_si256(top, a), _mm256_and_si256(top, a)};
  }
  static Weights load_weights(const int8_t* p) {
    auto* v = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
  }
  static void load_nibbles(const int8_t* p, Weights* w) {
    const __m256i values =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
    const __m256i mask = _mm256_set1_epi8(15);
    for (int i = 0; i < 2; ++i) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
      w[0].part[i] = _mm256_shuffle_epi8(values, _mm256_and_si256(both, mask));
      w[1].part[i] = _mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi16(both, 4), mask));
    }
  }
  // Products of 4 bits do not saturate.
  static void dot_nibbles(Sum& sum, const Activation& a, const Weights& w) {
    for (int i = 0; i < 2; ++i) {
      const __m256i pairs = _mm256_maddubs_epi16(a.all, w.part[i]);
      sum.part[i] = _mm256_add_epi32(sum.part[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
  static void dot(Sum& sum, const Activation& a, const Weights& w) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; ++i) {
      const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(a.low, w.part[i]), ones);
      const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(a.high, w.part[i]), ones);
      sum.part[i] = _mm256_add_epi32(sum.part[i], _mm256_add_epi32(low, high));
    }
  }
  static void store(const Sum& sum, int32_t* p) { std::memcpy(p, &sum, sizeof sum); }
};

#elif defined(__ARM_FEATURE_DOTPROD)

struct Dot {
  static constexpr int kRows = 6, kSums = 4, kOffset = 128;
  static constexpr bool kNibbles = false;
  using Activation = int8x16_t;
  using Weights = int8x16x4_t;
  using Sum = int32x4x4_t;
  static Sum zero() {
    const int32x4_t z = vdupq_n_s32(0);
    return {{z, z, z, z}};
  }
  static Activation load_activation(const uint8_t* p) {
    return veorq_s8(vreinterpretq_s8_s32(vdupq_n_s32(load_word(p))), vdupq_n_s8(-128));
  }
  static Weights load_weights(const int8_t* p) {
    return {{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}};
  }
  static void dot(Sum& sum, const Activation& a, const Weights& w) {
    for (int i = 0; i < 4; ++i) sum.val[i] = vdotq_s32(sum.val[i], w.val[i], a);
  }
  static void store(const Sum& sum, int32_t* p) { std::memcpy(p, &sum, sizeof sum); }
};

#else

// 64 partial sums that any compiler vectorises; every product fits in 16 bits, which is what vector units multiply.
struct Dot {
  static constexpr int kRows = 1, kSums = 1, kOffset = 0;
  static constexpr bool kNibbles = false;
  struct Activation {
    int16_t value[64];
  };
  using Weights = const int8_t*;
  struct Sum {
    int32_t value[64];
  };
  static Sum zero() { return {}; }
  static Activation load_activation(const uint8_t* p) {
    Activation a;
    for (int i = 0; i < 64; ++i) a.value[i] = p[i % 4];
    return a;
  }
  static Weights load_weights(const int8_t* p) { return p; }
  static void dot(Sum& sum, const Activation& a, const Weights& w) {
    for (int i = 0; i < 64; ++i) sum.value[i] += static_cast<int16_t>(a.value[i] * w[i]);
  }
  static void store(const Sum& sum, int32_t* p) {
    for (int i = 0; i < kLane; ++i) {
      const int32_t* s = sum.value + 4 * i;
      p[i] = s[0] + s[1] + s[2] + s[3];
    }
  }
};

#endif

}  // namespace mq_ao::qgemm
