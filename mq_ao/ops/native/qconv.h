// Depthwise causal convolution on 8-bit operands: the portable core, without torch types.
//
// Channels lie in the vector lanes. Products of an 8-bit input (less its zero point) and an int8 tap are below 2^16 and
// their sums below 2^24, so float lanes hold them exactly: the sum is the integer sum, and only the scale, the bias
// and the activation round.
#pragma once

#include <algorithm>

#include "conv.h"
#include "qrows.h"

namespace mq_ao {

struct QConvInputs {
  ConvShape shape;
  Rows<const uint8_t> x;       // 8-bit numbers on `grid`
  Grid grid;
  const int8_t* weight;        // (channels, d_conv)
  const float* weight_scale;   // (channels)
  const float* bias;           // (channels) or null
  const float* initial_state;  // (batch, d_conv - 1, channels), dequantized values, or null
  bool silu;
};

// Row p of the padded sequence in steps of x's scale, less the zero point: integers. The state's rows are multiples of
// that scale when they come from this operator; rounding takes them back to their integers.
inline Vec qpadded_row(const QConvInputs& in, int64_t b, int64_t p, int64_t c, int lanes) {
  const int64_t history = in.shape.d_conv - 1;
  if (p >= history) return load_centered(in.x.at(b, p - history) + c, in.grid, lanes);
  if (!in.initial_state) return Vec{};
  const Vec steps = load(in.initial_state + (b * history + p) * in.shape.channels + c, lanes) * (1.0f / in.grid.scale);
  // Far outside the quantized range the magic rounding would fail; such a state is not ours, and is clamped to it.
  const Vec integral = at_least(at_most(round_small(steps), 255.0f - in.grid.zero_point), -in.grid.zero_point);
  return steps != steps ? steps : integral;
}

// Outputs [start, stop) of one vector block. Taps is d_conv, or 0 for any; `window` holds stop - start + d_conv - 1
// vectors. Each input is converted once, and then read from there by all taps.
template <int Taps, typename Lanes>
void qconv_block(
    const QConvInputs& in, int64_t b, int64_t c, Lanes lanes, int64_t start, int64_t stop, const Vec* weight,
    Vec* window, const QOutput& out) {
  const int64_t taps = Taps ? Taps : in.shape.d_conv, steps = stop - start;
  // Copies, which no store of bytes can change: they stay in registers.
  const Grid grid = in.grid;
  const QOutput y = out;
  const Vec factor = load(in.weight_scale + c, lanes) * grid.scale;
  const Vec bias = in.bias ? load(in.bias + c, lanes) : Vec{};
  for (int64_t p = 0; p < taps - 1; ++p) window[p] = qpadded_row(in, b, start + p, c, lanes);
  for (int64_t t = 0; t < steps; ++t) {
    // As in load_steps: rows are too far apart for hardware prefetchers.
    __builtin_prefetch(in.x.at(b, std::min(stop + t, in.shape.length - 1)) + c);
    window[t + taps - 1] = load_centered(in.x.at(b, start + t) + c, grid, lanes);
  }
  for (int64_t t = 0; t < steps; ++t) {
    Vec sum{};
    for (int64_t k = 0; k < taps; ++k) sum += weight[k] * window[t + k];
    const Vec value = sum * factor + bias;
    store_row(in.silu ? silu(value) : value, y, b, start + t, c, lanes);
  }
}

// The taps of a vector block of channels, one vector a tap.
inline void load_taps(const int8_t* weight, int64_t taps, int lanes, Vec* out) {
  if (taps == 4 && lanes == kLanes) {
    IntVec all;  // a channel in each lane
    std::memcpy(&all, weight, sizeof all);
    for (int k = 0; k < 4; ++k) out[k] = __builtin_convertvector((all << (24 - 8 * k)) >> 24, Vec);
    return;
  }
  for (int64_t k = 0; k < taps; ++k)
    for (int i = 0; i < kLanes; ++i) out[k][i] = i < lanes ? float(weight[i * taps + k]) : 0.0f;
}

// At most kRangeBlocks vectors of channels.
inline void qconv_task(const QConvInputs& in, const ChannelTask& task, const QOutput& y, float* last_state) {
  const int64_t taps = in.shape.d_conv, length = in.shape.length, channels = in.shape.channels;
  const int64_t first = task.first, end = first + task.count;
  const auto lanes_at = [&](int64_t c) { return int(std::min<int64_t>(kLanes, end - c)); };
  constexpr int kFewTaps = 4;
  Vec few[kRangeBlocks * kFewTaps + kChunk + kFewTaps - 1];
  std::optional<Scratch<Vec>> many;
  if (taps > kFewTaps) many.emplace(kRangeBlocks * taps + kChunk + taps - 1);
  Vec* window = many ? many->get() : few;
  Vec* weights = window + kChunk + taps - 1;
  for (int64_t c = first; c < end; c += kLanes)
    load_taps(in.weight + c * taps, taps, lanes_at(c), weights + (c - first) / kLanes * taps);
  for (int64_t b = task.begin; b < task.end; ++b) {
    // Time is cut into chunks, so that the blocks of a range read neighbouring memory in turn.
    for (int64_t start = 0; start < length; start += kChunk)
      for (int64_t c = first; c < end; c += kLanes)
        for_taps(taps, [&](auto constant) {
          with_lanes(lanes_at(c), [&](auto lanes) {
            qconv_block<decltype(constant)::value>(
                in, b, c, lanes, start, std::min(start + kChunk, length), weights + (c - first) / kLanes * taps,
                window, y);
          });
        });
    for (int64_t p = 0; p < taps - 1; ++p)
      for (int64_t c = first; c < end; c += kLanes) {
        const Vec row = qpadded_row(in, b, length + p, c, lanes_at(c)) * in.grid.scale;
        store(row, last_state + (b * (taps - 1) + p) * channels + c, lanes_at(c));
      }
  }
}

}  // namespace mq_ao
