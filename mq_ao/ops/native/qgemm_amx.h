// Exact sums by AMX, whose tiles take the panels as they are packed: 16 rows of 64 activations times 64 inputs of 16
// outputs in one instruction. For 16 rows and more; fewer are as quick without.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define MQ_AO_AMX 1
#endif

#include "qgemm_layout.h"

namespace mq_ao::qgemm::amx {

inline constexpr int64_t kRows = 16;    // of activations in a tile
inline constexpr int64_t kInputs = 64;  // in a tile

#ifdef MQ_AO_AMX

inline constexpr bool kPresent = true;

// Linux lets a process use tiles when it has asked.
inline bool allowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// What was written to memory is there: GCC does not know that the instructions on tiles read it.
inline void written() { asm volatile("" ::: "memory"); }

// While it lives, this thread has eight tiles of 16 rows of 64 bytes.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    std::fill_n(config.bytes, 8, kInputs);
    std::fill_n(config.rows, 8, kRows);
    written();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The last inputs, fewer than 64, as whole tiles: zeros after them.
struct Rest {
  alignas(64) uint8_t rows[2][kRows * kInputs] = {};
  alignas(64) int8_t weights[2][kRows * kInputs] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
template <int ROWS, int LANES>
inline void multiply(const uint8_t* x, int64_t stride, const int8_t* weights, int64_t step, int64_t lane) {
  _tile_loadd(4, x, stride);
  if constexpr (ROWS == 2) _tile_loadd(5, x + kRows * stride, stride);
  _tile_loadd(6, weights, step);
  _tile_dpbusd(0, 4, 6);
  if constexpr (ROWS == 2) _tile_dpbusd(2, 5, 6);
  if constexpr (LANES == 2) {
    _tile_loadd(7, weights + lane, step);
    _tile_dpbusd(1, 4, 7);
    if constexpr (ROWS == 2) _tile_dpbusd(3, 5, 7);
  }
}

// ROWS * 16 rows with LANES * 16 outputs; sums lie kPanel apart.
template <int ROWS, int LANES>
inline void dot_tiles(const uint8_t* x, int64_t stride, const int8_t* weights, int64_t step, int64_t depth,
                      int32_t* sums) {
  written();
  _tile_zero(0);
  if constexpr (LANES == 2) _tile_zero(1);
  if constexpr (ROWS == 2) _tile_zero(2);
  if constexpr (ROWS == 2 && LANES == 2) _tile_zero(3);
  int64_t k = 0;
  for (; k + kInputs <= depth; k += kInputs) multiply<ROWS, LANES>(x + k, stride, weights + k / 4 * step, step, 64);
  if (const int64_t rest = depth - k) {
    Rest copy;
    for (int64_t i = 0; i < ROWS * kRows; ++i) std::memcpy(copy.rows[0] + i * kInputs, x + i * stride + k, rest);
    for (int64_t i = 0; i < rest / 4; ++i) {
      for (int v = 0; v < LANES; ++v) {
        std::memcpy(copy.weights[v] + 64 * i, weights + (k / 4 + i) * step + 64 * v, 64);
      }
    }
    written();
    multiply<ROWS, LANES>(copy.rows[0], kInputs, copy.weights[0], 64, kRows * kInputs);
  }
  constexpr int64_t kApart = kPanel * sizeof(int32_t);
  _tile_stored(0, sums, kApart);
  if constexpr (LANES == 2) _tile_stored(1, sums + kLane, kApart);
  if constexpr (ROWS == 2) _tile_stored(2, sums + kRows * kPanel, kApart);
  if constexpr (ROWS == 2 && LANES == 2) _tile_stored(3, sums + kRows * kPanel + kLane, kApart);
}

template <int ROWS>
inline void dot_lanes(int lanes, const uint8_t* x, int64_t stride, const int8_t* weights, int64_t step, int64_t depth,
                      int32_t* sums) {
  for (; lanes > 1; lanes -= 2, weights += 128, sums += 2 * kLane) {
    dot_tiles<ROWS, 2>(x, stride, weights, step, depth, sums);
  }
  if (lanes) dot_tiles<ROWS, 1>(x, stride, weights, step, depth, sums);
}

// As `dot_rows`, of a multiple of 16 rows and of weights of 8 bits; only while there are `Tiles`.
inline void dot_rows(int64_t rows, int lanes, const uint8_t* x, int64_t stride, const int8_t* weights, int64_t step,
                     int64_t depth, int32_t* sums) {
  for (; rows >= 2 * kRows; rows -= 2 * kRows, x += 2 * kRows * stride, sums += 2 * kRows * kPanel) {
    dot_lanes<2>(lanes, x, stride, weights, step, depth, sums);
  }
  if (rows) dot_lanes<1>(lanes, x, stride, weights, step, depth, sums);
}

#else

inline constexpr bool kPresent = false;

constexpr bool allowed() { return false; }

struct Tiles {};

inline void dot_rows(int64_t, int, const uint8_t*, int64_t, const int8_t*, int64_t, int64_t, int32_t*) {}

#endif

}  // namespace mq_ao::qgemm::amx
