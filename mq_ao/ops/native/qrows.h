// Operands of the integer kernels that are 8-bit or float32, whichever a graph has there; known when a kernel runs.
//
// A branch for every vector that is read or written costs little beside what is computed from it, and spares a kernel
// for every combination of types.
#pragma once

#include <algorithm>
#include <optional>

#include "qgemm.h"
#include "scan.h"

namespace mq_ao {

typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));
typedef int8_t SignedByteVec __attribute__((vector_size(kLanes)));
typedef int16_t SignedHalfVec __attribute__((vector_size(kLanes * 2)));

#if defined(MQ_AO_AVX512)
// Masked by all ones: GCC 12 warns of the plain intrinsics, whose header reads an undefined vector.
inline Vec to_float(ByteVec q) {
  const __m512i wide = _mm512_maskz_cvtepu8_epi32(__mmask16(-1), bit_cast<__m128i>(q));
  return __builtin_convertvector(bit_cast<IntVec>(wide), Vec);
}
inline Vec to_float(SignedByteVec q) {
  const __m512i wide = _mm512_maskz_cvtepi8_epi32(__mmask16(-1), bit_cast<__m128i>(q));
  return __builtin_convertvector(bit_cast<IntVec>(wide), Vec);
}
#else
// In steps of twice the width: GCC 12 takes one of four times the width lane by lane.
inline Vec to_float(ByteVec q) {
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(q, HalfVec), IntVec), Vec);
}
inline Vec to_float(SignedByteVec q) {
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(q, SignedHalfVec), IntVec), Vec);
}
#endif

// The grid of 8-bit numbers q, which stand for (q - zero_point) * scale. Loops know uint8 alone: an int8 number with
// its highest bit flipped is the number plus 128 as uint8, and its zero point moves along.
struct Grid {
  float scale = 1.0f, zero_point = 0.0f;
  uint8_t flip = 0;

  Grid() = default;  // of float32 operands, which have none
  Grid(bool is_signed, double scale, int64_t zero_point)
      : scale(float(scale)), zero_point(float(zero_point + (is_signed ? 128 : 0))), flip(is_signed ? 0x80 : 0) {}
};

// Whether scale and zero point make a grid of uint8 or int8 numbers.
inline bool is_grid(bool is_signed, double scale, int64_t zero_point) {
  const int64_t lowest = is_signed ? -128 : 0;
  return scale > 0 && zero_point >= lowest && zero_point <= lowest + 255;
}

// Numbers less their zero point.
inline Vec load_centered(const uint8_t* p, const Grid& grid, int count) {
  ByteVec bytes{};
  // A copy of constant size is one instruction; one of any size is a call.
  if (count == kLanes)
    std::memcpy(&bytes, p, sizeof bytes);
  else
    std::memcpy(&bytes, p, size_t(count));
  return to_float(bytes ^ grid.flip) - grid.zero_point;
}

// n numbers as float32.
inline void dequantize(const uint8_t* q, const Grid& grid, int64_t n, float* values) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = int(std::min<int64_t>(kLanes, n - i));
    store(load_centered(q + i, grid, lanes) * grid.scale, values + i, lanes);
  }
}

// (batch, length, channels) of 8-bit numbers on a grid, or of float32. Strides in elements.
struct QRows {
  const void* data;
  int64_t batch, time;
  bool integer;
  Grid grid;
};
inline const void* row_address(const QRows& rows, int64_t b, int64_t t, int64_t c) {
  const int64_t offset = b * rows.batch + t * rows.time + c;
  return static_cast<const uint8_t*>(rows.data) + offset * (rows.integer ? 1 : sizeof(float));
}
inline Vec load_row(const QRows& rows, int64_t b, int64_t t, int64_t c, int lanes) {
  const void* p = row_address(rows, b, t, c);
  if (rows.integer) return load_centered(static_cast<const uint8_t*>(p), rows.grid, lanes) * rows.grid.scale;
  return load(static_cast<const float*>(p), lanes);
}

// A result of that shape: float32, or 8-bit numbers where the caller gives a scale.
struct QOutput {
  void* data;
  int64_t batch, time;
  bool integer;
  qgemm::Requantizer requantize;

  QOutput(void* data, int64_t batch, int64_t time, bool is_signed, std::optional<double> scale, int64_t zero_point)
      : data(data),
        batch(batch),
        time(time),
        integer(scale.has_value()),
        requantize({data, integer, float(1.0 / scale.value_or(1.0)), int32_t(zero_point + (is_signed ? 128 : 0))}) {
    // The last byte of a number less 128 is that of the int8 number.
    if (is_signed) requantize.zero_point -= 128;
  }
};
inline const void* row_address(const QOutput& rows, int64_t b, int64_t t, int64_t c) {
  const int64_t offset = b * rows.batch + t * rows.time + c;
  return static_cast<const uint8_t*>(rows.data) + offset * (rows.integer ? 1 : sizeof(float));
}
inline void store_row(Vec v, const QOutput& rows, int64_t b, int64_t t, int64_t c, int lanes) {
  const int64_t offset = b * rows.batch + t * rows.time + c;
  if (!rows.integer) return store(v, static_cast<float*>(rows.data) + offset, lanes);
  const ByteVec bytes = rows.requantize(v);
  uint8_t* p = static_cast<uint8_t*>(rows.data) + offset;
  if (lanes == kLanes)
    std::memcpy(p, &bytes, sizeof bytes);
  else
    std::memcpy(p, &bytes, size_t(lanes));
}

// (batch, channels, d_state) of int8, whose value is q * scale, or of float32 where `scale` is null. T: void, or const
// void for states that are only read.
template <typename T>
struct QStates {
  T* data;
  const float* scale;  // (channels, d_state) or null

  explicit operator bool() const { return data != nullptr; }
};

// Steps of a state: whole numbers in -127 ... 127, rounded up as often as the fraction says (see mq_ao/ops/state.py). NaN
// has no such number and becomes 0.
inline Vec state_steps(Vec h, Vec scale) {
  const Vec exact = h / scale;
  const Vec steps = at_least(at_most(exact != exact ? Vec{} : exact, 127.0f), -127.0f), parts = 64.0f * steps;
  return round_small(steps + (parts - round_small(parts)));
}

template <typename T>
inline Vec gather_state(const QStates<T>& states, StateIndex at, int64_t stride, int lanes) {
  if (!states.scale) return gather_state(static_cast<const float*>(states.data), at, stride, lanes);
  const auto* p = static_cast<const int8_t*>(states.data) + at.state;
  Vec v{};
  for (int i = 0; i < lanes; ++i) v[i] = float(p[i * stride]);
  return v * gather(states.scale + at.parameter, stride, lanes);
}
inline void scatter_state(Vec h, const QStates<void>& states, StateIndex at, int64_t stride, int lanes) {
  if (!states.scale) return scatter_state(h, static_cast<float*>(states.data), at, stride, lanes);
  const Vec steps = state_steps(h, gather(states.scale + at.parameter, stride, lanes));
  auto* p = static_cast<int8_t*>(states.data) + at.state;
  for (int i = 0; i < lanes; ++i) p[i * stride] = int8_t(steps[i]);
}
template <typename T>
inline Vec load_state(const QStates<T>& states, StateIndex at) {
  if (!states.scale) return load_state(static_cast<const float*>(states.data), at);
  SignedByteVec bytes;
  std::memcpy(&bytes, static_cast<const int8_t*>(states.data) + at.state, sizeof bytes);
  return to_float(bytes) * load(states.scale + at.parameter);
}
inline void store_state(Vec h, const QStates<void>& states, StateIndex at) {
  if (!states.scale) return store_state(h, static_cast<float*>(states.data), at);
  const IntVec steps = __builtin_convertvector(state_steps(h, load(states.scale + at.parameter)), IntVec);
  const SignedByteVec bytes = __builtin_convertvector(steps, SignedByteVec);
  std::memcpy(static_cast<int8_t*>(states.data) + at.state, &bytes, sizeof bytes);
}

}  // namespace mq_ao
