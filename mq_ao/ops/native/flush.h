// Numbers too small for a normal float32 become zero while a kernel runs.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace mq_ao {

// x86 takes a hundred cycles for a result below 1.2e-38. Decays over many steps are full of them, and nothing that a
// state is added to sees them. For the calling thread alone, and put back; other processors have no such cost.
class FlushToZero {
 public:
#if defined(__SSE__)
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before_); }
#else
  FlushToZero() {}
  ~FlushToZero() {}
#endif
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
#if defined(__SSE__)
  unsigned before_;
#endif
};

}  // namespace mq_ao
