// One packed copy of weights that several methods of a program use.

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>

// Tells XNNPACK to keep packed weights in one cache (1) or with each delegate (0). Holds for methods that are loaded
// afterwards. Returns 0, or ExecuTorch's error number: XNNPACK is not in this process, or does not know the option.
extern "C" int mq_ao_share_packed_weights(int on) {
  executorch::runtime::BackendOptions<1> options;
  const auto error = options.set_option("weight_cache_enabled", on != 0);
  if (error != executorch::runtime::Error::Ok) return static_cast<int>(error);
  return static_cast<int>(executorch::runtime::set_option("XnnpackBackend", options.view()));
}
