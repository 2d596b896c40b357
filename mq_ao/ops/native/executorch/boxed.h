// Kernels in ExecuTorch's operator registry.
//
// The runtime hands a kernel its arguments as an array of tagged values. EXECUTORCH_LIBRARY takes kernels with one
// result alone, and trusts the values to be as many and of the types that it expects. Ours have up to two results, and
// a program of another version must end in an error.
#pragma once

#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <optional>
#include <string_view>
#include <utility>

namespace mq_ao::et {

using Context = executorch::runtime::KernelRuntimeContext;
using executorch::aten::Tensor;
using executorch::runtime::EValue;

// How a parameter of a kernel is told from a value, and taken from it.
template <typename T>
struct Argument;

template <>
struct Argument<Tensor> {
  static bool holds(const EValue& value) { return value.isTensor(); }
  static Tensor& get(EValue& value) { return value.toTensor(); }
};
template <>
struct Argument<const Tensor&> : Argument<Tensor> {};
template <>
struct Argument<Tensor&> : Argument<Tensor> {};
template <>
struct Argument<bool> {
  static bool holds(const EValue& value) { return value.isBool(); }
  static bool get(const EValue& value) { return value.toBool(); }
};
template <>
struct Argument<int64_t> {
  static bool holds(const EValue& value) { return value.isInt(); }
  static int64_t get(const EValue& value) { return value.toInt(); }
};
template <>
struct Argument<double> {
  static bool holds(const EValue& value) { return value.isDouble(); }
  static double get(const EValue& value) { return value.toDouble(); }
};
template <>
struct Argument<std::string_view> {
  static bool holds(const EValue& value) { return value.isString(); }
  static std::string_view get(const EValue& value) { return value.toString(); }
};
template <typename T>
struct Argument<std::optional<T>> {
  static bool holds(const EValue& value) { return value.isNone() || Argument<T>::holds(value); }
  static std::optional<T> get(EValue& value) {
    return value.isNone() ? std::nullopt : std::optional<T>(Argument<T>::get(value));
  }
};
template <typename T>
struct Argument<const std::optional<T>&> : Argument<std::optional<T>> {};

// `function` as the registry calls it.
template <auto function>
struct Boxed;
template <typename... Parameters, void (*function)(Context&, Parameters...)>
struct Boxed<function> {
  static void call(Context& context, executorch::runtime::Span<EValue*> values) {
    unboxed(context, values, std::index_sequence_for<Parameters...>());
  }

 private:
  template <size_t... I>
  static void unboxed(Context& context, executorch::runtime::Span<EValue*> values, std::index_sequence<I...>) {
    // After the arguments a program names the results once more.
    const bool as_in_schema =
        values.size() >= sizeof...(Parameters) && (Argument<Parameters>::holds(*values[I]) && ...);
    ET_KERNEL_CHECK_MSG(context, as_in_schema, InvalidArgument, , "the program was made for other mq_ao kernels");
    function(context, Argument<Parameters>::get(*values[I])...);
  }
};

// Enters `function` as operator `name`, which must live as long as the process.
template <auto function>
bool enter(const char* name) {
  const executorch::runtime::Kernel kernel(name, Boxed<function>::call);
  return executorch::runtime::register_kernel(kernel) == executorch::runtime::Error::Ok;
}

}  // namespace mq_ao::et
