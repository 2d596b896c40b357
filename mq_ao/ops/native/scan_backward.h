// Gradient of the selective scan: the portable core, without torch types.
//
// A first sweep stores the state at every chunk boundary; then, from the last chunk to the first, the states within a
// chunk are computed again and the adjoint recurrence runs over them backwards. Memory: one state a chunk and channel.
#pragma once

#include "scan.h"

namespace mq_ao {

constexpr int kGradientGroup = 8;         // states whose adjoints stay in registers
constexpr int kGradientRange = 8 * kLanes;  // channels of a task

template <typename T>
struct ScanGradients {
  Rows<const T> dy;
  const float* dlast_state;  // (batch, channels, d_state)
  Rows<T> du, ddelta;
  float* dA;          // (batch, channels, d_state): one sum a batch element
  float* dD;          // (batch, channels)
  float* ddelta_bias;  // (batch, channels)
  float* dinitial_state;  // (batch, channels, d_state)
  // (ranges, batch, length, groups, d_state): one sum a channel range
  float* dB;
  float* dC;
};

// Scratch of one task. Per block: parameters, state, adjoint, and gradients of parameters.
class GradientScratch {
 public:
  GradientScratch(int64_t blocks, int64_t chunks, int64_t d_state)
      : blocks_(blocks),
        N_(d_state),
        vectors_(blocks * (4 * d_state + 2) + chunks * blocks * d_state + 2 * kChunk * d_state +
                 (2 * kChunk + 1) * kGradientGroup + 8 * kChunk),
        floats_(2 * kChunk * d_state) {}

  Vec* decay(int64_t i) const { return vectors_.get() + i * (4 * N_ + 2); }
  Vec* state(int64_t i) const { return decay(i) + N_; }
  Vec* adjoint(int64_t i) const { return decay(i) + 2 * N_; }
  Vec* d_decay(int64_t i) const { return decay(i) + 3 * N_; }
  Vec* d_skip(int64_t i) const { return decay(i) + 4 * N_; }
  Vec* d_bias(int64_t i) const { return decay(i) + 4 * N_ + 1; }
  Vec* dB() const { return decay(blocks_); }
  Vec* dC() const { return dB() + kChunk * N_; }
  Vec* factors() const { return dC() + kChunk * N_; }
  Vec* states() const { return factors() + kChunk * kGradientGroup; }
  Vec* rows() const { return states() + (kChunk + 1) * kGradientGroup; }
  Vec* boundary(int64_t chunk, int64_t i) const { return rows() + 8 * kChunk + (chunk * blocks_ + i) * N_; }
  float* copy_b() const { return floats_.get(); }
  float* copy_c() const { return floats_.get() + kChunk * N_; }

 private:
  int64_t blocks_, N_;
  Scratch<Vec> vectors_;
  Scratch<float> floats_;
};

// Row-wise operands and results of one block in one chunk, a vector a step.
struct ChunkRows {
  Vec *raw, *dt, *u, *dtu, *dy, *through_input, *through_decay;
};

// One group of states over one chunk: recomputes the states from `state`, then runs the adjoint backwards.
template <int Group>
inline void gradient_group(
    int steps, const ChunkRows& rows, const Vec* decay, const Vec* state, Vec* adjoint, Vec* d_decay, FloatRows B,
    FloatRows C, Vec* dB, Vec* dC, int64_t stride, Vec* factors, Vec* states) {
  {
    Vec h[Group];
    for (int n = 0; n < Group; ++n) states[n] = h[n] = state[n];
    for (int t = 0; t < steps; ++t) {
      const float* b = B.data + t * B.stride;
#pragma GCC unroll 16
      for (int n = 0; n < Group; ++n) {
        const Vec a = exp2(rows.dt[t] * decay[n]);
        h[n] = a * h[n] + rows.dtu[t] * b[n];
        factors[t * Group + n] = a;
        states[(t + 1) * Group + n] = h[n];
      }
    }
  }
  Vec g[Group], grad[Group];
  for (int n = 0; n < Group; ++n) g[n] = adjoint[n], grad[n] = d_decay[n];
  for (int t = steps - 1; t >= 0; --t) {
    const float* b = B.data + t * B.stride;
    const float* c = C.data + t * C.stride;
    const Vec dt = rows.dt[t], dtu = rows.dtu[t], dy = rows.dy[t];
    Vec through_input = rows.through_input[t], through_decay = rows.through_decay[t];
#pragma GCC unroll 16
    for (int n = 0; n < Group; ++n) {
      dC[t * stride + n] += dy * states[(t + 1) * Group + n];
      g[n] += dy * c[n];
      dB[t * stride + n] += g[n] * dtu;
      through_input += g[n] * b[n];
      g[n] *= factors[t * Group + n];
      const Vec p = g[n] * states[t * Group + n];
      grad[n] += p * dt;
      through_decay += p * decay[n];
    }
    rows.through_input[t] = through_input;
    rows.through_decay[t] = through_decay;
  }
  for (int n = 0; n < Group; ++n) adjoint[n] = g[n], d_decay[n] = grad[n];
}

template <typename T>
class GradientTask {
 public:
  GradientTask(const ScanInputs<T>& in, const ScanTask& task, int64_t range_index, const ScanGradients<T>& out)
      : in_(in),
        task_(task),
        out_(out),
        range_index_(range_index),
        N_(in.shape.d_state),
        blocks_(ceil_div(task.count, kLanes)),
        chunks_(ceil_div(in.shape.length, kChunk)),
        scratch_(blocks_, chunks_, N_) {
    Vec* row = scratch_.rows();
    for (Vec** field : {&rows_.raw, &rows_.dt, &rows_.u, &rows_.dtu, &rows_.dy, &rows_.through_input,
                        &rows_.through_decay}) {
      *field = row;
      row += kChunk;
    }
  }

  void run() {
    for (int64_t i = 0; i < blocks_; ++i) start_block(i);
    for (int64_t chunk = 0; chunk + 1 < chunks_; ++chunk) forward(chunk);
    for (int64_t i = 0; i < blocks_; ++i)
      std::copy_n(scratch_.state(i), N_, scratch_.boundary(chunks_ - 1, i));
    for (int64_t chunk = chunks_ - 1; chunk >= 0; --chunk) backward(chunk);
    for (int64_t i = 0; i < blocks_; ++i) finish_block(i);
  }

 private:
  int lanes(int64_t i) const { return int(std::min<int64_t>(kLanes, task_.count - i * kLanes)); }
  int64_t channel(int64_t i) const { return task_.first + i * kLanes; }
  int steps(int64_t chunk) const { return int(std::min<int64_t>(kChunk, in_.shape.length - chunk * kChunk)); }
  int64_t state_row(int64_t i) const { return (task_.b * in_.shape.channels + channel(i)) * N_; }
  FloatRows b_rows(int64_t chunk) const {
    return float_rows(in_.B.at(task_.b, chunk * kChunk, task_.g), in_.B.time, steps(chunk), N_, scratch_.copy_b());
  }
  FloatRows c_rows(int64_t chunk) const {
    return float_rows(in_.C.at(task_.b, chunk * kChunk, task_.g), in_.C.time, steps(chunk), N_, scratch_.copy_c());
  }

  void start_block(int64_t i) {
    load_block(in_, task_.b, channel(i), lanes(i), {scratch_.decay(i), scratch_.state(i)});
    for (int64_t n = 0; n < N_; ++n) {
      scratch_.adjoint(i)[n] = gather(out_.dlast_state + state_row(i) + n, N_, lanes(i));
      scratch_.d_decay(i)[n] = Vec{};
    }
    *scratch_.d_skip(i) = *scratch_.d_bias(i) = Vec{};
  }

  // `next` is the chunk after this one, whose rows are fetched ahead; for the prefetch see scan_block.
  void load_steps(int64_t chunk, int64_t next, int64_t i) {
    const int64_t c = channel(i);
    const Vec bias = in_.delta_bias ? load(in_.delta_bias + c, lanes(i)) : Vec{};
    for (int t = 0; t < steps(chunk); ++t) {
      const int64_t row = chunk * kChunk + t;
      const int64_t ahead = std::clamp<int64_t>(next * kChunk + t, 0, in_.shape.length - 1);
      __builtin_prefetch(in_.u.at(task_.b, ahead) + c);
      __builtin_prefetch(in_.delta.at(task_.b, ahead) + c);
      rows_.u[t] = load(in_.u.at(task_.b, row) + c, lanes(i));
      rows_.raw[t] = raw_step(in_, bias, task_.b, row, c, lanes(i));
      rows_.dt[t] = in_.delta_softplus ? softplus(rows_.raw[t]) : rows_.raw[t];
      rows_.dtu[t] = rows_.dt[t] * rows_.u[t];
    }
  }

  void forward(int64_t chunk) {
    const FloatRows B = b_rows(chunk);
    for (int64_t i = 0; i < blocks_; ++i) {
      load_steps(chunk, chunk + 1, i);
      std::copy_n(scratch_.state(i), N_, scratch_.boundary(chunk, i));
      for_groups<kMaxGroup>(N_, [&](auto group, int64_t n) {
        scan_group<decltype(group)::value, false>(steps(chunk), rows_.dt, rows_.dtu, nullptr, scratch_.decay(i) + n,
                                                  scratch_.state(i) + n, {B.data + n, B.stride}, {nullptr, 0});
      });
    }
  }

  void backward(int64_t chunk) {
    const FloatRows B = b_rows(chunk), C = c_rows(chunk);
    std::fill_n(scratch_.dB(), 2 * kChunk * N_, Vec{});
    for (int64_t i = 0; i < blocks_; ++i) {
      load_steps(chunk, chunk - 1, i);
      for (int t = 0; t < steps(chunk); ++t) {
        const int64_t ahead = std::max<int64_t>((chunk - 1) * kChunk + t, 0);
        __builtin_prefetch(out_.dy.at(task_.b, ahead) + channel(i));
        __builtin_prefetch(out_.du.at(task_.b, ahead) + channel(i), 1);
        __builtin_prefetch(out_.ddelta.at(task_.b, ahead) + channel(i), 1);
        rows_.dy[t] = load(out_.dy.at(task_.b, chunk * kChunk + t) + channel(i), lanes(i));
        rows_.through_input[t] = rows_.through_decay[t] = Vec{};
      }
      for_groups<kGradientGroup>(N_, [&](auto group, int64_t n) {
        gradient_group<decltype(group)::value>(
            steps(chunk), rows_, scratch_.decay(i) + n, scratch_.boundary(chunk, i) + n, scratch_.adjoint(i) + n,
            scratch_.d_decay(i) + n, {B.data + n, B.stride}, {C.data + n, C.stride}, scratch_.dB() + n,
            scratch_.dC() + n, N_, scratch_.factors(), scratch_.states());
      });
      store_rows(chunk, i);
    }
    // Lanes are added up once for all blocks of the range.
    const int64_t row = (range_index_ * in_.shape.batch + task_.b) * in_.shape.length + chunk * kChunk;
    for (int t = 0; t < steps(chunk); ++t) {
      const int64_t base = ((row + t) * in_.shape.groups + task_.g) * N_;
      for (int64_t n = 0; n < N_; ++n) out_.dB[base + n] = sum(scratch_.dB()[t * N_ + n]);
      for (int64_t n = 0; n < N_; ++n) out_.dC[base + n] = sum(scratch_.dC()[t * N_ + n]);
    }
  }

  void store_rows(int64_t chunk, int64_t i) {
    const int64_t c = channel(i);
    const Vec skip = in_.D ? load(in_.D + c, lanes(i)) : Vec{};
    // decay is A log2(e): its sum is rescaled to that of A.
    constexpr float kLn2 = 0.693147180559945f;
    for (int t = 0; t < steps(chunk); ++t) {
      const int64_t row = chunk * kChunk + t;
      const Vec du = rows_.dt[t] * rows_.through_input[t] + skip * rows_.dy[t];
      Vec ddelta = rows_.u[t] * rows_.through_input[t] + kLn2 * rows_.through_decay[t];
      if (in_.delta_softplus) ddelta *= sigmoid(rows_.raw[t]);
      *scratch_.d_bias(i) += ddelta;
      *scratch_.d_skip(i) += rows_.dy[t] * rows_.u[t];
      store(du, out_.du.at(task_.b, row) + c, lanes(i));
      store(ddelta, out_.ddelta.at(task_.b, row) + c, lanes(i));
    }
  }

  void finish_block(int64_t i) {
    for (int64_t n = 0; n < N_; ++n) {
      scatter(scratch_.d_decay(i)[n], out_.dA + state_row(i) + n, N_, lanes(i));
      scatter(scratch_.adjoint(i)[n], out_.dinitial_state + state_row(i) + n, N_, lanes(i));
    }
    store(*scratch_.d_skip(i), out_.dD + task_.b * in_.shape.channels + channel(i), lanes(i));
    store(*scratch_.d_bias(i), out_.ddelta_bias + task_.b * in_.shape.channels + channel(i), lanes(i));
  }

  const ScanInputs<T>& in_;
  const ScanTask task_;
  const ScanGradients<T>& out_;
  const int64_t range_index_, N_, blocks_, chunks_;
  GradientScratch scratch_;
  ChunkRows rows_;
};

}  // namespace mq_ao
