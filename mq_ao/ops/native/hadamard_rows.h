// mq_ao::hadamard of many rows: the portable core, without torch types.
#pragma once

#include "hadamard.h"
#include "tasks.h"

namespace mq_ao::hadamard {

// row <- x * scale
template <typename T>
void load_row(const T* x, const float* scale, int64_t n, float* row) {
  for_vectors(n, [&](int64_t i, auto lanes) {
    const Vec v = load(x + i, lanes);
    store(scale ? v * load(scale + i, lanes) : v, row + i, lanes);
  });
}

inline void store_row(const float* row, int64_t n, BFloat16* y) {
  for_vectors(n, [&](int64_t i, auto lanes) { store(load(row + i, lanes), y + i, lanes); });
}

// y <- (x * scale) @ matrix(n) for rows of x that are `stride` apart; y is dense. `scale` may be null.
template <typename T, typename Threads>
void rotate_rows(
    const Plan& plan, const T* x, int64_t stride, int64_t rows, const float* scale, T* y, Threads&& threads) {
  const int64_t n = plan.n;
  for_row_ranges(rows, n, 32768, threads, [&](int64_t begin, int64_t end) {
    const Scratch<float> work(plan.work_size());
    if constexpr (std::is_same_v<T, float>) {
      for (int64_t i = begin; i < end; ++i) {
        load_row(x + i * stride, scale, n, y + i * n);
        rotate(plan, y + i * n, work.get());
      }
    } else {
      const Scratch<float> row(n);
      for (int64_t i = begin; i < end; ++i) {
        load_row(x + i * stride, scale, n, row.get());
        rotate(plan, row.get(), work.get());
        store_row(row.get(), n, y + i * n);
      }
    }
  });
}

}  // namespace mq_ao::hadamard
