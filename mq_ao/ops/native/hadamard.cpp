// mq_ao::hadamard for PyTorch's CPU dispatch key; the schema is defined in Python.

#include "hadamard_rows.h"

#include "glue.h"

namespace mq_ao {
namespace {

Tensor hadamard_rows(const Tensor& x, const OptionalTensor& scale) {
  const int64_t n = x.dim() > 0 ? x.size(-1) : 0;
  const hadamard::Plan* plan = n > 0 && is_native_dtype(x) ? hadamard::find_plan(n) : nullptr;
  if (!plan || (scale && !at::isFloatingType(scale->scalar_type())) || !has_shape(scale, {n}))
    return call_reference<decltype(hadamard_rows)>("hadamard", x, scale);
  const Tensor rows = dense_rows(x.reshape({-1, n}));
  const OptionalTensor scale_ = float_contiguous(scale);
  Tensor y = empty(x.sizes(), x.options());
  const auto run = [&]<typename T>(const T*) {
    using Scalar = typename ScalarOf<T>::type;
    hadamard::rotate_rows(*plan, reinterpret_cast<const T*>(rows.const_data_ptr<Scalar>()), rows.stride(0), rows.size(0),
                          data_or_null(scale_), reinterpret_cast<T*>(y.mutable_data_ptr<Scalar>()), TorchThreads());
  };
  if (x.scalar_type() == at::kFloat)
    run(static_cast<const float*>(nullptr));
  else
    run(static_cast<const BFloat16*>(nullptr));
  return y;
}

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) { m.impl("hadamard", hadamard_rows); }

}  // namespace
}  // namespace mq_ao
