// mq_ao::hadamard for ExecuTorch.

#include "hadamard_rows.h"
#include "operands.h"

namespace mq_ao::et {
namespace {

void hadamard_rows(Context& context, const Tensor& x, const OptionalTensor& scale, Tensor& y) {
  MQ_AO_REQUIRE(
      context,
      require(is_float(x) && x.dim() > 0 && x.size(x.dim() - 1) > 0, "hadamard: x",
              "be float32 of shape (..., n)", x) &&
          require(executorch::runtime::tensor_is_default_dim_order(x), "hadamard: x", "be contiguous", x));
  const int64_t n = x.size(x.dim() - 1);
  const hadamard::Plan* plan = hadamard::find_plan(n);
  MQ_AO_REQUIRE(
      context,
      require(plan != nullptr, "hadamard: x", "have a last axis for which a Hadamard matrix is known", x) &&
          fits("hadamard: scale", scale, ScalarType::Float, {n}) && prepare_like("hadamard: y", y, x));
  hadamard::rotate_rows(
      *plan, x.const_data_ptr<float>(), n, x.numel() / n, data_or_null<float>(scale), y.mutable_data_ptr<float>(),
      RuntimeThreads{context});
}

[[maybe_unused]] const bool entered = enter<hadamard_rows>("mq_ao::hadamard.out");

}  // namespace
}  // namespace mq_ao::et
