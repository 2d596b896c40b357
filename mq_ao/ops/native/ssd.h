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
constexpr int kSsdPanel = 2 * kLanes;  // columns of a product
constexpr int kSsdRows = kMaxGroup == 16 ? 8 : 4;  // of a product whose sums lie in registers

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
  int64_t range() const { return shape.batch * shape.heads < 16 ? kSsdPanel : shape.headdim; }
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

// acc[i][v] += sum_k left[i][k] right[k][v] over `count` k; rows of `left` are `row` apart, those of `right` `stride`.
template <int R, int V>
inline void accumulate(
    Vec (&acc)[R][V], const float* left, int64_t row, const float* right, int64_t stride, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    Vec columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load(right + k * stride + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] += left[i * row + k] * columns[v];
  }
}

// Calls f(constant number of vectors) for a panel, which has two or, at the end of headdim, one.
template <typename F>
inline void with_vectors(int64_t columns, F&& f) {
  columns > kLanes ? f(std::integral_constant<int, 2>{}) : f(std::integral_constant<int, 1>{});
}

// A task of the block decomposition with its work memory. Columns are worked on in panels of kSsdPanel, which lie
// together: what a panel needs stays in the first-level cache.
template <typename In, typename Output>
class SsdChunks {
 public:
  SsdChunks(const In& in, const SsdTask& task, const Output& y)
      : in_(in),
        task_(task),
        y_(y),
        N_(in.shape.d_state),
        panels_(ceil_div(task.width, kSsdPanel)),
        memory_(kSsdChunk * (2 * kSsdChunk + 3 * kSsdPanel + kLanes + 2 * N_) +
                task.heads * panels_ * N_ * kSsdPanel) {
    float* next = memory_.get();
    const auto take = [&](int64_t count) {
      float* taken = next;
      next += count;
      return taken;
    };
    products_ = take(kSsdChunk * kSsdChunk);
    mixing_ = take(kSsdChunk * kSsdChunk);
    values_ = take(kSsdChunk * kSsdPanel);
    weighted_ = take(kSsdChunk * kSsdPanel);
    out_ = take(kSsdChunk * kSsdPanel);
    steps_ = take(kSsdChunk * kLanes);
    states_ = take(task.heads * panels_ * N_ * kSsdPanel);
    B_ = take(kSsdChunk * N_);
    C_ = take(kSsdChunk * N_);
  }

  void run(float* last_state) {
    bool zero = !in_.initial_state;
    if (!zero) read_states();
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
  // One panel of one head: columns [first, first + columns), whose states are (d_state, kSsdPanel).
  struct Panel {
    int64_t head, first, columns;
    float* state;
  };

  Panel panel(int64_t k, int64_t i) const {
    const int64_t first = i * kSsdPanel;
    return {task_.head + k, task_.first + first, std::min<int64_t>(kSsdPanel, task_.width - first),
            states_ + (k * panels_ + i) * N_ * kSsdPanel};
  }

  // Calls f(panel, offset of its states) for all heads.
  template <typename F>
  void for_panels(F&& f) const {
    for (int64_t k = 0; k < task_.heads; ++k)
      for (int64_t i = 0; i < panels_; ++i) {
        const Panel at = panel(k, i);
        f(at, in_.shape.state(task_.b, at.head, at.first));
      }
  }

  void read_states() {
    for_panels([&](const Panel& at, int64_t offset) {
      for (int64_t n = 0; n < N_; ++n)
        for (int64_t p = 0; p < kSsdPanel; ++p)
          at.state[n * kSsdPanel + p] = p < at.columns ? in_.initial_state[offset + p * N_ + n] : 0.0f;
    });
  }

  void write_states(float* to) const {
    for_panels([&](const Panel& at, int64_t offset) {
      for (int64_t p = 0; p < at.columns; ++p)
        for (int64_t n = 0; n < N_; ++n) to[offset + p * N_ + n] = at.state[n * kSsdPanel + p];
    });
  }

  void chunk(int64_t start, int steps, bool zero) {
    load_B_and_C(start, steps);
    multiply_B_and_C(steps);
    for (int t = 0; t < steps; ++t) store(ssd_step_sizes(in_, task_, start + t), steps_ + t * kLanes);
    for (int64_t k = 0; k < task_.heads; ++k) {
      load_decays(steps, k);
      mix(steps);
      for (int64_t i = 0; i < panels_; ++i) {
        const Panel at = panel(k, i);
        load_values(start, steps, at);
        with_vectors(at.columns, [&](auto V) {
          outputs<V>(steps, zero ? nullptr : at.state);
          carry<V>(steps, at.state, zero);
        });
        store_outputs(start, steps, at);
      }
    }
  }

  // B (d_state, kSsdChunk), so transposed, and C (steps, d_state): near each other, as many heads read them.
  void load_B_and_C(int64_t start, int steps) {
    for (int t = 0; t < steps; ++t) {
      const auto *b = in_.B.at(task_.b, start + t, task_.g), *c = in_.C.at(task_.b, start + t, task_.g);
      for (int64_t n = 0; n < N_; ++n) B_[n * kSsdChunk + t] = to_float(b[n]);
      for (int64_t n = 0; n < N_; ++n) C_[t * N_ + n] = to_float(c[n]);
    }
    for (int64_t n = 0; n < N_; ++n) std::fill(B_ + n * kSsdChunk + steps, B_ + (n + 1) * kSsdChunk, 0.0f);
  }

  // products[i][j] = C[i] . B[j] for j <= i; what lies further right is not read.
  void multiply_B_and_C(int steps) {
    for_groups<kSsdRows>(steps, [&](auto R, int64_t i) {
      for (int64_t j = 0; j < i + R; j += kLanes) {
        Vec acc[R][1] = {};
        accumulate<R, 1>(acc, C_ + i * N_, N_, B_ + j, kSsdChunk, N_);
        for (int r = 0; r < R; ++r) store(acc[r][0], products_ + (i + r) * kSsdChunk + j);
      }
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
    const int last = steps - 1;
    for (int t = 0; t < kSsdChunk; t += kLanes) {
      store(exp2(load(high_ + t)), from_start_ + t);
      store(exp2((high_[last] - load(high_ + t)) + (low_[last] - load(low_ + t))) * load(step_ + t), to_end_ + t);
    }
  }

  // mixing[i][j]: what y[i] has of x[j]. What lies right of the diagonal is not read.
  void mix(int steps) {
    for (int i = 0; i < steps; ++i)
      for (int j = 0; j <= i; j += kLanes) {
        const Vec exponent = (high_[i] - load(high_ + j)) + (low_[i] - load(low_ + j));
        store(load(products_ + i * kSsdChunk + j) * exp2(exponent) * load(step_ + j), mixing_ + i * kSsdChunk + j);
      }
  }

  void load_values(int64_t start, int steps, const Panel& at) {
    for (int t = 0; t < steps; ++t)
      for_vectors(at.columns, [&](int64_t p, auto lanes) {
        // Rows are short and far apart, which hardware prefetchers do not follow: of the next panel, and of this one's
        // output.
        const int64_t column = at.head * in_.shape.headdim + at.first + p;
        __builtin_prefetch(row_address(in_.x, task_.b, start + t, column + kSsdPanel));
        __builtin_prefetch(row_address(y_, task_.b, start + t, column), 1);
        const Vec x = load_row(in_.x, task_.b, start + t, column, lanes);
        store(x, values_ + t * kSsdPanel + p);
        store(to_end_[t] * x, weighted_ + t * kSsdPanel + p);
      });
  }

  // out = 2^c C h + mixing x; `h` is null for zero.
  template <int V>
  void outputs(int steps, const float* h) {
    for_groups<kSsdRows>(steps, [&](auto R, int64_t i) {
      Vec acc[R][V] = {};
      if (h) {
        accumulate<R, V>(acc, C_ + i * N_, N_, h, kSsdPanel, N_);
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) acc[r][v] *= from_start_[i + r];
      }
      const float* mixing = mixing_ + i * kSsdChunk;
      accumulate<R, V>(acc, mixing, kSsdChunk, values_, kSsdPanel, i);
      // The tile on the diagonal is a triangle: a NaN must not reach the steps before it, even times zero.
      for (int r = 0; r < R; ++r)
        for (int j = 0; j <= r; ++j)
          for (int v = 0; v < V; ++v)
            acc[r][v] += mixing[r * kSsdChunk + i + j] * load(values_ + (i + j) * kSsdPanel + v * kLanes);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(acc[r][v], out_ + (i + r) * kSsdPanel + v * kLanes);
    });
  }

  // h = 2^c[last] h + B^T weighted.
  template <int V>
  void carry(int steps, float* h, bool zero) {
    const float decay = from_start_[steps - 1];
    for_groups<kSsdRows>(N_, [&](auto R, int64_t n) {
      float* state = h + n * kSsdPanel;
      Vec acc[R][V] = {};
      if (!zero)
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) acc[r][v] = decay * load(state + r * kSsdPanel + v * kLanes);
      accumulate<R, V>(acc, B_ + n * kSsdChunk, kSsdChunk, weighted_, kSsdPanel, steps);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(acc[r][v], state + r * kSsdPanel + v * kLanes);
    });
  }

  void store_outputs(int64_t start, int steps, const Panel& at) const {
    for (int t = 0; t < steps; ++t)
      for_vectors(at.columns, [&](int64_t p, auto lanes) {
        Vec y = load(out_ + t * kSsdPanel + p);
        if (in_.D) y += in_.skip(at.head, at.first + p, lanes) * load(values_ + t * kSsdPanel + p);
        store_row(y, y_, task_.b, start + t, at.head * in_.shape.headdim + at.first + p, lanes);
      });
  }

  const In& in_;
  const SsdTask task_;
  const Output& y_;
  const int64_t N_, panels_;  // d_state; panels of a head's columns
  const Scratch<float> memory_;
  float *products_, *mixing_, *values_, *weighted_, *out_, *steps_, *states_, *B_, *C_;
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
