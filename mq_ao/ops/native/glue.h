// What the PyTorch registrations share: tensors as the cores' rows, and the way back to the Python references.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "scan.h"
#include "tasks.h"
#include "workspace.h"

namespace mq_ao {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
struct ScalarOf {
  using type = T;
};
template <>
struct ScalarOf<BFloat16> {
  using type = at::BFloat16;
};

// The tensor itself when its last axis is dense, which slices of a linear layer's output are; else a copy.
inline Tensor dense_rows(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

// Rows of a (batch, length, last) or (batch, length, groups, last) tensor that went through `dense_rows`.
template <typename T>
Rows<T> rows(const Tensor& t) {
  T* data = reinterpret_cast<T*>(t.data_ptr<typename ScalarOf<std::remove_const_t<T>>::type>());
  return {data, t.stride(0), t.stride(1), t.dim() == 4 ? t.stride(2) : 0};
}

inline OptionalTensor float_contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(t->to(at::kFloat).contiguous()) : t;
}

inline const float* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }

inline bool has_shape(const OptionalTensor& t, at::IntArrayRef shape) { return !t || t->sizes() == shape; }

inline bool is_native_dtype(const Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16;
}

// PyTorch's threads, as tasks.h calls them.
struct TorchThreads {
  template <typename Part>
  void operator()(int64_t count, int64_t grain, Part&& part) const {
    at::parallel_for(0, count, grain, flushing(part));
  }
};

// Runs the Python reference of an operator: it takes every dtype, and says what is wrong with bad input.
template <typename Signature, typename... Args>
auto call_reference(const char* name, Args&&... args) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("mq_ao::") + name + "_reference").c_str(), "")
      .typed<Signature>()
      .call(std::forward<Args>(args)...);
}

}  // namespace mq_ao
