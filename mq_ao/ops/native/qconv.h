// Depthwise causal convolution on 8-bit operands: the portable core, without torch types.
//
// Channels lie in the vector lanes. Products of a uint8 input (less its zero point) and an int8 tap are below 2^16 and
// their sums below 2^24, so float lanes hold them exactly: the sum is the integer sum, and only the scale, the bias
// and the activation round.
#pragma once

#include <algorithm>

#include "conv.h"

namespace mq_ao {

struct QConvInputs {
  ConvShape shape;
  Rows<const uint8_t> x;
  float x_scale, zero_point;
  const int8_t* weight;        // (channels, d_conv)
  const float* weight_scale;   // (channels)
  const float* bias;           // (channels) or null
  const float* initial_state;  // (batch, d_conv - 1, channels), dequantized values, or null
  bool silu;
};

typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));

inline Vec load(const uint8_t* p, int count) {
  ByteVec bytes{};
  // A copy of constant size is one instruction; one of any size is a call.
  if (count == kLanes)
    std::memcpy(&bytes, p, sizeof bytes);
  else
    std::memcpy(&bytes, p, size_t(count));
  return __builtin_convertvector(__builtin_convertvector(bytes, IntVec), Vec);
}

// Row p of the padded sequence in steps of x_scale, less the zero point: integers. The state's rows are multiples of
// x_scale when they come from this operator; rounding takes them back to their integers.
inline Vec qpadded_row(const QConvInputs& in, int64_t b, int64_t p, int64_t c, int lanes) {
  const int64_t history = in.shape.d_conv - 1;
  if (p >= history) return load(in.x.at(b, p - history) + c, lanes) - in.zero_point;
  if (!in.initial_state) return Vec{};
  const Vec steps = load(in.initial_state + (b * history + p) * in.shape.channels + c, lanes) * (1.0f / in.x_scale);
  // Far outside the quantized range the magic rounding would fail; such a state is not ours, and is clamped to it.
  const Vec integral = at_least(at_most(round_small(steps), 255.0f - in.zero_point), -in.zero_point);
  return steps != steps ? steps : integral;
}

// Outputs [start, stop) of one vector block. Taps is d_conv, or 0 for any.
template <int Taps>
void qconv_block(
    const QConvInputs& in, int64_t b, int64_t c, int lanes, int64_t start, int64_t stop, const Vec* weight, Vec factor,
    Vec bias, Vec* window, Rows<float> y) {
  const int64_t taps = Taps ? Taps : in.shape.d_conv;
  for (int64_t k = 1; k < taps; ++k) window[k] = qpadded_row(in, b, start + k - 1, c, lanes);
  for (int64_t t = start; t < stop; ++t) {
    for (int64_t k = 0; k + 1 < taps; ++k) window[k] = window[k + 1];
    window[taps - 1] = load(in.x.at(b, t) + c, lanes) - in.zero_point;
    Vec sum{};
    for (int64_t k = 0; k < taps; ++k) sum += weight[k] * window[k];
    const Vec value = sum * factor + bias;
    store(in.silu ? silu(value) : value, y.at(b, t) + c, lanes);
  }
}

// All of batch element b in channels [first, first + count).
inline void qconv_task(
    const QConvInputs& in, int64_t b, int64_t first, int64_t count, Rows<float> y, float* last_state) {
  const int64_t taps = in.shape.d_conv, length = in.shape.length, channels = in.shape.channels;
  const Scratch<Vec> memory(taps > 4 ? 2 * taps : 1);
  Vec few[8];
  Vec* weight = taps > 4 ? memory.get() : few;
  Vec* window = weight + taps;
  for (int64_t start = 0; start < length; start += kChunk) {
    for (int64_t c = first; c < first + count; c += kLanes) {
      const int lanes = int(std::min<int64_t>(kLanes, first + count - c));
      for (int64_t k = 0; k < taps; ++k)
        for (int i = 0; i < kLanes; ++i) weight[k][i] = i < lanes ? float(in.weight[(c + i) * taps + k]) : 0.0f;
      const Vec factor = load(in.weight_scale + c, lanes) * in.x_scale;
      const Vec bias = in.bias ? load(in.bias + c, lanes) : Vec{};
      for_taps(taps, [&](auto constant) {
        constexpr int kTaps = decltype(constant)::value;
        const int64_t stop = std::min(start + kChunk, length);
        if constexpr (kTaps != 0) {
          // Local arrays of constant size stay in registers.
          Vec own_weight[kTaps], own_window[kTaps];
          std::copy(weight, weight + kTaps, own_weight);
          qconv_block<kTaps>(in, b, c, lanes, start, stop, own_weight, factor, bias, own_window, y);
        } else {
          qconv_block<0>(in, b, c, lanes, start, stop, weight, factor, bias, window, y);
        }
      });
    }
  }
  for (int64_t p = 0; p < taps - 1; ++p)
    for (int64_t c = first; c < first + count; c += kLanes) {
      const int lanes = int(std::min<int64_t>(kLanes, first + count - c));
      const Vec row = qpadded_row(in, b, length + p, c, lanes) * in.x_scale;
      store(row, last_state + (b * (taps - 1) + p) * channels + c, lanes);
    }
}

}  // namespace mq_ao
