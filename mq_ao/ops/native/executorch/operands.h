// What ExecuTorch's kernels share: checks of operands, results, and threads.
//
// Operands are contiguous: programs hold no strides beyond an order of axes, and only the usual order is taken.
#pragma once

#include <executorch/runtime/core/exec_aten/util/tensor_shape_to_c_string.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <array>
#include <initializer_list>

#include "boxed.h"
#include "scan.h"
#include "tasks.h"

namespace mq_ao::et {

using executorch::aten::ScalarType;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

inline bool is_float(const Tensor& t) { return t.scalar_type() == ScalarType::Float; }
inline bool is_signed(const Tensor& t) { return t.scalar_type() == ScalarType::Char; }
inline bool is_byte(const Tensor& t) { return t.scalar_type() == ScalarType::Byte || is_signed(t); }

inline bool has_sizes(const Tensor& t, Sizes sizes) {
  if (t.dim() != int64_t(sizes.size())) return false;
  const auto* size = t.sizes().data();
  for (const int64_t wanted : sizes)
    if (*size++ != wanted) return false;
  return true;
}

inline std::array<char, executorch::runtime::kTensorShapeStringSizeLimit> shape_text(const Tensor& t) {
  return executorch::runtime::tensor_shape_to_c_string({t.sizes().data(), t.sizes().size()});
}

// Whether `condition` holds; logs what `label` (operator and operand) must be if not.
inline bool require(bool condition, const char* label, const char* must, const Tensor& t) {
  if (!condition)
    ET_LOG(Error, "mq_ao::%s must %s; it is %s %s", label, must, torch::executor::toString(t.scalar_type()),
           shape_text(t).data());
  return condition;
}

// Whether `t` has this dtype and these sizes in the usual order; logs what is wrong if not.
inline bool fits(const char* label, const Tensor& t, ScalarType dtype, Sizes sizes) {
  if (t.scalar_type() == dtype && has_sizes(t, sizes))
    return require(executorch::runtime::tensor_is_default_dim_order(t), label, "be contiguous", t);
  const executorch::runtime::Span<const int64_t> shape(sizes.begin(), sizes.size());
  const auto wanted = executorch::runtime::tensor_shape_to_c_string(shape);
  ET_LOG(Error, "mq_ao::%s must be %s %s; it is %s %s", label, torch::executor::toString(dtype), wanted.data(),
         torch::executor::toString(t.scalar_type()), shape_text(t).data());
  return false;
}
inline bool fits(const char* label, const OptionalTensor& t, ScalarType dtype, Sizes sizes) {
  return !t || fits(label, *t, dtype, sizes);
}

template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// A dense tensor (batch, length, last) or (batch, length, groups, last) as the cores' rows.
template <typename T>
Rows<T> rows(T* data, const Tensor& t) {
  const auto strides = t.strides();
  return {data, strides[0], strides[1], t.dim() == 4 ? strides[2] : 0};
}

// Gives a result its sizes, which depend on the length; false if the program has no room for them or another dtype.
inline bool prepare(const char* label, Tensor& out, ScalarType dtype, Sizes sizes) {
  executorch::aten::SizesType wanted[8];
  std::copy(sizes.begin(), sizes.end(), wanted);
  return require(executorch::runtime::resize_tensor(out, {wanted, sizes.size()}) == executorch::runtime::Error::Ok,
                 label, "have room for the result", out) &&
      fits(label, out, dtype, sizes);
}

// As `prepare`, for a float32 result of the sizes of `like`.
inline bool prepare_like(const char* label, Tensor& out, const Tensor& like) {
  return require(is_float(out), label, "be float32", out) &&
      require(executorch::runtime::resize_tensor(out, like.sizes()) == executorch::runtime::Error::Ok, label,
              "have room for the result", out) &&
      require(executorch::runtime::tensor_is_default_dim_order(out), label, "be contiguous", out);
}

// ExecuTorch's threads, as tasks.h calls them.
struct RuntimeThreads {
  Context& context;

  template <typename Part>
  void operator()(int64_t count, int64_t grain, Part&& part) const {
    if (!executorch::extension::parallel_for(0, count, grain, flushing(part)))
      context.fail(executorch::runtime::Error::Internal);
  }
};

}  // namespace mq_ao::et

// Leaves a kernel with an error unless `condition`, which has logged why, holds.
#define MQ_AO_REQUIRE(context, condition) \
  if (!(condition)) return context.fail(executorch::runtime::Error::InvalidArgument)
