// Causal attention of new tokens to those before them and to each other: the portable core, without torch types.
//
// Query rows lie in the vector lanes, those of heads that share keys side by side. Keys and values then are what each
// product reads one number at a time, so they are used as they lie in memory: nothing is transposed. Where rows do not
// fill a vector, as of a single token, each takes S lanes: lane s of them has the numbers s, S + s, 2 S + s, ... of a
// row, and S numbers of a key are read at a time. Scores exist for kAttentionBlock keys only; the greatest score of a
// row, the sum of its weights and its result are carried from block to block (Milakov and Gimelshein 2018; Dao and
// others 2022).
// Where few rows meet many keys, ranges of keys are tasks of their own, and their results are added up at the end. How
// work is cut depends on shapes alone, so results do not depend on the number of threads.
#pragma once

#include <cmath>
#include <limits>

#include "qrows.h"
#include "tasks.h"

namespace mq_ao {

constexpr int kAttentionBlock = 64;        // keys whose scores are held
constexpr int64_t kAttentionRange = 2048;  // keys of a task where there are few rows
constexpr int kAttentionTile = kMaxGroup == 16 ? 8 : 4;
constexpr float kNothingSeen = -1e30f;     // below every score

struct AttentionShape {
  int64_t batch, length, heads, groups, width, past;

  int64_t ratio() const { return heads / groups; }       // heads that share keys
  int64_t rows() const { return length * ratio(); }      // query rows of a group: of a token its heads, side by side
  int64_t keys() const { return past + length; }
};

// Keys or values (tokens, batch, groups, width), the last axis dense; `scale` (tokens, batch, groups) of
// 8-bit ones, whose zero point is 128.
template <typename T>
struct Cached {
  const T* data;
  int64_t token, batch, group;
  const float* scale;
  int64_t scale_token, scale_batch, scale_group;

  const T* at(int64_t t, int64_t b, int64_t g) const { return data + t * token + b * batch + g * group; }
  float scale_at(int64_t t, int64_t b, int64_t g) const {
    return scale[t * scale_token + b * scale_batch + g * scale_group];
  }
};

template <typename Query, typename T>
struct AttentionOperands {
  AttentionShape shape;
  const Query* query;  // (batch, heads, length, width), the last axis dense
  int64_t query_batch, query_head, query_time;
  Cached<T> past_key, past_value, key, value;
  const int64_t* starts;  // (batch): tokens before it are padding; or null
  float scaling;
  Query* out;  // (batch, length, heads, width), contiguous
};

// S floats, repeated in all lanes.
template <int S>
inline Vec load_repeated(const float* p) {
  if constexpr (S == 1) return broadcast(*p);
  if constexpr (S == kLanes) return load(p);
#if defined(MQ_AO_AVX512)
  if constexpr (S == 4) return bit_cast<Vec>(_mm512_broadcast_f32x4(_mm_loadu_ps(p)));
  if constexpr (S == 8) return bit_cast<Vec>(_mm512_broadcast_f32x8(_mm256_loadu_ps(p)));
#endif
  Vec v;
  for (int i = 0; i < kLanes; i += S) std::memcpy(reinterpret_cast<char*>(&v) + i * 4, p, S * 4);
  return v;
}

// Sums of every S neighbouring lanes, in all of them.
template <int S>
inline Vec sum_neighbours(Vec v) {
  if constexpr (S == 1) return v;
  constexpr int kHalf = S / 2;
  Vec other;
#if defined(MQ_AO_AVX512)
  const __m512 x = bit_cast<__m512>(v);
  if constexpr (kHalf == 1) other = bit_cast<Vec>(_mm512_permute_ps(x, 0xB1));
  if constexpr (kHalf == 2) other = bit_cast<Vec>(_mm512_permute_ps(x, 0x4E));
  if constexpr (kHalf == 4) other = bit_cast<Vec>(_mm512_shuffle_f32x4(x, x, 0xB1));
  if constexpr (kHalf == 8) other = bit_cast<Vec>(_mm512_shuffle_f32x4(x, x, 0x4E));
#else
  for (int i = 0; i < kLanes; ++i) other[i] = v[i ^ kHalf];
#endif
  return sum_neighbours<kHalf>(v + other);
}

// How query rows lie in the lanes of V vectors: S lanes each.
template <int V, int S>
struct AttentionLanes {
  static constexpr int kVectors = V, kShare = S;
  static constexpr int64_t kPanel = V * kLanes, kRows = kPanel / S;

  // acc[i][v] += sum_k left[i * row + k * step] right[k][v] over `count` k, where a row of `left` has S numbers.
  template <int R>
  static void accumulate(Vec (&acc)[R][V], const float* left, int64_t row, int64_t step, const float* right,
                         int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      Vec columns[V];
      for (int v = 0; v < V; ++v) columns[v] = load(right + k * kPanel + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Vec numbers = load_repeated<S>(left + i * row + k * step);
        for (int v = 0; v < V; ++v) acc[i][v] += numbers * columns[v];
      }
    }
  }
};

// What a task has seen of its rows, in lanes: result (width / S) before its division by `weight`, greatest scores,
// weights.
struct AttentionSums {
  float *result, *greatest, *weight;

  static int64_t size(int64_t numbers, int64_t panel) { return (numbers + 2) * panel; }
  AttentionSums(float* memory, int64_t numbers, int64_t panel)
      : result(memory), greatest(memory + numbers * panel), weight(memory + (numbers + 1) * panel) {}
};

// A panel of the rows of group g of batch element b.
template <typename Lanes, typename Query, typename T>
class AttentionTask {
  static constexpr int V = Lanes::kVectors, S = Lanes::kShare;
  static constexpr int64_t kPanel = Lanes::kPanel;

 public:
  AttentionTask(const AttentionOperands<Query, T>& in, int64_t b, int64_t g, int64_t panel)
      : in_(in),
        b_(b),
        g_(g),
        first_(panel * Lanes::kRows),
        count_(std::min(Lanes::kRows, in.shape.rows() - first_)),
        width_(in.shape.width),
        numbers_(width_ / S),
        memory_((numbers_ + kAttentionBlock) * kPanel + kAttentionBlock * width_) {
    query_ = memory_.get();
    scores_ = query_ + numbers_ * kPanel;
    floats_ = scores_ + kAttentionBlock * kPanel;
    const int64_t ratio = in.shape.ratio();
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t row = std::min(first_ + lane / S, in.shape.rows() - 1), t = row / ratio;
      last_[lane] = int32_t(in.shape.past + t);
      const Query* from = in.query + b * in.query_batch + (g * ratio + row % ratio) * in.query_head + t * in.query_time;
      // Scores are powers of two.
      for (int64_t i = 0; i < numbers_; ++i)
        query_[i * kPanel + lane] = to_float(from[i * S + lane % S]) * (in.scaling * kLog2E);
    }
  }

  // Keys [begin, end) and no others are seen.
  void run(int64_t begin, int64_t end, const AttentionSums& sums) {
    std::fill(sums.result, sums.greatest, 0.0f);
    std::fill(sums.greatest, sums.weight, kNothingSeen);
    std::fill(sums.weight, sums.weight + kPanel, 0.0f);
    const int64_t past = in_.shape.past;
    begin = std::max(begin, in_.starts ? in_.starts[b_] : 0);
    end = std::min<int64_t>(end, last_[count_ * S - 1] + 1);
    for (int64_t k = begin; k < end;) {
      const bool before = k < past;
      const int64_t stop = std::min<int64_t>(before ? std::min(end, past) : end, k + kAttentionBlock);
      const int64_t offset = before ? 0 : past;
      block(before ? in_.past_key : in_.key, before ? in_.past_value : in_.value, k, offset, int(stop - k), sums);
      k = stop;
    }
  }

  // Result / weight to where it belongs; of rows that saw nothing, zero.
  void store_result(const AttentionSums& sums) const {
    const int64_t ratio = in_.shape.ratio();
    for (int64_t lane = 0; lane < count_ * S; ++lane) {
      const int64_t row = first_ + lane / S;
      const int64_t at = (b_ * in_.shape.length + row / ratio) * in_.shape.heads + g_ * ratio + row % ratio;
      const float factor = sums.weight[lane] == 0.0f ? 0.0f : 1.0f / sums.weight[lane];
      for (int64_t i = 0; i < numbers_; ++i)
        from_float(sums.result[i * kPanel + lane] * factor, in_.out + at * width_ + i * S + lane % S);
    }
  }

 private:
  // Rows of `cached` as floats; `stride` is what they are apart.
  const float* floats(const Cached<T>& cached, int64_t first, int count, int64_t* stride) {
    if constexpr (std::is_same_v<T, float>) {
      *stride = cached.token;
      return cached.at(first, b_, g_);
    } else {
      for (int j = 0; j < count; ++j) {
        const T* from = cached.at(first + j, b_, g_);
        float* to = floats_ + j * width_;
        if constexpr (std::is_same_v<T, uint8_t>)
          dequantize(from, Grid(false, cached.scale_at(first + j, b_, g_), 128), width_, to);
        else
          for_vectors(width_, [&](int64_t d, auto lanes) { store(load(from + d, lanes), to + d, lanes); });
      }
      *stride = width_;
      return floats_;
    }
  }

  void block(const Cached<T>& keys, const Cached<T>& values, int64_t k, int64_t offset, int count,
             const AttentionSums& sums) {
    int64_t stride;
    const float* key = floats(keys, k - offset, count, &stride);
    for_groups<kAttentionTile>(count, [&](auto R, int64_t j) {
      Vec acc[R][V] = {};
      Lanes::accumulate(acc, key + j * stride, stride, S, query_, numbers_);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(sum_neighbours<S>(acc[r][v]), scores_ + (j + r) * kPanel + v * kLanes);
    });
    Vec factor[V];
    for (int v = 0; v < V; ++v) factor[v] = weigh(k, count, v * kLanes, sums);
    const float* value = floats(values, k - offset, count, &stride);
    for_groups<kAttentionTile>(numbers_, [&](auto R, int64_t i) {
      float* result = sums.result + i * kPanel;
      Vec acc[R][V];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = load(result + r * kPanel + v * kLanes) * factor[v];
      Lanes::accumulate(acc, value + i * S, S, stride, scores_, count);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(acc[r][v], result + r * kPanel + v * kLanes);
    });
  }

  // Scores of lanes [lane, lane + kLanes) become weights; returns what the sums so far are to be multiplied by.
  Vec weigh(int64_t k, int count, int64_t lane, const AttentionSums& sums) {
    float* scores = scores_ + lane;
    const Vec before = load(sums.greatest + lane);
    IntVec last;
    std::memcpy(&last, last_ + lane, sizeof last);
    Vec greatest = before;
    const bool all_seen = k + count - 1 <= last_[lane];
    for (int j = 0; j < count; ++j) {
      Vec score = load(scores + j * kPanel);
      if (!all_seen) {
        score = last < int32_t(k + j) ? broadcast(-std::numeric_limits<float>::infinity()) : score;
        store(score, scores + j * kPanel);
      }
      greatest = score > greatest ? score : greatest;
    }
    const Vec factor = exp2(before - greatest);
    Vec weight = load(sums.weight + lane) * factor;
    for (int j = 0; j < count; ++j) {
      const Vec share = exp2(load(scores + j * kPanel) - greatest);
      store(share, scores + j * kPanel);
      weight += share;
    }
    store(greatest, sums.greatest + lane);
    store(weight, sums.weight + lane);
    return factor;
  }

  const AttentionOperands<Query, T>& in_;
  const int64_t b_, g_, first_, count_, width_, numbers_;
  const Scratch<float> memory_;
  float *query_, *scores_, *floats_;
  alignas(64) int32_t last_[kPanel];  // the last key that each row sees
};

// Adds what another range of keys has seen.
inline void add_sums(const AttentionSums& to, const AttentionSums& other, int64_t numbers, int64_t panel) {
  for (int64_t lane = 0; lane < panel; ++lane) {
    const float greatest = std::max(to.greatest[lane], other.greatest[lane]);
    const float mine = std::exp2(to.greatest[lane] - greatest), theirs = std::exp2(other.greatest[lane] - greatest);
    to.greatest[lane] = greatest;
    to.weight[lane] = to.weight[lane] * mine + other.weight[lane] * theirs;
    for (int64_t i = 0; i < numbers; ++i) {
      float* at = to.result + i * panel + lane;
      *at = *at * mine + other.result[i * panel + lane] * theirs;
    }
  }
}

template <typename Lanes, typename Query, typename T, typename Threads>
void run_attention_in(const AttentionOperands<Query, T>& in, Threads&& threads) {
  using Task = AttentionTask<Lanes, Query, T>;
  const AttentionShape& s = in.shape;
  const int64_t numbers = s.width / Lanes::kShare, size = AttentionSums::size(numbers, Lanes::kPanel);
  const int64_t panels = ceil_div(s.rows(), Lanes::kRows), units = s.batch * s.groups * panels;
  const int64_t ranges = panels == 1 ? ceil_div(s.keys(), kAttentionRange) : 1, keys = ceil_div(s.keys(), ranges);
  const Scratch<float> parts(ranges > 1 ? units * ranges * size : 0);
  const auto task = [&](int64_t unit) {
    return Task(in, unit / panels / s.groups, unit / panels % s.groups, unit % panels);
  };
  const auto sums = [&](float* memory) { return AttentionSums(memory, numbers, Lanes::kPanel); };
  // A thread is woken for 2^17 products, some microseconds of work.
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 17) / (keys * numbers * Lanes::kPanel));
  threads(units * ranges, grain, [&](int64_t begin, int64_t end) {
    const Scratch<float> own(size);
    for (int64_t i = begin; i < end; ++i) {
      // Groups lie side by side in a range: what one has read is near when the next one's turn comes.
      const int64_t unit = i % units, range = i / units;
      Task part = task(unit);
      const AttentionSums seen = sums(ranges > 1 ? parts.get() + (unit * ranges + range) * size : own.get());
      part.run(range * keys, std::min((range + 1) * keys, s.keys()), seen);
      if (ranges == 1) part.store_result(seen);
    }
  });
  if (ranges == 1) return;
  threads(units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      float* first = parts.get() + unit * ranges * size;
      for (int64_t range = 1; range < ranges; ++range)
        add_sums(sums(first), sums(first + range * size), numbers, Lanes::kPanel);
      task(unit).store_result(sums(first));
    }
  });
}

// S lanes a row, or fewer, so that they fit one vector and S divides the width.
template <int S, typename Query, typename T, typename Threads>
void run_attention_shared(const AttentionOperands<Query, T>& in, Threads&& threads) {
  if constexpr (S > 1)
    if (in.shape.rows() * S > kLanes || in.shape.width % S) return run_attention_shared<S / 2>(in, threads);
  run_attention_in<AttentionLanes<1, S>>(in, threads);
}

template <typename Query, typename T, typename Threads>
void run_attention(const AttentionOperands<Query, T>& in, Threads&& threads) {
  if (in.shape.rows() > kLanes) return run_attention_in<AttentionLanes<2, 1>>(in, threads);
  run_attention_shared<kLanes>(in, threads);
}

}  // namespace mq_ao
