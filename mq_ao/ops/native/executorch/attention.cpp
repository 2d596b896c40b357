// mq_ao::attention_into_cache for ExecuTorch.

#include "attention.h"

#include <cstring>

#include "operands.h"

namespace mq_ao::et {
namespace {

Cached<float> cached(const Tensor& t) {
  return {t.const_data_ptr<float>(), t.strides()[0], t.strides()[1], t.strides()[2], nullptr, 0, 0, 0};
}

void attention_into_cache(
    Context& context, const Tensor& query, const Tensor& key, const Tensor& value, double scaling, Tensor& key_cache,
    Tensor& value_cache, const Tensor& position, Tensor& out) {
  constexpr auto kFloat = ScalarType::Float;
  MQ_AO_REQUIRE(
      context,
      require(query.dim() == 4 && query.numel() > 0, "attention: query", "be (batch, heads, length, width)", query) &&
          require(key.dim() == 4 && key.numel() > 0 && query.size(1) % key.size(2) == 0, "attention: key",
                  "be (length, batch, groups, width), groups dividing heads", key) &&
          require(key_cache.dim() == 4, "attention: key_cache", "be (most tokens, batch, groups, width)", key_cache));
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2), width = query.size(3);
  const int64_t groups = key.size(2), most = key_cache.size(0);
  MQ_AO_REQUIRE(
      context,
      fits("attention: query", query, kFloat, {batch, heads, length, width}) &&
          fits("attention: key", key, kFloat, {length, batch, groups, width}) &&
          fits("attention: value", value, kFloat, {length, batch, groups, width}) &&
          fits("attention: key_cache", key_cache, kFloat, {most, batch, groups, width}) &&
          fits("attention: value_cache", value_cache, kFloat, {most, batch, groups, width}) &&
          fits("attention: position", position, ScalarType::Long, {1}) &&
          prepare("attention: out", out, kFloat, {batch, length, heads, width}));
  const int64_t past = *position.const_data_ptr<int64_t>(), row = batch * groups * width;
  MQ_AO_REQUIRE(
      context,
      require(past >= 0 && past <= most - length, "attention: key_cache", "have room for the new tokens", key_cache));
  std::memcpy(key_cache.mutable_data_ptr<float>() + past * row, key.const_data_ptr<float>(), key.nbytes());
  std::memcpy(value_cache.mutable_data_ptr<float>() + past * row, value.const_data_ptr<float>(), value.nbytes());
  const AttentionOperands<float, float> in{
      {batch, length, heads, groups, width, past},
      query.const_data_ptr<float>(),
      query.strides()[0],
      query.strides()[1],
      query.strides()[2],
      cached(key_cache),
      cached(value_cache),
      cached(key),
      cached(value),
      nullptr,
      float(scaling),
      out.mutable_data_ptr<float>()};
  run_attention(in, RuntimeThreads{context});
}

[[maybe_unused]] const bool entered = enter<attention_into_cache>("mq_ao::attention_into_cache.out");

}  // namespace
}  // namespace mq_ao::et
