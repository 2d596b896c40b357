// mq_ao::<name>_into for PyTorch's CPU dispatch key: `name`, whose last state is written to the caller's memory.

#include "last_state.h"

#include <unordered_map>

namespace mq_ao {
namespace {

constexpr const char* kStateful[] = {"causal_conv1d",  "qcausal_conv1d", "selective_scan",
                                     "qselective_scan", "ssd_scan",       "qssd_scan"};

// The operators by the names of their twins.
const c10::OperatorHandle& operator_of(const std::string& twin) {
  static const auto found = [] {
    std::unordered_map<std::string, c10::OperatorHandle> all;
    for (const char* name : kStateful) {
      const std::string full = std::string("mq_ao::") + name;
      all.emplace(full + "_into", c10::Dispatcher::singleton().findSchemaOrThrow(full.c_str(), ""));
    }
    return all;
  }();
  return found.at(twin);
}

void into(const c10::OperatorHandle& twin, torch::jit::Stack* stack) {
  const Tensor memory = torch::jit::pop(*stack).toTensor();
  {
    const StateMemory offered(memory);
    operator_of(twin.schema().name()).callBoxed(*stack);
  }
  const Tensor last_state = torch::jit::pop(*stack).toTensor();
  if (last_state.is_same(memory)) return;
  TORCH_CHECK(memory.sizes() == last_state.sizes() && memory.scalar_type() == last_state.scalar_type(),
              twin.schema().name(), ": last_state must be ", last_state.scalar_type(), " ", last_state.sizes(),
              ", it is ", memory.scalar_type(), " ", memory.sizes());
  memory.copy_(last_state);
}

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) {
  for (const char* name : kStateful)
    m.impl((std::string(name) + "_into").c_str(), torch::CppFunction::makeFromBoxedFunction<&into>());
}

}  // namespace
}  // namespace mq_ao
