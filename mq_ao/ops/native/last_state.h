// Where operators that carry a state put the last one: mq_ao::<name>_into gives them the memory.
#pragma once

#include "glue.h"

namespace mq_ao {

// Gives the memory to the operator that this thread calls next, while the object lives.
class StateMemory {
 public:
  explicit StateMemory(const Tensor& memory) { given() = memory; }
  ~StateMemory() { given() = Tensor(); }
  StateMemory(const StateMemory&) = delete;
  StateMemory& operator=(const StateMemory&) = delete;

  // Memory of that size and type: what was given, if it fits, else new.
  static Tensor take(at::IntArrayRef sizes, at::TensorOptions options) {
    const Tensor memory = std::exchange(given(), Tensor());
    const bool fits = memory.defined() && memory.sizes() == sizes && memory.is_contiguous() &&
        memory.scalar_type() == c10::typeMetaToScalarType(options.dtype());
    return fits ? memory : empty(sizes, options);
  }

 private:
  static Tensor& given() {
    static thread_local Tensor memory;
    return memory;
  }
};

}  // namespace mq_ao
