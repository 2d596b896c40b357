// mq_ao::hadamard for PyTorch's CPU dispatch key; the schema is defined in Python.

#include "hadamard.h"

#include "glue.h"

namespace mq_ao {
namespace {

// row <- x * scale
template <typename T>
void load_row(const T* x, const float* scale, int64_t n, float* row) {
  for_vectors(n, [&](int64_t i, auto lanes) {
    const Vec v = load(x + i, lanes);
    store(scale ? v * load(scale + i, lanes) : v, row + i, lanes);
  });
}

void store_row(const float* row, int64_t n, BFloat16* y) {
  for_vectors(n, [&](int64_t i, auto lanes) { store(load(row + i, lanes), y + i, lanes); });
}

template <typename T>
void rotate_rows(const hadamard::Plan& plan, const T* x, int64_t stride, int64_t rows, const float* scale, T* y) {
  const int64_t n = plan.n;
  // A thread is woken for 32768 values, some microseconds of work.
  at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end) {
    const Scratch<float> work(plan.work_size());
    if constexpr (std::is_same_v<T, float>) {
      for (int64_t i = begin; i < end; ++i) {
        load_row(x + i * stride, scale, n, y + i * n);
        hadamard::rotate(plan, y + i * n, work.get());
      }
    } else {
      const Scratch<float> row(n);
      for (int64_t i = begin; i < end; ++i) {
        load_row(x + i * stride, scale, n, row.get());
        hadamard::rotate(plan, row.get(), work.get());
        store_row(row.get(), n, y + i * n);
      }
    }
  });
}

Tensor hadamard_rows(const Tensor& x, const OptionalTensor& scale) {
  const int64_t n = x.dim() > 0 ? x.size(-1) : 0;
  const hadamard::Plan* plan = n > 0 && is_native_dtype(x) ? hadamard::find_plan(n) : nullptr;
  if (!plan || (scale && !at::isFloatingType(scale->scalar_type())) || !has_shape(scale, {n}))
    return call_reference<decltype(hadamard_rows)>("hadamard", x, scale);
  const Tensor rows = dense_rows(x.reshape({-1, n}));
  const OptionalTensor scale_ = float_contiguous(scale);
  Tensor y = at::empty(x.sizes(), x.options());
  const auto run = [&]<typename T>(const T*) {
    using Scalar = typename ScalarOf<T>::type;
    rotate_rows(*plan, reinterpret_cast<const T*>(rows.const_data_ptr<Scalar>()), rows.stride(0), rows.size(0),
                data_or_null(scale_), reinterpret_cast<T*>(y.mutable_data_ptr<Scalar>()));
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
