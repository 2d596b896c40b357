// mq_ao::expert_linear, expert_linear_packed, expert_linear_packed_per_token: rows of which each belongs to an expert.
// Bad input goes to the Python references, which say what is wrong with it.
#include <ATen/ops/mm.h>

#include <cmath>

#include "linear_glue.h"

namespace mq_ao {
namespace {

// Ends as int64, or nothing where they do not rise from 0 or more to `rows`.
OptionalTensor ends_of(const Tensor& ends, int64_t rows) {
  if (ends.dim() != 1 || ends.size(0) < 1) return {};
  if (ends.scalar_type() != at::kInt && ends.scalar_type() != at::kLong) return {};
  const Tensor wide = ends.to(at::kLong).contiguous();
  const int64_t* data = wide.const_data_ptr<int64_t>();
  int64_t before = 0;
  for (int64_t e = 0; e < wide.size(0); ++e) {
    if (data[e] < before) return {};
    before = data[e];
  }
  return before == rows ? OptionalTensor(wide) : OptionalTensor();
}

// Calls task(expert, first row, end) for experts that have rows.
template <typename Task>
void for_experts(const Tensor& ends, Task&& task) {
  const int64_t* data = ends.const_data_ptr<int64_t>();
  for (int64_t e = 0, begin = 0; e < ends.size(0); begin = data[e++])
    if (data[e] > begin) task(e, begin, data[e]);
}

Tensor expert_linear(const Tensor& x, const Tensor& weight, const Tensor& ends) {
  const OptionalTensor all = x.dim() == 2 && weight.dim() == 2 ? ends_of(ends, x.size(0)) : OptionalTensor();
  if (!all || x.scalar_type() != weight.scalar_type() || !x.is_floating_point() || x.size(1) != weight.size(1) ||
      weight.size(0) == 0 || weight.size(0) % all->size(0) != 0)
    return call_reference<decltype(expert_linear)>("expert_linear", x, weight, ends);
  const int64_t outputs = weight.size(0) / all->size(0);
  Tensor y = empty({x.size(0), outputs}, x.options());
  for_experts(*all, [&](int64_t e, int64_t begin, int64_t end) {
    Tensor rows = y.slice(0, begin, end);
    at::mm_out(rows, x.slice(0, begin, end), weight.slice(0, e * outputs, (e + 1) * outputs).t());
  });
  return y;
}

struct Experts {
  Layout layout;
  OptionalTensor ends;

  Experts(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& given, int64_t bits,
          int64_t group_size)
      : layout{0, 0} {
    if (x.dim() != 2 || x.scalar_type() != at::kByte || scale.dim() != (group_size ? 3 : 2)) return;
    const Layout l{scale.size(-1), x.size(1), bits, group_size};
    if (!is_layout(l) || scale.scalar_type() != at::kFloat || !scale.is_contiguous() || given.dim() != 1) return;
    if (scale.size(0) != given.size(0) || (group_size && scale.size(1) != l.groups())) return;
    if (packed.scalar_type() != at::kChar || !packed.is_contiguous()) return;
    if (packed.sizes() != at::DimVector{given.size(0), l.bytes()}) return;
    layout = l;
    ends = ends_of(given, x.size(0));
  }

  // Threads take equal shares of the line of all experts' columns, in units, whether experts are many or few.
  Tensor multiply(const Tensor& x, const Activations& a, const Tensor& packed, const Tensor& scale) const {
    const Layout& l = layout;
    Tensor y = empty({x.size(0), l.n}, x.options().dtype(at::kFloat));
    float* out = y.mutable_data_ptr<float>();
    const int64_t units = l.outputs() / l.unit();
    double all = 0;
    for_experts(*ends, [&](int64_t, int64_t begin, int64_t end) { all += qgemm::cost(end - begin, l.n, l); });
    const auto shares = int64_t(std::clamp(all / qgemm::kThreadCost, 1.0, double(at::get_num_threads())));
    const auto run_share = [&](double first, double last) {
      double before = 0;
      for_experts(*ends, [&](int64_t e, int64_t begin, int64_t end) {
        const double own = qgemm::cost(end - begin, l.n, l);
        const auto column = [&](double at) {
          return std::min(l.n, l.unit() * int64_t(std::ceil(std::clamp((at - before) / own, 0.0, 1.0) * double(units))));
        };
        const int64_t from = column(first), to = column(last);
        before += own;
        if (from == to) return;
        const Linear w{l, packed.const_data_ptr<int8_t>() + e * l.bytes(),
                       scale.const_data_ptr<float>() + e * l.n * l.groups(), nullptr};
        Activations rows = a;
        rows.data += begin * a.stride;
        rows.scale += begin * a.scale_step;
        qgemm::block(rows, w, Output{out + begin * l.n}, 0, end - begin, from, to);
      });
    };
    at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
      // The last share ends with the line, however sums were rounded.
      const double last = end == shares ? 2 * all : all * double(end) / double(shares);
      run_share(all * double(begin) / double(shares), last);
    });
    return y;
  }
};

Tensor expert_linear_packed(const Tensor& x, double x_scale, int64_t x_zero_point, const Tensor& packed,
                            const Tensor& weight_scale, const Tensor& ends, int64_t bits, int64_t group_size) {
  const Experts experts(x, packed, weight_scale, ends, bits, group_size);
  if (!experts.ends || !is_zero_point(x_zero_point))
    return call_reference<decltype(expert_linear_packed)>("expert_linear_packed", x, x_scale, x_zero_point, packed,
                                                          weight_scale, ends, bits, group_size);
  at::DataPtr storage;
  const Tensor rows = as_rows(x);
  Activations a = readable_rows(rows, experts.layout, &storage);
  const float scale = static_cast<float>(x_scale);
  a.scale = &scale;
  a.scale_step = 0;
  a.zero_point = static_cast<int32_t>(x_zero_point);
  return experts.multiply(x, a, packed, weight_scale);
}

Tensor expert_linear_packed_per_token(const Tensor& q, const Tensor& scale, const Tensor& packed,
                                      const Tensor& weight_scale, const Tensor& ends, int64_t bits,
                                      int64_t group_size) {
  const Experts experts(q, packed, weight_scale, ends, bits, group_size);
  if (!experts.ends || scale.scalar_type() != at::kFloat || scale.sizes() != at::DimVector{q.size(0), 1})
    return call_reference<decltype(expert_linear_packed_per_token)>("expert_linear_packed_per_token", q, scale, packed,
                                                                    weight_scale, ends, bits, group_size);
  at::DataPtr storage;
  const Tensor rows = as_rows(q), scales = scale.contiguous();
  Activations a = readable_rows(rows, experts.layout, &storage);
  a.scale = scales.const_data_ptr<float>();
  a.scale_step = 1;
  a.zero_point = qgemm::kTokenZeroPoint;
  return experts.multiply(q, a, packed, weight_scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(mq_ao, CPU, m) {
  m.impl("expert_linear", expert_linear);
  m.impl("expert_linear_packed", expert_linear_packed);
  m.impl("expert_linear_packed_per_token", expert_linear_packed_per_token);
}

}  // namespace mq_ao
