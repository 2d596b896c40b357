// What keeps float results equal to the PyTorch references, bit for bit.
#pragma once

namespace mq_ao {

// A value the optimiser knows nothing of. Keeps a product from being fused with the addition that uses it, and a
// division from becoming a product, so that results equal the PyTorch reference bit for bit whatever the flags.
template <typename T>
inline T pinned(T value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__SSE2__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  volatile T copy = value;
  value = copy;
#endif
  return value;
}

}  // namespace mq_ao
