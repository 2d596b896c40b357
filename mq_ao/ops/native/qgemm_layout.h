// How the weights of a linear layer (n outputs, k inputs) are packed, 8 or 4 bits each. One packed copy serves one
// row of activations and thousands.
//
// Inputs are padded with zeros to a multiple of 4, outputs to a multiple of 16 (32 for 4 bits), and outputs are cut
// into panels of 64 (the last may be narrower):
//   8 bits: a panel is [inputs / 4][width][4] bytes, so that 4 consecutive inputs of 16 outputs are one 64-byte vector;
//   4 bits: a panel is [inputs / 4][width / 32][16][4] bytes, where the low half of a byte belongs to the first 16 of
//     32 outputs and the high half to the others, so that one 64-byte vector gives two of those above;
//   after the last panel, for each panel: int32 [groups][width], the sum of each output's weights over each group of
//     inputs, which zero points need. A panel's lie together, since few rows are bound by memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace mq_ao::qgemm {

inline constexpr int kLane = 16;  // output columns of one vector of weights
inline constexpr int64_t kPanel = 64;
// Sums of so many products of 8-bit numbers (255 * 128 * k) fit in 32 bits.
inline constexpr int64_t kMaxInputs = 65536;

inline int64_t padded_inputs(int64_t k) { return (k + 3) / 4 * 4; }

struct Layout {
  int64_t n, k;
  int64_t bits = 8;
  int64_t group_size = 0;  // inputs that share a scale, a multiple of 4; 0: all

  int64_t depth() const { return padded_inputs(k); }
  int64_t groups() const { return group_size ? (k + group_size - 1) / group_size : 1; }
  // Outputs that lie in one vector of packed bytes.
  int64_t unit() const { return bits == 4 ? 2 * kLane : kLane; }
  int64_t outputs() const { return (n + unit() - 1) / unit() * unit(); }
  int64_t weight_bytes() const { return outputs() * depth() * bits / 8; }
  int64_t bytes() const { return weight_bytes() + 4 * outputs() * groups(); }
  // Of the panel whose first output is `first`.
  int64_t width(int64_t first) const { return std::min(kPanel, outputs() - first); }
  int64_t panel(int64_t first) const { return first * depth() * bits / 8; }
  // The sums of output `n` and of those behind it in its panel.
  int64_t sums(int64_t n, int64_t group) const {
    const int64_t first = n / kPanel * kPanel;
    return weight_bytes() + 4 * (first * groups() + group * width(first) + n - first);
  }
};

// Where one weight lies: `shift` is 4 for the high half of a byte.
struct Place {
  int64_t offset;
  int shift;
};

inline Place place(const Layout& l, int64_t row, int64_t column) {
  const int64_t first = row / kPanel * kPanel, inside = row - first, width = l.width(first);
  if (l.bits == 8) return {l.panel(first) + (column / 4 * width + inside) * 4 + column % 4, 0};
  const int64_t pair = column / 4 * (width / 2) + inside / (2 * kLane) * kLane + inside % kLane;
  return {l.panel(first) + pair * 4 + column % 4, inside / kLane % 2 ? 4 : 0};
}

inline void pack(const Layout& l, const int8_t* weight, int8_t* packed) {
  std::memset(packed, 0, l.bytes());
  const int64_t group = l.group_size ? l.group_size : l.k;
  for (int64_t row = 0; row < l.n; ++row, weight += l.k) {
    for (int64_t g = 0; g < l.groups(); ++g) {
      int32_t sum = 0;
      for (int64_t column = g * group; column < std::min(l.k, (g + 1) * group); ++column) {
        const Place at = place(l, row, column);
        const int value = l.bits == 8 ? weight[column] : (weight[column] & 15) << at.shift;
        packed[at.offset] = static_cast<int8_t>(packed[at.offset] | value);
        sum += weight[column];
      }
      std::memcpy(packed + l.sums(row, g), &sum, sizeof sum);
    }
  }
}

inline void unpack(const Layout& l, const int8_t* packed, int8_t* weight) {
  for (int64_t row = 0; row < l.n; ++row) {
    for (int64_t column = 0; column < l.k; ++column) {
      const Place at = place(l, row, column);
      const int value = packed[at.offset];
      *weight++ = static_cast<int8_t>(l.bits == 8 ? value : ((value >> at.shift & 15) ^ 8) - 8);
    }
  }
}

// Makes a panel of 8 bits from one of 4 bits that has `vectors` vectors of 64 packed bytes.
inline void expand_panel(const int8_t* packed, int64_t vectors, int8_t* out) {
  typedef int8_t Bytes __attribute__((vector_size(64)));
  typedef uint16_t Words __attribute__((vector_size(64)));
  for (int64_t i = 0; i < vectors; ++i, packed += 64, out += 128) {
    Words words;
    std::memcpy(&words, packed, sizeof words);
    const Bytes low = (Bytes(words & 0x0f0f) ^ 8) - 8;
    const Bytes high = (Bytes(words >> 4 & 0x0f0f) ^ 8) - 8;
    std::memcpy(out, &low, sizeof low);
    std::memcpy(out + 64, &high, sizeof high);
  }
}

}  // namespace mq_ao::qgemm
