// Float vectors as wide as the target has them, with the functions the kernels need. No torch types here.
//
// GCC and Clang vector extensions give AVX-512, AVX2, NEON or plain SSE2 code from one source; the width is chosen
// when the file is compiled. Compile with -ffp-contract=fast, so that `a * b + c` becomes one fused instruction, and
// without -ffast-math: NaN and infinity must pass through.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define MQ_AO_AVX512
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mq_ao {

#if defined(MQ_AO_AVX512)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// States of the recurrence that fit into registers next to the constants of exp2.
#if defined(MQ_AO_AVX512) || defined(__aarch64__)
constexpr int kMaxGroup = 16;
#else
constexpr int kMaxGroup = 8;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

// A bfloat16 number: the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

inline Vec broadcast(float x) { return x - Vec{}; }

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

inline void from_float(float x, float* out) { *out = x; }
// Rounds to nearest even; a NaN stays a quiet NaN.
inline void from_float(float x, BFloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  out->bits = x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const BFloat16* p) {
  HalfVec half;
  std::memcpy(&half, p, sizeof half);
  return bit_cast<Vec>(__builtin_convertvector(half, UintVec) << 16);
}
inline void store(Vec v, float* p) { std::memcpy(p, &v, sizeof v); }
inline void store(Vec v, BFloat16* p) {
  const UintVec bits = bit_cast<UintVec>(v);
  const UintVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const HalfVec half = __builtin_convertvector(v != v ? (bits >> 16 | 0x40) : rounded, HalfVec);
  std::memcpy(p, &half, sizeof half);
}

// The first `count` lanes; the others read as zero and are not written.
template <typename T>
inline Vec load(const T* p, int count) {
  if (count == kLanes) return load(p);
  Vec v{};
  for (int i = 0; i < count; ++i) v[i] = to_float(p[i]);
  return v;
}
template <typename T>
inline void store(Vec v, T* p, int count) {
  if (count == kLanes) return store(v, p);
  for (int i = 0; i < count; ++i) from_float(v[i], p + i);
}
// Lanes `stride` elements apart.
inline Vec gather(const float* p, int64_t stride, int count) {
  Vec v{};
  for (int i = 0; i < count; ++i) v[i] = p[i * stride];
  return v;
}
inline void scatter(Vec v, float* p, int64_t stride, int count) {
  for (int i = 0; i < count; ++i) p[i * stride] = v[i];
}

// Calls f(first, lanes) for the vectors of n values; all but the last have a count of lanes that the compiler knows.
template <typename F>
inline void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, std::integral_constant<int, kLanes>());
  if (i < n) f(i, int(n - i));
}

// a * b + c rounded once, where the target can. GCC fuses such an expression in one place and not in another, by what
// stands around it: this is for sums that must come out the same in both.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(MQ_AO_AVX512)
  return bit_cast<Vec>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  return bit_cast<Vec>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#elif defined(__aarch64__)
  return bit_cast<Vec>(vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}

// NaN in `x` passes through both: x86's min and max return their second operand then.
#if defined(MQ_AO_AVX512)
inline Vec at_least(Vec x, float low) {
  return bit_cast<Vec>(_mm512_max_ps(_mm512_set1_ps(low), bit_cast<__m512>(x)));
}
inline Vec at_most(Vec x, float high) {
  return bit_cast<Vec>(_mm512_min_ps(_mm512_set1_ps(high), bit_cast<__m512>(x)));
}
#else
inline Vec at_least(Vec x, float low) { return x < low ? broadcast(low) : x; }
inline Vec at_most(Vec x, float high) { return x > high ? broadcast(high) : x; }
#endif
inline Vec absolute(Vec x) { return bit_cast<Vec>(bit_cast<UintVec>(x) & 0x7fffffffu); }

inline float sum(Vec v) {
#if defined(MQ_AO_AVX512)
  return _mm512_reduce_add_ps(bit_cast<__m512>(v));
#else
  float parts[kLanes];
  store(v, parts);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
#endif
}

// Of every Width neighbouring lanes of a, then of b, the first half plus the second.
template <int Width, int... Lane>
inline Vec add_halves(Vec a, Vec b, std::integer_sequence<int, Lane...>) {
  constexpr int kHalf = Width / 2;
  return __builtin_shufflevector(a, b, (Lane / kHalf * Width + Lane % kHalf)...) +
      __builtin_shufflevector(a, b, (Lane / kHalf * Width + Lane % kHalf + kHalf)...);
}

// In lane i the sum of the lanes of v[i], which change.
template <int Width = kLanes>
inline Vec lane_sums(Vec (&v)[kLanes]) {
  if constexpr (Width > 1) {
    for (int i = 0; i < Width / 2; ++i)
      v[i] = add_halves<Width>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kLanes>());
    return lane_sums<Width / 2>(v);
  }
  return v[0];
}

// Nearest integer, as a float; |x| < 2^22. Adding 1.5 * 2^23 leaves no room for a fraction.
constexpr float kRoundMagic = 12582912.0f;
inline Vec round_small(Vec x) { return (x + kRoundMagic) - kRoundMagic; }

// 2^n for integral n in [-126, 127]; n = -127 gives 0 and n = 128 infinity.
inline Vec power_of_two(Vec n) {
  return bit_cast<Vec>((bit_cast<IntVec>(n + kRoundMagic) << 23) + (127 << 23));
}

// p * 2^n for integral n in [-252, 254], rounding into denormals and to infinity as ldexp does.
inline Vec scale(Vec p, Vec n) {
#if defined(MQ_AO_AVX512)
  return bit_cast<Vec>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(n)));
#else
  const Vec half = round_small(n * 0.5f);
  return p * power_of_two(half) * power_of_two(n - half);
#endif
}

// 2^x to less than 2 ulp for x in [-126, 127.5]. Above it is infinity (from 128 at the latest), below it is 0, or on
// AVX-512 the denormal number. Arguments are reduced to the nearest multiple and not downwards: decays close to 1, which
// remember longest, then come from an r close to 0, where nothing but the last rounding errs.
#if defined(MQ_AO_AVX512)
// x = n + r with n a multiple of 1/16; 2^(n mod 1) from a table in a register, 2^r by a degree 3 minimax polynomial of
// relative error 1.6e-9.
inline Vec exp2(Vec x) {
  constexpr Vec kPowers = {1.0f,         1.044273734f, 1.090507746f, 1.138788581f, 1.189207077f, 1.241857767f,
                           1.296839595f, 1.354255557f, 1.414213538f, 1.476826191f, 1.542210817f, 1.610490322f,
                           1.681792855f, 1.756252170f, 1.834008098f, 1.915206552f};
  constexpr float kMagic = 786432.0f;             // 1.5 * 2^19: a sum's last bit is worth 1/16
  constexpr int kFourFractionBits = 4 << 4;       // of vreduceps, rounding to nearest
  const Vec sum = x + kMagic;
  const Vec power = bit_cast<Vec>(_mm512_permutexvar_ps(bit_cast<__m512i>(sum), bit_cast<__m512>(kPowers)));
  const Vec r = bit_cast<Vec>(_mm512_reduce_ps(bit_cast<__m512>(x), kFourFractionBits));  // 0 for infinity
  const Vec p = (5.55021364859e-2f * r + 2.40234288014e-1f) * r + 6.93147182667e-1f;
  return bit_cast<Vec>(_mm512_scalef_ps(bit_cast<__m512>(power * r * p + power), bit_cast<__m512>(sum - kMagic)));
}
#else
// Degree 6 minimax polynomial on [-1/2, 1/2], relative error 2.0e-9, exactly 1 at 0.
inline Vec exp2(Vec x) {
  const Vec bounded = at_least(at_most(x, 128.0f), -160.0f), n = round_small(bounded), r = bounded - n;
  Vec p = 1.53533620278e-4f * r + 1.33988743967e-3f;
  p = p * r + 9.61843735710e-3f;
  p = p * r + 5.55033247118e-2f;
  p = p * r + 2.40226479136e-1f;
  p = p * r + 6.93147202855e-1f;
  p = p * r + 1.0f;
  const Vec result = p * power_of_two(n);
  return bounded < -126.0f ? Vec{} : result;
}
#endif

// e^x with a relative error below 2 ulp, into the denormals and up to infinity.
// Cody and Waite's reduction by ln 2 in two parts, then a degree 6 minimax polynomial.
inline Vec exp(Vec x) {
  x = at_least(at_most(x, 89.0f), -105.0f);
  const Vec n = round_small(x * 1.44269504f);
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = 1.38436442504e-3f * r + 8.37416336120e-3f;
  p = p * r + 4.16680025711e-2f;
  p = p * r + 1.66664311704e-1f;
  p = p * r + 4.99999942056e-1f;
  p = p * r + 1.00000003218f;
  p = p * r + 1.0f;
  return scale(p, n);
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), where log1p(z) = 2 atanh(s) with s = z / (2 + z) <= 1/3. The polynomial in
// s^2 is minimax of relative error 4e-9.
inline Vec softplus(Vec x) {
  const Vec z = exp(-absolute(x));
  const Vec s = z / (z + 2.0f);
  const Vec q = s * s;
  Vec p = 0.281783351048f * q + 0.279606027088f;
  p = p * q + 0.400249102855f;
  p = p * q + 0.666663146819f;
  p = p * q + 2.00000000792f;
  return at_least(x, 0.0f) + p * s;
}

}  // namespace mq_ao
