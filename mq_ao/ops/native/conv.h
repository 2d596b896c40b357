// Depthwise causal convolution and its gradient: the portable core, without torch types.
//
// Channels lie in the vector lanes. The sequence is read as if the d_conv - 1 inputs of the initial state (or zeros)
// stood before it: "padded" row p is state row p for p < d_conv - 1, then input row p - (d_conv - 1).
#pragma once

#include <optional>

#include "scan.h"
#include "tasks.h"

namespace mq_ao {

struct ConvShape {
  int64_t batch, length, channels, d_conv;
};

template <typename T>
struct ConvInputs {
  ConvShape shape;
  Rows<const T> x;
  const float* weight;         // (channels, d_conv)
  const float* bias;           // (channels) or null
  const float* initial_state;  // (batch, d_conv - 1, channels) or null
  bool silu;
};

// Row p of the padded sequence of batch element b.
template <typename T>
inline Vec padded_row(const ConvInputs<T>& in, int64_t b, int64_t p, int64_t c, int lanes) {
  const int64_t history = in.shape.d_conv - 1;
  if (p >= history) return load(in.x.at(b, p - history) + c, lanes);
  if (!in.initial_state) return Vec{};
  return load(in.initial_state + (b * history + p) * in.shape.channels + c, lanes);
}

// Calls f with a constant d_conv for the common sizes, else with 0.
template <typename F>
inline void for_taps(int64_t d_conv, F&& f) {
  switch (d_conv) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    default: return f(std::integral_constant<int, 0>{});
  }
}

// Outputs [start, stop) of one vector block; Taps is d_conv, or 0 for any.
template <int Taps, typename T>
void conv_block(
    const ConvInputs<T>& in, int64_t b, int64_t c, int lanes, int64_t start, int64_t stop, const Vec* weight, Vec bias,
    Rows<T> y) {
  const int64_t taps = Taps ? Taps : in.shape.d_conv;
  for (int64_t t = start; t < stop; ++t) {
    Vec sum = bias;
    if (t >= taps - 1) {
      const T* newest = in.x.at(b, t) + c;
      for (int64_t k = 0; k < taps; ++k)
        sum = multiply_add(weight[k], load(newest - (taps - 1 - k) * in.x.time, lanes), sum);
    } else {
      for (int64_t k = 0; k < taps; ++k) sum = multiply_add(weight[k], padded_row(in, b, t + k, c, lanes), sum);
    }
    store(in.silu ? silu(sum) : sum, y.at(b, t) + c, lanes);
  }
}

template <typename T>
void conv_task(const ConvInputs<T>& in, const ChannelTask& task, Rows<T> y, float* last_state) {
  const int64_t taps = in.shape.d_conv, length = in.shape.length, channels = in.shape.channels;
  const int64_t end = task.first + task.count;
  constexpr int kFewTaps = 8;
  Vec few[kFewTaps];
  std::optional<Scratch<Vec>> many;
  if (taps > kFewTaps) many.emplace(taps);
  Vec* weight = many ? many->get() : few;
  // Time is cut into chunks, so that the blocks of a range read neighbouring memory in turn.
  for (int64_t start = 0; start < length; start += kChunk) {
    for (int64_t c = task.first; c < end; c += kLanes) {
      const int lanes = int(std::min<int64_t>(kLanes, end - c));
      for (int64_t k = 0; k < taps; ++k) weight[k] = gather(in.weight + c * taps + k, taps, lanes);
      const Vec bias = in.bias ? load(in.bias + c, lanes) : Vec{};
      for (int64_t b = task.begin; b < task.end; ++b)
        for_taps(taps, [&](auto constant) {
          conv_block<decltype(constant)::value>(
              in, b, c, lanes, start, std::min(start + kChunk, length), weight, bias, y);
        });
    }
  }
  for (int64_t b = task.begin; b < task.end; ++b)
    for (int64_t p = 0; p < taps - 1; ++p)
      for (int64_t c = task.first; c < end; c += kLanes) {
        const int lanes = int(std::min<int64_t>(kLanes, end - c));
        store(padded_row(in, b, length + p, c, lanes), last_state + (b * (taps - 1) + p) * channels + c, lanes);
      }
}

template <typename T>
struct ConvGradients {
  Rows<const T> dy;
  const float* dlast_state;  // (batch, d_conv - 1, channels)
  Rows<T> dx;
  float* dweight;         // (batch, channels, d_conv): one sum a batch element
  float* dbias;           // (batch, channels)
  float* dinitial_state;  // (batch, d_conv - 1, channels)
};

// Gradient of one vector block of batch element b in one walk over the sequence. The last d_conv inputs and the last
// d_conv gradients before the activation are at hand; padded row p meets the gradients of steps p - d_conv + 1 ... p.
// Taps is d_conv, or 0 for any; `memory` holds 4 d_conv vectors.
template <int Taps, typename T>
void conv_gradient_block(
    const ConvInputs<T>& in, int64_t b, int64_t c, int lanes, const ConvGradients<T>& out, Vec* memory) {
  const int64_t taps = Taps ? Taps : in.shape.d_conv, history = taps - 1;
  const int64_t length = in.shape.length, channels = in.shape.channels;
  constexpr int kPrefetch = 16;  // steps; the rows of a block are too far apart for hardware prefetchers
  // Arrays of constant size live in registers.
  Vec fixed[4][Taps ? Taps : 1];
  Vec* weight = Taps ? fixed[0] : memory;
  Vec* dweight = Taps ? fixed[1] : memory + taps;
  Vec* inputs = Taps ? fixed[2] : memory + 2 * taps;
  Vec* ring = Taps ? fixed[3] : memory + 3 * taps;
  for (int64_t k = 0; k < taps; ++k) {
    weight[k] = gather(in.weight + c * taps + k, taps, lanes);
    dweight[k] = ring[k] = Vec{};
    inputs[k] = k > 0 ? padded_row(in, b, k - 1, c, lanes) : Vec{};
  }
  const Vec bias = in.bias ? load(in.bias + c, lanes) : Vec{};
  Vec dbias{};
  const auto input_gradient = [&](Vec dpre) {
    for (int64_t k = history; k > 0; --k) ring[k] = ring[k - 1];
    ring[0] = dpre;
    Vec d{};
    for (int64_t k = 0; k < taps; ++k) d += weight[k] * ring[k];
    return d;
  };
  const auto put = [&](Vec d, int64_t p) {
    if (p >= history)
      store(d, out.dx.at(b, p - history) + c, lanes);
    else
      store(d, out.dinitial_state + (b * history + p) * channels + c, lanes);
  };
  for (int64_t t = 0; t < length; ++t) {
    if (t + kPrefetch < length) {
      __builtin_prefetch(in.x.at(b, t + kPrefetch) + c);
      __builtin_prefetch(out.dy.at(b, t + kPrefetch) + c);
      __builtin_prefetch(out.dx.at(b, t + kPrefetch) + c, 1);
    }
    for (int64_t k = 0; k < history; ++k) inputs[k] = inputs[k + 1];
    inputs[history] = load(in.x.at(b, t) + c, lanes);
    Vec dpre = load(out.dy.at(b, t) + c, lanes);
    if (in.silu) {
      Vec pre = bias;
      for (int64_t k = 0; k < taps; ++k) pre += weight[k] * inputs[k];
      const Vec gate = sigmoid(pre);
      dpre *= gate * (1.0f + pre * (1.0f - gate));
    }
    dbias += dpre;
    for (int64_t k = 0; k < taps; ++k) dweight[k] += dpre * inputs[k];
    put(input_gradient(dpre), t);
  }
  for (int64_t p = length; p < length + history; ++p)
    put(input_gradient(Vec{}) + load(out.dlast_state + (b * history + p - length) * channels + c, lanes), p);
  for (int64_t k = 0; k < taps; ++k) scatter(dweight[k], out.dweight + (b * channels + c) * taps + k, taps, lanes);
  store(dbias, out.dbias + b * channels + c, lanes);
}

}  // namespace mq_ao
