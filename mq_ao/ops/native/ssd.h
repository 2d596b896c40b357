// The recurrence of Mamba-2, forward: the portable core, without torch types.
//
// The block decomposition of Dao and Gu 2024, section 6. Time is cut into chunks of at most kSsdChunk steps, none of
// which crosses the start of a sequence. With c[i] the log2 of the decay from before the chunk to its step i,
//
//   y[i] = 2^c[i] C[i] h + sum_{j <= i} (C[i] . B[j]) 2^(c[i] - c[j]) step[j] x[j],
//   h   <- 2^c[last] h + sum_j 2^(c[last] - c[j]) step[j] B[j] x[j]^T,
//
// so that nearly all of the work is matrix products. Exponents are differences within a chunk and never positive. c is
// added up in float64 and kept as a sum of two floats, so that a step that forgets everything does not blur those
// around it. Columns of headdim lie in the vector lanes, of states too, which for this are transposed to
// (d_state, headdim). Tasks are heads or ranges of their columns, which do not see each other: results do not depend on
// how they are shared out. A few steps, or one, are taken one by one on states as they lie in memory.
#pragma once

#include "tasks.h"

namespace mq_ao {

constexpr int kSsdChunk = 64;        // steps of a chunk, a multiple of every kLanes
constexpr int64_t kSsdFewSteps = 12;  // shorter sequences are taken step by step
constexpr int kSsdRows = kMaxGroup == 16 ? 8 : 4;  // a tile of a product, which lies in registers, has two vectors a row

struct SsdShape {
  int64_t batch, length, heads, headdim, groups, d_state;

  int64_t group_heads() const { return heads / groups; }
  // Where row (b, h, p) of a (batch, heads, headdim, d_state) array begins.
  int64_t state(int64_t b, int64_t h, int64_t p) const { return ((b * heads + h) * headdim + p) * d_state; }
};

// Source: rows of heads * headdim columns, and of heads. T: elements of B and C.
template <typename Source, typename T>
struct SsdOperands {
  SsdShape shape;
  Source x, dt;
  Rows<const T> B, C;
  const float* A;              // (heads)
  const float* D;              // (heads), or with `wide_D` (heads, headdim), or null
  const float* dt_bias;        // (heads) or null
  const float* initial_state;  // (batch, heads, headdim, d_state) or null
  const int64_t* seq_idx;      // (batch, length) or null
  bool wide_D, dt_softplus;
  float dt_min, dt_max;

  // Whether step t belongs to another sequence than the one before it.
  bool restarts(int64_t b, int64_t t) const {
    if (!seq_idx || t == 0) return false;
    const int64_t* at = seq_idx + b * shape.length + t;
    return at[0] != at[-1];
  }
  // Of columns p, p + 1, ... of head h.
  Vec skip(int64_t h, int64_t p, int lanes) const {
    if (!D) return Vec{};
    return wide_D ? load(D + h * shape.headdim + p, lanes) : broadcast(D[h]);
  }
};

template <typename T>
using SsdInputs = SsdOperands<Rows<const T>, T>;

// Columns [first, first + width) of heads [head, head + heads), all of group g, of batch element b.
struct SsdTask {
  int64_t b, g, head, heads, first, width;
};

// Cuts (batch, groups, ranges of columns, heads of a group) into units, and ranges of units into tasks.
struct SsdTasks {
  SsdShape shape;

  // Heads of their own are enough for many threads; a few heads are cut, which costs their decays several times.
  int64_t range() const { return shape.batch * shape.heads < 16 ? 2 * kLanes : shape.headdim; }
  int64_t ranges() const { return ceil_div(shape.headdim, range()); }
  int64_t units() const { return shape.batch * shape.heads * ranges(); }
  // The task that begins with a unit and ends before `end` at the latest: its heads share what C and B alone make.
  SsdTask task(int64_t unit, int64_t end) const {
    const int64_t h = unit % shape.group_heads(), block = unit / shape.group_heads();
    const int64_t r = block % ranges(), g = block / ranges() % shape.groups;
    const int64_t heads = std::min({shape.group_heads() - h, end - unit, int64_t(kLanes)});
    return {block / ranges() / shape.groups, g, g * shape.group_heads() + h, heads, r * range(),
            std::min(range(), shape.headdim - r * range())};
  }
};

// Step sizes of neighbouring heads.
template <typename In>
inline Vec ssd_step_sizes(const In& in, const SsdTask& task, int64_t t) {
  const int lanes = int(task.heads);
  Vec raw = load_row(in.dt, task.b, t, task.head, lanes);
  if (in.dt_bias) raw += load(in.dt_bias + task.head, lanes);
  return at_most(at_least(in.dt_softplus ? softplus(raw) : raw, in.dt_min), in.dt_max);
}

// acc[i][v] += sum_k left[i * row + k * inner] right[k][v], of `count` rows of `right`, `stride` apart.
template <int R, int V>
inline void accumulate(
    Vec (&acc)[R][V], const float* left, int64_t row, int64_t inner, const float* right, int64_t stride,
    int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    Vec columns[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) columns[v] = load(right + k * stride + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[i][v] += left[i * row + k * inner] * columns[v];
  }
}

// Calls f(rows, first row, vectors, first column) for tiles that cover `rows` rows of `columns` columns (whole vectors).
template <typename F>
inline void for_tiles(int64_t rows, int64_t columns, F&& f) {
  for_groups<kSsdRows>(rows, [&](auto R, int64_t i) {
    for_groups<2>(columns / kLanes, [&](auto V, int64_t v) { f(R, i, V, v * kLanes); });
  });
}

// A task of the block decomposition with its work memory.
template <typename In, typename Output>
class SsdChunks {
 public:
  SsdChunks(const In& in, const SsdTask& task, const Output& y)
      : in_(in),
        task_(task),
        y_(y),
        N_(in.shape.d_state),
        width_(ceil_div(task.width, kLanes) * kLanes),
        memory_(kSsdChunk * (4 * N_ + 2 * kSsdChunk + 3 * width_ + kLanes) + task.heads * N_ * width_) {
    float* next = memory_.get();
    const auto take = [&](int64_t count) {
      float* taken = next;
      next += count;
      return taken;
    };
    products_ = take(kSsdChunk * kSsdChunk);
    mixing_ = take(kSsdChunk * kSsdChunk);
    values_ = take(kSsdChunk * width_);
    weighted_ = take(kSsdChunk * width_);
    out_ = take(kSsdChunk * width_);
    steps_ = take(kSsdChunk * kLanes);
    transposed_ = take(kSsdChunk * N_);
    B_copy_ = take(kSsdChunk * N_);
    C_copy_ = take(kSsdChunk * N_);
    states_ = take(task.heads * N_ * width_);
  }

  void run(float* last_state) {
    bool zero = !in_.initial_state;
    if (!zero) read_states(in_.initial_state);
    for (int64_t start = 0; start < in_.shape.length;) {
      zero |= in_.restarts(task_.b, start);
      int steps = 1;
      while (steps < kSsdChunk && start + steps < in_.shape.length && !in_.restarts(task_.b, start + steps)) ++steps;
      chunk(start, steps, zero);
      zero = false;
      start += steps;
    }
    write_states(last_state);
  }

 private:
  // States of the task's head k: (d_state, width_).
  float* state(int64_t k) const { return states_ + k * N_ * width_; }

  void read_states(const float* from) {
    for (int64_t k = 0; k < task_.heads; ++k) {
      const float* rows = from + in_.shape.state(task_.b, task_.head + k, task_.first);
      for (int64_t n = 0; n < N_; ++n)
        for (int64_t p = 0; p < width_; ++p) state(k)[n * width_ + p] = p < task_.width ? rows[p * N_ + n] : 0.0f;
    }
  }

  void write_states(float* to) const {
    for (int64_t k = 0; k < task_.heads; ++k) {
      float* rows = to + in_.shape.state(task_.b, task_.head + k, task_.first);
      for (int64_t p = 0; p < task_.width; ++p)
        for (int64_t n = 0; n < N_; ++n) rows[p * N_ + n] = state(k)[n * width_ + p];
    }
  }

  void chunk(int64_t start, int steps, bool zero) {
    const FloatRows B = float_rows(in_.B.at(task_.b, start, task_.g), in_.B.time, steps, N_, B_copy_);
    const FloatRows C = float_rows(in_.C.at(task_.b, start, task_.g), in_.C.time, steps, N_, C_copy_);
    multiply_B_and_C(steps, B, C);
    for (int t = 0; t < steps; ++t) store(ssd_step_sizes(in_, task_, start + t), steps_ + t * kLanes);
    for (int64_t k = 0; k < task_.heads; ++k) {
      load_decays(steps, k);
      load_values(start, steps, task_.head + k);
      mix(steps);
      outputs(steps, C, zero ? nullptr : state(k));
      store_outputs(start, steps, task_.head + k);
      carry(steps, B, state(k), zero);
    }
  }

  // products[i][j] = C[i] . B[j] for j <= i; what lies further right is not read.
  void multiply_B_and_C(int steps, FloatRows B, FloatRows C) {
    for (int64_t n = 0; n < N_; ++n)
      for (int j = 0; j < kSsdChunk; ++j) transposed_[n * kSsdChunk + j] = j < steps ? B.data[j * B.stride + n] : 0.0f;
    for_tiles(steps, kSsdChunk, [&](auto R, int64_t i, auto V, int64_t j) {
      if (j >= i + R) return;
      Vec acc[R][V] = {};
      accumulate<R, V>(acc, C.data + i * C.stride, C.stride, 1, transposed_ + j, kSsdChunk, N_);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(acc[r][v], products_ + (i + r) * kSsdChunk + j + v * kLanes);
    });
  }

  // Step sizes and decays of the task's head k.
  void load_decays(int steps, int64_t k) {
    constexpr double kForgotten = -160.0;  // 2^-160 is 0, and sums of such exponents are finite
    const double rate = double(in_.A[task_.head + k]) * double(kLog2E);
    double sum = 0.0;
    for (int t = 0; t < kSsdChunk; ++t) {
      step_[t] = t < steps ? steps_[t * kLanes + k] : 0.0f;
      const double exponent = double(step_[t]) * rate;
      sum += exponent < kForgotten ? kForgotten : exponent;
      high_[t] = float(sum);
      low_[t] = float(sum - double(high_[t]));
    }
    for (int t = 0; t < kSsdChunk; t += kLanes) {
      const int last = steps - 1;
      store(exp2(load(high_ + t)), from_start_ + t);
      store(exp2((high_[last] - load(high_ + t)) + (low_[last] - load(low_ + t))) * load(step_ + t), to_end_ + t);
    }
  }

  void load_values(int64_t start, int steps, int64_t h) {
    for (int t = 0; t < steps; ++t)
      for_vectors(task_.width, [&](int64_t p, auto lanes) {
        const Vec x = load_row(in_.x, task_.b, start + t, h * in_.shape.headdim + task_.first + p, lanes);
        store(x, values_ + t * width_ + p);
        store(to_end_[t] * x, weighted_ + t * width_ + p);
      });
  }

  // mixing[i][j]: what y[i] has of x[j]. What lies right of the diagonal is not read.
  void mix(int steps) {
    for (int i = 0; i < steps; ++i)
      for (int j = 0; j <= i; j += kLanes) {
        const Vec exponent = (high_[i] - load(high_ + j)) + (low_[i] - load(low_ + j));
        store(load(products_ + i * kSsdChunk + j) * exp2(exponent) * load(step_ + j), mixing_ + i * kSsdChunk + j);
      }
  }

  // out = 2^c C h + mixing x; `h` is null for zero.
  void outputs(int steps, FloatRows C, const float* h) {
    for_tiles(steps, width_, [&](auto R, int64_t i, auto V, int64_t p) {
      Vec acc[R][V] = {};
      if (h) {
        accumulate<R, V>(acc, C.data + i * C.stride, C.stride, 1, h + p, width_, N_);
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) acc[r][v] *= from_start_[i + r];
      }
      const float* mixing = mixing_ + i * kSsdChunk;
      accumulate<R, V>(acc, mixing, kSsdChunk, 1, values_ + p, width_, i);
      // The tile on the diagonal is a triangle: a NaN must not reach the steps before it, even times zero.
      for (int r = 0; r < R; ++r)
        for (int j = 0; j <= r; ++j)
          for (int v = 0; v < V; ++v)
            acc[r][v] += mixing[r * kSsdChunk + i + j] * load(values_ + (i + j) * width_ + p + v * kLanes);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(acc[r][v], out_ + (i + r) * width_ + p + v * kLanes);
    });
  }

  void store_outputs(int64_t start, int steps, int64_t h) const {
    for (int t = 0; t < steps; ++t)
      for_vectors(task_.width, [&](int64_t p, auto lanes) {
        Vec y = load(out_ + t * width_ + p);
        if (in_.D) y += in_.skip(h, task_.first + p, lanes) * load(values_ + t * width_ + p);
        store_row(y, y_, task_.b, start + t, h * in_.shape.headdim + task_.first + p, lanes);
      });
  }

  // h = 2^c[last] h + B^T weighted.
  void carry(int steps, FloatRows B, float* h, bool zero) {
    const float decay = from_start_[steps - 1];
    for_tiles(N_, width_, [&](auto R, int64_t n, auto V, int64_t p) {
      Vec acc[R][V] = {};
      if (!zero)
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) acc[r][v] = decay * load(h + (n + r) * width_ + p + v * kLanes);
      accumulate<R, V>(acc, B.data + n, 1, B.stride, weighted_ + p, width_, steps);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(acc[r][v], h + (n + r) * width_ + p + v * kLanes);
    });
  }

  const In& in_;
  const SsdTask task_;
  const Output& y_;
  const int64_t N_, width_;  // d_state; the task's columns in whole vectors
  const Scratch<float> memory_;
  float *products_, *mixing_, *values_, *weighted_, *out_, *steps_, *transposed_, *B_copy_, *C_copy_, *states_;
  // Of one head: step sizes, c as a sum of two floats, 2^c, and step 2^(c[last] - c).
  alignas(64) float step_[kSsdChunk], high_[kSsdChunk], low_[kSsdChunk], from_start_[kSsdChunk], to_end_[kSsdChunk];
};

// One row of states, one step on, and its product with C. `before` is null for zero.
inline float ssd_step_row(float dtx, float decay, const float* before, const float* B, const float* C, int64_t N,
                          float* after) {
  Vec total{};
  for_vectors(N, [&](int64_t n, auto lanes) {
    Vec h = dtx * load(B + n, lanes);
    if (before) h += decay * load(before + n, lanes);
    store(h, after + n, lanes);
    total += h * load(C + n, lanes);
  });
  return sum(total);
}

// A task of a few steps: states lie in the vector lanes as they do in memory, so nothing is transposed.
template <typename In, typename Output>
void ssd_few_steps(const In& in, const SsdTask& task, const Output& y, float* last_state) {
  const int64_t N = in.shape.d_state, headdim = in.shape.headdim;
  const Scratch<float> copies(2 * N);
  for (int64_t t = 0; t < in.shape.length; ++t) {
    const float* B = float_rows(in.B.at(task.b, t, task.g), in.B.time, 1, N, copies.get()).data;
    const float* C = float_rows(in.C.at(task.b, t, task.g), in.C.time, 1, N, copies.get() + N).data;
    const float* before = in.restarts(task.b, t) ? nullptr : t > 0 ? last_state : in.initial_state;
    float step[kLanes], decay[kLanes], dtx[kLanes], sums[kLanes] = {};
    const Vec sizes = ssd_step_sizes(in, task, t);
    store(sizes, step);
    store(exp2(sizes * (load(in.A + task.head, int(task.heads)) * kLog2E)), decay);
    for (int64_t k = 0; k < task.heads; ++k) {
      const int64_t h = task.head + k, end = task.first + task.width;
      for (int64_t p = task.first; p < end; p += kLanes) {
        const int lanes = int(std::min<int64_t>(kLanes, end - p));
        const Vec x = load_row(in.x, task.b, t, h * headdim + p, lanes);
        store(step[k] * x, dtx);
        for (int lane = 0; lane < lanes; ++lane) {
          const int64_t at = in.shape.state(task.b, h, p + lane);
          sums[lane] = ssd_step_row(dtx[lane], decay[k], before ? before + at : nullptr, B, C, N, last_state + at);
        }
        store_row(load(sums) + in.skip(h, p, lanes) * x, y, task.b, t, h * headdim + p, lanes);
      }
    }
  }
}

// Writes y and the last state (batch, heads, headdim, d_state). Output: what store_row takes.
template <typename In, typename Output, typename Threads>
void run_ssd(const In& in, const Output& y, float* last_state, Threads&& threads) {
  const SsdShape& s = in.shape;
  const SsdTasks tasks{s};
  // A thread is woken for 32768 updates of a state, some microseconds of work.
  const int64_t grain = std::max<int64_t>(1, 32768 / (s.length * std::min(tasks.range(), s.headdim) * s.d_state));
  threads(tasks.units(), grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const SsdTask task = tasks.task(begin, end);
      if (s.length < kSsdFewSteps)
        ssd_few_steps(in, task, y, last_state);
      else
        SsdChunks<In, Output>(in, task, y).run(last_state);
      begin += task.heads;
    }
  });
}

}  // namespace mq_ao
