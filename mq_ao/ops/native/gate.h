// The gate of a Mamba block, with rotation and quantization, row by row: the portable core, without torch types.
//
//   x = y * z * sigmoid(s * z),   x <- x @ matrix(n) if rotated,   q = quantized x where integers are asked for
// A row stays in the first-level cache from the gate to the integers.
#pragma once

#include "hadamard.h"
#include "qgemm.h"
#include "tasks.h"

namespace mq_ao::gate {

inline Vec widen(qgemm::ByteVec bytes) {
#if defined(MQ_AO_AVX512)
  return __builtin_convertvector(bit_cast<IntVec>(_mm512_cvtepu8_epi32(bit_cast<__m128i>(bytes))), Vec);
#else
  // By way of 16 bits: GCC 12 takes a direct conversion of bytes to 32 bits apart into scalars.
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, HalfVec), IntVec), Vec);
#endif
}

// Rows of n adjacent values, `stride` apart: float, or uint8_t that stands for (q - zero_point) * scale.
template <typename T>
struct Operand {
  const T* data;
  int64_t stride;
  float scale, zero_point;

  template <typename Count>
  Vec at(int64_t row, int64_t i, Count lanes) const {
    const T* p = data + row * stride + i;
    if constexpr (std::is_same_v<T, float>) {
      return load(p, lanes);
    } else {
      qgemm::ByteVec bytes{};
      std::memcpy(&bytes, p, size_t(int(lanes)));
      return (widen(bytes) - zero_point) * scale;
    }
  }
};

template <typename Y, typename Z>
struct Gate {
  Operand<Y> y;
  Operand<Z> z;
  const float* s;  // (n), or null for ones
  int64_t n;
  const hadamard::Plan* plan;  // null: not rotated

  int64_t work_size() const { return plan ? plan->work_size() : 0; }

  // One row as floats.
  void run(int64_t row, float* x, float* work) const {
    for_vectors(n, [&](int64_t i, auto lanes) {
      const Vec v = z.at(row, i, lanes), smooth = s ? v * load(s + i, lanes) : v;
      store(y.at(row, i, lanes) * (v / (1.0f + exp(-smooth))), x + i, lanes);
    });
    if (plan) hadamard::rotate(*plan, x, work);
  }
};

// Calls part(begin, end) for ranges of rows of n values.
template <typename Threads, typename Part>
void for_ranges(int64_t rows, int64_t n, Threads&& threads, Part&& part) {
  for_row_ranges(rows, n, 16384, threads, part);
}

// All rows as floats; `x` is dense.
template <typename Y, typename Z, typename Threads>
void run_rows(const Gate<Y, Z>& gate, int64_t rows, float* x, Threads&& threads) {
  for_ranges(rows, gate.n, threads, [&](int64_t begin, int64_t end) {
    const Scratch<float> work(gate.work_size());
    for (int64_t i = begin; i < end; ++i) gate.run(i, x + i * gate.n, work.get());
  });
}

// One row by one scale for all.
inline void quantize_row(const float* x, int64_t n, const qgemm::Requantizer& requantize, uint8_t* q) {
  for_vectors(n, [&](int64_t i, auto lanes) {
    const auto bytes = requantize(load(x + i, lanes));
    std::memcpy(q + i, &bytes, size_t(int(lanes)));
  });
}

}  // namespace mq_ao::gate
