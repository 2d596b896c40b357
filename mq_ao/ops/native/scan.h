// Selective scan of Mamba-1, forward: the portable core, without torch types.
//
// Channels lie in the vector lanes, states in registers. A task is one batch element and one range of channels of one
// B/C group; tasks are independent, so callers share them out among threads. Time is cut into chunks that keep the
// operands of a range in the first-level cache.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>

#include "vec.h"

namespace mq_ao {

constexpr float kLog2E = 1.44269504088896f;
constexpr int kChunk = 32;      // steps of a chunk
constexpr int kRangeBlocks = 8;  // vector blocks of a forward task's channel range

// A (batch, length, last) or (batch, length, groups, last) array whose last axis is dense; strides in elements.
template <typename T>
struct Rows {
  T* data;
  int64_t batch, time, group;

  T* at(int64_t b, int64_t t, int64_t g = 0) const { return data + b * batch + t * time + g * group; }
};

struct ScanShape {
  int64_t batch, length, channels, groups, d_state;
};

template <typename T>
struct ScanInputs {
  ScanShape shape;
  Rows<const T> u, delta, B, C;
  const float* A;              // (channels, d_state)
  const float* D;              // (channels) or null
  const float* delta_bias;     // (channels) or null
  const float* initial_state;  // (batch, channels, d_state) or null
  bool delta_softplus;
};

// One task's part of the work: channels [first, first + count) of batch element b, all of group g.
struct ScanTask {
  int64_t b, g, first, count;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts (batch, groups, channels of a group) into tasks of at most `range` channels.
struct ScanTasks {
  ScanShape shape;
  int64_t range;

  int64_t group_channels() const { return shape.channels / shape.groups; }
  int64_t ranges() const { return ceil_div(group_channels(), range); }
  int64_t count() const { return shape.batch * shape.groups * ranges(); }
  ScanTask task(int64_t index) const {
    const int64_t r = index % ranges(), g = index / ranges() % shape.groups;
    const int64_t first = g * group_channels() + r * range;
    return {index / ranges() / shape.groups, g, first, std::min(range, group_channels() - r * range)};
  }
};

// Cache-line aligned scratch memory.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(size_t(count) * sizeof(T), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Calls f(constant, first) for groups of 16, 8, 4, 2 and 1 states that together cover [0, d_state).
template <int Group, typename F>
inline void for_groups(int64_t d_state, F&& f, int64_t first = 0) {
  for (; first + Group <= d_state; first += Group) f(std::integral_constant<int, Group>{}, first);
  if constexpr (Group > 1) for_groups<Group / 2>(d_state, f, first);
}

// B or C of a chunk as float rows: the caller's own memory, or a converted copy for bfloat16.
struct FloatRows {
  const float* data;
  int64_t stride;
};
inline FloatRows float_rows(const float* p, int64_t stride, int64_t, int64_t, float*) { return {p, stride}; }
inline FloatRows float_rows(const BFloat16* p, int64_t stride, int64_t steps, int64_t d_state, float* copy) {
  for (int64_t t = 0; t < steps; ++t)
    for (int64_t n = 0; n < d_state; ++n) copy[t * d_state + n] = to_float(p[t * stride + n]);
  return {copy, d_state};
}

// Parameters and state of one vector block, lane by lane: [d_state] vectors each.
struct Block {
  Vec* decay;  // A log2(e)
  Vec* state;
};

template <typename T>
inline void load_block(const ScanInputs<T>& in, int64_t b, int64_t c, int lanes, Block block) {
  const int64_t N = in.shape.d_state;
  for (int64_t n = 0; n < N; ++n) block.decay[n] = gather(in.A + c * N + n, N, lanes) * kLog2E;
  for (int64_t n = 0; n < N; ++n)
    block.state[n] =
        in.initial_state ? gather(in.initial_state + (b * in.shape.channels + c) * N + n, N, lanes) : Vec{};
}

// Step sizes of `steps` rows of one vector block before the softplus.
template <typename T>
inline Vec raw_step(const ScanInputs<T>& in, Vec bias, int64_t b, int64_t t, int64_t c, int lanes) {
  return load(in.delta.at(b, t) + c, lanes) + bias;
}

// h = 2^(dt decay) h + dtu B and y += C h for one group of states over a chunk; h stays in registers.
template <int Group, bool kOutput>
inline void scan_group(
    int steps, const Vec* dt, const Vec* dtu, Vec* y, const Vec* decay, Vec* state, FloatRows B, FloatRows C) {
  Vec h[Group];
  for (int n = 0; n < Group; ++n) h[n] = state[n];
  for (int t = 0; t < steps; ++t) {
    const float* b = B.data + t * B.stride;
    const float* c = C.data + t * C.stride;
    // Two sums, so that the additions of one step do not wait for each other.
    Vec even = kOutput ? y[t] : Vec{}, odd{};
#pragma GCC unroll 16
    for (int n = 0; n < Group; ++n) {
      h[n] = exp2(dt[t] * decay[n]) * h[n] + dtu[t] * b[n];
      if constexpr (kOutput) (n % 2 ? odd : even) += h[n] * c[n];
    }
    if constexpr (kOutput) y[t] = even + odd;
  }
  for (int n = 0; n < Group; ++n) state[n] = h[n];
}

// Calls f with the number of lanes in use, as a constant when all are: loads and stores then have no tail.
template <typename F>
inline void with_lanes(int64_t lanes, F&& f) {
  if (lanes >= kLanes)
    f(std::integral_constant<int, kLanes>{});
  else
    f(int(lanes));
}

// Steps [start, start + steps) of one vector block, whose first channel is c.
template <typename T, typename Lanes>
inline void scan_block(
    const ScanInputs<T>& in, const ScanTask& task, int64_t c, Lanes lanes, int64_t start, int steps, Block block,
    FloatRows B, FloatRows C, Rows<T> y) {
  Vec dt[kChunk], dtu[kChunk], out[kChunk];
  const Vec bias = in.delta_bias ? load(in.delta_bias + c, lanes) : Vec{};
  const Vec skip = in.D ? load(in.D + c, lanes) : Vec{};
  for (int t = 0; t < steps; ++t) {
    // The rows of a range are short and far apart, which hardware prefetchers do not follow.
    const int64_t row = start + t, ahead = std::min(row + kChunk, in.shape.length - 1);
    __builtin_prefetch(in.u.at(task.b, ahead) + c);
    __builtin_prefetch(in.delta.at(task.b, ahead) + c);
    __builtin_prefetch(y.at(task.b, ahead) + c, 1);
    const Vec raw = load(in.delta.at(task.b, row) + c, lanes) + bias;
    const Vec u = load(in.u.at(task.b, row) + c, lanes);
    dt[t] = in.delta_softplus ? softplus(raw) : raw;
    dtu[t] = dt[t] * u;
    out[t] = in.D ? skip * u : Vec{};
  }
  for_groups<kMaxGroup>(in.shape.d_state, [&](auto group, int64_t n) {
    scan_group<decltype(group)::value, true>(
        steps, dt, dtu, out, block.decay + n, block.state + n, {B.data + n, B.stride}, {C.data + n, C.stride});
  });
  for (int t = 0; t < steps; ++t) store(out[t], y.at(task.b, start + t) + c, lanes);
}

template <typename T>
void scan_task(const ScanInputs<T>& in, const ScanTask& task, Rows<T> y, float* last_state) {
  const int64_t N = in.shape.d_state;
  const int64_t blocks = ceil_div(task.count, kLanes);
  const Scratch<Vec> block_memory(blocks * 2 * N);
  const Scratch<float> row_memory(sizeof(T) == sizeof(float) ? 1 : 2 * kChunk * N);
  const auto block_at = [&](int64_t i) {
    return Block{block_memory.get() + 2 * i * N, block_memory.get() + (2 * i + 1) * N};
  };
  const auto lanes_of = [&](int64_t i) { return int(std::min<int64_t>(kLanes, task.count - i * kLanes)); };
  for (int64_t i = 0; i < blocks; ++i) load_block(in, task.b, task.first + i * kLanes, lanes_of(i), block_at(i));

  for (int64_t start = 0; start < in.shape.length; start += kChunk) {
    const int steps = int(std::min<int64_t>(kChunk, in.shape.length - start));
    const FloatRows B = float_rows(in.B.at(task.b, start, task.g), in.B.time, steps, N, row_memory.get());
    const FloatRows C = float_rows(in.C.at(task.b, start, task.g), in.C.time, steps, N, row_memory.get() + kChunk * N);
    for (int64_t i = 0; i < blocks; ++i)
      with_lanes(lanes_of(i), [&](auto lanes) {
        scan_block(in, task, task.first + i * kLanes, lanes, start, steps, block_at(i), B, C, y);
      });
  }
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t c = task.first + i * kLanes;
    for (int64_t n = 0; n < N; ++n)
      scatter(block_at(i).state[n], last_state + (task.b * in.shape.channels + c) * N + n, N, lanes_of(i));
  }
}

// A task of a sequence of length 1: states lie in the vector lanes as they do in memory, so nothing is transposed.
// d_state must be a multiple of kLanes.
template <typename T>
void scan_step(const ScanInputs<T>& in, const ScanTask& task, Rows<T> y, float* last_state) {
  const int64_t N = in.shape.d_state, b = task.b, end = task.first + task.count;
  const T *B = in.B.at(b, 0, task.g), *C = in.C.at(b, 0, task.g);
  for (int64_t c = task.first; c < end; c += kLanes) {
    const int lanes = int(std::min<int64_t>(kLanes, end - c));
    const Vec bias = in.delta_bias ? load(in.delta_bias + c, lanes) : Vec{};
    const Vec raw = raw_step(in, bias, b, 0, c, lanes);
    const Vec dt = in.delta_softplus ? softplus(raw) : raw;
    const Vec u = load(in.u.at(b, 0) + c, lanes);
    float exponent[kLanes], dtu[kLanes], sums[kLanes] = {};
    store(dt * kLog2E, exponent);
    store(dt * u, dtu);
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t row = (b * in.shape.channels + c + lane) * N;
      Vec total{};
      for (int64_t n = 0; n < N; n += kLanes) {
        Vec h = dtu[lane] * load(B + n);
        if (in.initial_state)
          h += exp2(exponent[lane] * load(in.A + (c + lane) * N + n)) * load(in.initial_state + row + n);
        store(h, last_state + row + n);
        total += h * load(C + n);
      }
      sums[lane] = sum(total);
    }
    const Vec out = load(sums) + (in.D ? load(in.D + c, lanes) * u : Vec{});
    store(out, y.at(b, 0) + c, lanes);
  }
}

}  // namespace mq_ao
