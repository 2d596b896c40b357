// How the cores' work is cut into parts for threads: the same cuts for PyTorch's threads and for ExecuTorch's.
//
// `threads(count, grain, part)` calls part(begin, end) for ranges that together cover [0, count), of `grain` items at
// least while there are so many.
#pragma once

#include "flush.h"
#include "scan.h"

namespace mq_ao {

// The same part, in which small numbers become zero.
template <typename Part>
auto flushing(Part& part) {
  return [&part](int64_t begin, int64_t end) {
    const FlushToZero flush;
    part(begin, end);
  };
}

// Writes y and the last state; see scan_task for the types.
template <typename In, typename Output, typename LastState, typename Threads>
void run_scan(const In& in, const Output& y, const LastState& last_state, Threads&& threads) {
  const ScanShape& s = in.shape;
  if (s.length == 1 && s.d_state % kLanes == 0) {
    const ScanTasks tasks{s, kLanes};
    // A thread is woken for 8192 states, some microseconds of work.
    const int64_t grain = std::max<int64_t>(1, 8192 / (kLanes * s.d_state));
    threads(tasks.count(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) scan_step(in, tasks.task(i), y, last_state);
    });
    return;
  }
  const ScanTasks tasks{s, kRangeBlocks * kLanes};
  threads(tasks.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) scan_task(in, tasks.task(i), y, last_state);
  });
}

// Channels [first, first + count) of batch elements [begin, end): what a thread prepares of channels serves them all.
struct ChannelTask {
  int64_t begin, end, first, count;
};

// Calls task(ChannelTask) for parts that together are all of (batch, channels).
template <typename Threads, typename Task>
void for_channel_ranges(int64_t batch, int64_t length, int64_t channels, Threads&& threads, Task&& task) {
  const int64_t range = kRangeBlocks * kLanes, ranges = ceil_div(channels, range);
  // A thread is woken for 1024 outputs, some microseconds of work.
  const int64_t grain = std::max<int64_t>(1, 1024 / (range * length));
  threads(batch * ranges, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t first = i / batch * range, b = i % batch, elements = std::min(batch - b, end - i);
      task(ChannelTask{b, b + elements, first, std::min(range, channels - first)});
      i += elements;
    }
  });
}

// Calls part(begin, end) for ranges of rows of n values: a thread is woken for `values`, some microseconds of work.
template <typename Threads, typename Part>
void for_row_ranges(int64_t rows, int64_t n, int64_t values, Threads&& threads, Part&& part) {
  threads(rows, std::max<int64_t>(1, values / n), part);
}

}  // namespace mq_ao
