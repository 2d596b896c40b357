// mq_ao::cached_attention for PyTorch's CPU dispatch key; the schema is defined in Python.

#include "attention.h"
#include "glue.h"

namespace mq_ao {
namespace {

// Whether keys or values, with their scales, are ones that the core takes.
bool fits(const OptionalTensor& t, const OptionalTensor& scale, at::ScalarType dtype, at::IntArrayRef shape) {
  if (!t) return !scale;
  const bool integers = dtype == at::kByte;
  return t->scalar_type() == dtype && t->sizes() == shape && scale.has_value() == integers &&
         (!scale || (scale->scalar_type() == at::kFloat && scale->sizes() == shape.slice(0, 3)));
}

OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(dense_rows(*t)) : t; }

template <typename T>
Cached<T> cached(const OptionalTensor& t, const OptionalTensor& scale) {
  if (!t) return {};
  const T* data = reinterpret_cast<const T*>(t->const_data_ptr());
  if (!scale) return {data, t->stride(0), t->stride(1), t->stride(2), nullptr, 0, 0, 0};
  return {data, t->stride(0), t->stride(1), t->stride(2), scale->const_data_ptr<float>(), scale->stride(0),
          scale->stride(1), scale->stride(2)};
}

Tensor cached_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, double scaling, const OptionalTensor& past_key,
    const OptionalTensor& past_value, const OptionalTensor& key_scale, const OptionalTensor& value_scale,
    const OptionalTensor& past_key_scale, const OptionalTensor& past_value_scale, const OptionalTensor& starts) {
  const at::ScalarType dtype = key.scalar_type();
  const auto native = [&] {
    if (query.dim() != 4 || key.dim() != 4 || query.numel() == 0 || key.numel() == 0) return false;
    if (past_key.has_value() != past_value.has_value() || (past_key && past_key->dim() != 4)) return false;
    const int64_t batch = query.size(0), length = query.size(2), groups = key.size(2), width = query.size(3);
    const at::DimVector now{length, batch, groups, width};
    const at::DimVector before{past_key ? past_key->size(0) : 0, batch, groups, width};
    return is_native_dtype(query) && (dtype == at::kByte || dtype == query.scalar_type()) &&
           query.size(1) % groups == 0 && fits(key, key_scale, dtype, now) && fits(value, value_scale, dtype, now) &&
           fits(past_key, past_key_scale, dtype, before) && fits(past_value, past_value_scale, dtype, before) &&
           (!starts || (starts->scalar_type() == at::kLong && starts->sizes() == at::DimVector{batch}));
  };
  if (!native())
    return call_reference<decltype(cached_attention)>(
        "cached_attention", query, key, value, scaling, past_key, past_value, key_scale, value_scale, past_key_scale,
        past_value_scale, starts);
  const Tensor rows = dense_rows(query), keys = dense_rows(key), values = dense_rows(value);
  const OptionalTensor past_keys = dense(past_key), past_values = dense(past_value);
  const OptionalTensor first = starts ? OptionalTensor(starts->contiguous()) : starts;
  const AttentionShape shape{query.size(0), query.size(2), query.size(1), key.size(2), query.size(3),
                             past_key ? past_key->size(0) : 0};
  Tensor out = empty({shape.batch, shape.length, shape.heads, shape.width}, query.options());
  const auto run = [&](auto query_type, auto type) {
    using Query = decltype(query_type);
    using T = decltype(type);
    run_attention(
        AttentionOperands<Query, T>{
            shape, reinterpret_cast<const Query*>(rows.const_data_ptr()), rows.stride(0), rows.stride(1),
            rows.stride(2), cached<T>(past_keys, past_key_scale), cached<T>(past_values, past_value_scale),
            cached<T>(keys, key_scale), cached<T>(values, value_scale),
            first ? first->const_data_ptr<int64_t>() : nullptr, float(scaling),
            reinterpret_cast<Query*>(out.data_ptr())},
        TorchThreads());
  };
  const auto with_query = [&](auto query_type) {
    dtype == at::kByte ? run(query_type, uint8_t{}) : run(query_type, query_type);
  };
  query.scalar_type() == at::kFloat ? with_query(float{}) : with_query(BFloat16{});
  return out;
}

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) { m.impl("cached_attention", cached_attention); }

}  // namespace
}  // namespace mq_ao
