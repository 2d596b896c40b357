// mq_ao::gate for ExecuTorch.

#include "gate.h"

#include "operands.h"

namespace mq_ao::et {
namespace {

void float_gate(
    Context& context, const Tensor& y, const Tensor& z, const OptionalTensor& s, bool rotated, Tensor& out) {
  MQ_AO_REQUIRE(
      context,
      require(is_float(y) && y.dim() > 0 && y.size(y.dim() - 1) > 0, "gate: y", "be float32 of shape (..., n)", y) &&
          require(is_float(z) && z.sizes().equals(y.sizes()), "gate: z", "be float32 of y's shape", z) &&
          require(executorch::runtime::tensor_is_default_dim_order(y), "gate: y", "be contiguous", y) &&
          require(executorch::runtime::tensor_is_default_dim_order(z), "gate: z", "be contiguous", z));
  const int64_t n = y.size(y.dim() - 1);
  const hadamard::Plan* plan = rotated ? hadamard::find_plan(n) : nullptr;
  MQ_AO_REQUIRE(
      context,
      require(!rotated || plan, "gate: y", "have a last axis for which a Hadamard matrix is known", y) &&
          fits("gate: s", s, ScalarType::Float, {n}) && prepare_like("gate: out", out, y));
  const gate::Gate<float, float> gated{
      {y.const_data_ptr<float>(), n, 1.0f, 0.0f},
      {z.const_data_ptr<float>(), n, 1.0f, 0.0f},
      data_or_null<float>(s),
      n,
      plan};
  gate::run_rows(gated, y.numel() / n, out.mutable_data_ptr<float>(), RuntimeThreads{context});
}

[[maybe_unused]] const bool entered = enter<float_gate>("mq_ao::gate.out");

}  // namespace
}  // namespace mq_ao::et
