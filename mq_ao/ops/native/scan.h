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

// Rows of channels and arrays of states as the scan sees them. Overloads in qrows.h take 8-bit numbers.
template <typename T>
inline const void* row_address(const Rows<T>& rows, int64_t b, int64_t t, int64_t c) {
  return rows.at(b, t) + c;
}
template <typename T>
inline Vec load_row(const Rows<T>& rows, int64_t b, int64_t t, int64_t c, int lanes) {
  return load(rows.at(b, t) + c, lanes);
}
template <typename T>
inline void store_row(Vec v, const Rows<T>& rows, int64_t b, int64_t t, int64_t c, int lanes) {
  store(v, rows.at(b, t) + c, lanes);
}

// Where a state lies in (batch, channels, d_state), and its parameters in (channels, d_state).
struct StateIndex {
  int64_t state, parameter;
};
// States of neighbouring channels: `stride` elements apart.
inline Vec gather_state(const float* states, StateIndex at, int64_t stride, int lanes) {
  return gather(states + at.state, stride, lanes);
}
inline void scatter_state(Vec h, float* states, StateIndex at, int64_t stride, int lanes) {
  scatter(h, states + at.state, stride, lanes);
}
// States of one channel.
inline Vec load_state(const float* states, StateIndex at) { return load(states + at.state); }
inline void store_state(Vec h, float* states, StateIndex at) { store(h, states + at.state); }

struct ScanShape {
  int64_t batch, length, channels, groups, d_state;

  StateIndex index(int64_t b, int64_t c, int64_t n) const {
    return {(b * channels + c) * d_state + n, c * d_state + n};
  }
};

// Source: rows of channels. T: elements of B and C. State: what gather_state and load_state read, or false.
template <typename Source, typename T, typename State>
struct ScanOperands {
  ScanShape shape;
  Source u, delta;
  Rows<const T> B, C;
  const float* A;           // (channels, d_state)
  const float* D;           // (channels) or null
  const float* delta_bias;  // (channels) or null
  State initial_state;      // (batch, channels, d_state) or null
  bool delta_softplus;
};

template <typename T>
using ScanInputs = ScanOperands<Rows<const T>, T, const float*>;

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

template <typename In>
inline void load_block(const In& in, int64_t b, int64_t c, int lanes, Block block) {
  const int64_t N = in.shape.d_state;
  for (int64_t n = 0; n < N; ++n) block.decay[n] = gather(in.A + c * N + n, N, lanes) * kLog2E;
  for (int64_t n = 0; n < N; ++n)
    block.state[n] = in.initial_state ? gather_state(in.initial_state, in.shape.index(b, c, n), N, lanes) : Vec{};
}

// The step size of one row of a vector block before the softplus.
template <typename In>
inline Vec raw_step(const In& in, Vec bias, int64_t b, int64_t t, int64_t c, int lanes) {
  return load_row(in.delta, b, t, c, lanes) + bias;
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

// One vector block, whose first channel is c, in steps [start, start + steps): dt, dt u, and each(t, u) for the caller.
template <typename In, typename Lanes, typename Each>
inline void load_steps(
    const In& in, int64_t b, int64_t c, Lanes lanes, int64_t start, int steps, Vec* dt, Vec* dtu, Each&& each) {
  const Vec bias = in.delta_bias ? load(in.delta_bias + c, lanes) : Vec{};
  for (int t = 0; t < steps; ++t) {
    // The rows of a range are short and far apart, which hardware prefetchers do not follow.
    const int64_t row = start + t, ahead = std::min(row + kChunk, in.shape.length - 1);
    __builtin_prefetch(row_address(in.u, b, ahead, c));
    __builtin_prefetch(row_address(in.delta, b, ahead, c));
    const Vec raw = raw_step(in, bias, b, row, c, lanes);
    const Vec u = load_row(in.u, b, row, c, lanes);
    dt[t] = in.delta_softplus ? softplus(raw) : raw;
    dtu[t] = dt[t] * u;
    each(t, u);
  }
}

// Writes the rows y of a vector block in steps [start, start + steps). Output: what store_row takes.
template <typename In, typename Lanes, typename Output>
inline void scan_block(
    const In& in, int64_t b, int64_t c, Lanes lanes, int64_t start, int steps, Block block, FloatRows B, FloatRows C,
    const Output& y) {
  Vec dt[kChunk], dtu[kChunk], out[kChunk];
  const Vec skip = in.D ? load(in.D + c, lanes) : Vec{};
  load_steps(in, b, c, lanes, start, steps, dt, dtu, [&](int t, Vec u) {
    __builtin_prefetch(row_address(y, b, std::min(start + t + kChunk, in.shape.length - 1), c), 1);
    out[t] = in.D ? skip * u : Vec{};
  });
  for_groups<kMaxGroup>(in.shape.d_state, [&](auto group, int64_t n) {
    scan_group<decltype(group)::value, true>(
        steps, dt, dtu, out, block.decay + n, block.state + n, {B.data + n, B.stride}, {C.data + n, C.stride});
  });
  for (int t = 0; t < steps; ++t) store_row(out[t], y, b, start + t, c, lanes);
}

// Writes every state of a vector block in steps [start, start + steps) into `all` (batch, length, channels, d_state).
template <typename In, typename Lanes>
inline void states_block(
    const In& in, int64_t b, int64_t c, Lanes lanes, int64_t start, int steps, Block block, FloatRows B, float* all) {
  Vec dt[kChunk], dtu[kChunk];
  const int64_t N = in.shape.d_state;
  load_steps(in, b, c, lanes, start, steps, dt, dtu, [](int, Vec) {});
  for (int t = 0; t < steps; ++t) {
    for_groups<kMaxGroup>(N, [&](auto group, int64_t n) {
      scan_group<decltype(group)::value, false>(
          1, dt + t, dtu + t, nullptr, block.decay + n, block.state + n, {B.data + t * B.stride + n, 0}, {nullptr, 0});
    });
    float* row = all + ((b * in.shape.length + start + t) * in.shape.channels + c) * N;
    for (int64_t n = 0; n < N; ++n) scatter(block.state[n], row + n, N, lanes);
  }
}

// Carries the states of a task from the initial to the last, chunk after chunk of every vector block.
// chunk(first channel, lanes, start, steps, block, B, C) takes a block on through `steps` steps.
template <typename Source, typename T, typename State, typename LastState, typename Chunk>
void carry_states(
    const ScanOperands<Source, T, State>& in, const ScanTask& task, const LastState& last_state, Chunk&& chunk) {
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
        chunk(task.first + i * kLanes, lanes, start, steps, block_at(i), B, C);
      });
  }
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t c = task.first + i * kLanes;
    for (int64_t n = 0; n < N; ++n)
      scatter_state(block_at(i).state[n], last_state, in.shape.index(task.b, c, n), N, lanes_of(i));
  }
}

template <typename In, typename Output, typename LastState>
void scan_task(const In& in, const ScanTask& task, const Output& y, const LastState& last_state) {
  carry_states(in, task, last_state, [&](int64_t c, auto lanes, int64_t start, int steps, Block block, FloatRows B,
                                         FloatRows C) { scan_block(in, task.b, c, lanes, start, steps, block, B, C, y); });
}

// As scan_task, for every state in the place of y; C is not read.
template <typename In>
void states_task(const In& in, const ScanTask& task, float* all, float* last_state) {
  carry_states(in, task, last_state, [&](int64_t c, auto lanes, int64_t start, int steps, Block block, FloatRows B,
                                         FloatRows) { states_block(in, task.b, c, lanes, start, steps, block, B, all); });
}

// A vector block of a task of a sequence of length 1: states lie in the vector lanes as they do in memory, so nothing
// is transposed. d_state must be a multiple of kLanes; kCarried: there is an initial state.
template <
    bool kCarried, typename Source, typename T, typename State, typename Lanes, typename Output, typename LastState>
void scan_step_block(
    const ScanOperands<Source, T, State>& in, const ScanTask& task, int64_t c, Lanes lanes, const Output& y,
    const LastState& last_state) {
  const int64_t N = in.shape.d_state, b = task.b;
  const int channels = lanes;
  const T *B = in.B.at(b, 0, task.g), *C = in.C.at(b, 0, task.g);
  const Vec bias = in.delta_bias ? load(in.delta_bias + c, lanes) : Vec{};
  const Vec raw = raw_step(in, bias, b, 0, c, lanes);
  const Vec dt = in.delta_softplus ? softplus(raw) : raw;
  const Vec u = load_row(in.u, b, 0, c, lanes);
  float exponent[kLanes], dtu[kLanes];
  store(dt * kLog2E, exponent);
  store(dt * u, dtu);
  Vec total[kLanes] = {};
  for (int64_t n = 0; n < N; n += kLanes) {
    const Vec input = load(B + n), weight = load(C + n);
    // Exponentials are long chains: those of channels side by side do not wait for each other.
#pragma GCC unroll 4
    for (int lane = 0; lane < channels; ++lane) {
      const StateIndex at = in.shape.index(b, c + lane, n);
      Vec h = dtu[lane] * input;
      if constexpr (kCarried)
        h += exp2(exponent[lane] * load(in.A + at.parameter)) * load_state(in.initial_state, at);
      store_state(h, last_state, at);
      total[lane] += h * weight;
    }
  }
  Vec out = lane_sums(total);
  if (in.D) out += load(in.D + c, lanes) * u;
  store_row(out, y, b, 0, c, lanes);
}

template <typename In, typename Output, typename LastState>
void scan_step(const In& in, const ScanTask& task, const Output& y, const LastState& last_state) {
  for (int64_t c = task.first; c < task.first + task.count; c += kLanes)
    with_lanes(task.first + task.count - c, [&](auto lanes) {
      if (in.initial_state)
        scan_step_block<true>(in, task, c, lanes, y, last_state);
      else
        scan_step_block<false>(in, task, c, lanes, y, last_state);
    });
}

}  // namespace mq_ao
