// Fast rotation of rows by the matrices of mq_ao/ops/hadamard_matrix.py: the portable core, without torch types.
//
// matrix(n) = kron(base, Sylvester) / sqrt(n) with n = order * power. A row lies in the first-level cache as `order`
// stretches of `power` values. Sylvester's part takes log2(power) additions a value: butterflies between whole vectors,
// several stages to a pass, and within a vector by shuffles. The base then adds and subtracts whole vectors that lie
// `power` apart. Where `power` is less than a vector, single floats take the place of vectors.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "vec.h"

namespace mq_ao::hadamard {

// Larger bases are dense products, which the reference does as well.
inline constexpr int64_t kMaxOrder = 512;

// One by one: Clang refuses the constructors of libstdc++ 12 in constant expressions.
constexpr std::vector<int> zeros(int64_t count) {
  std::vector<int> values;
  values.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i) values.push_back(0);
  return values;
}

// GF(p^e). An element is a number whose digits to base p are its coefficients, as in hadamard_matrix.py.
class Field {
 public:
  constexpr Field(int64_t p, int64_t size) : p_(p), size_(size) {
    for (int64_t low = 0; low < size; ++low)
      if (is_primitive(low)) return;
  }

  // Quadratic character of a - b.
  constexpr int character(int64_t a, int64_t b) const { return character_[size_t(subtract(a, b, 1))]; }

 private:
  // a - factor * b, digit by digit.
  constexpr int64_t subtract(int64_t a, int64_t b, int64_t factor) const {
    int64_t result = 0;
    for (int64_t place = 1; place < size_; place *= p_)
      result += (a / place % p_ + (p_ - factor) * (b / place % p_)) % p_ * place;
    return result;
  }

  // Whether x generates the field modulo x^e + low; if so, its odd powers are the elements of character -1.
  constexpr bool is_primitive(int64_t low) {
    character_ = zeros(size_);
    const int64_t top = size_ / p_;
    int64_t element = 1;
    for (int64_t power = 0; power < size_ - 1; ++power) {
      if (element == 0 || character_[size_t(element)] != 0) return false;
      character_[size_t(element)] = power % 2 ? -1 : 1;
      element = subtract(element % top * p_, low, element / top);
    }
    return element == 1;
  }

  int64_t p_, size_;
  std::vector<int> character_;
};

// The prime of which q is a power, or 0.
constexpr int64_t prime_of(int64_t q) {
  int64_t p = 2;
  while (p * p <= q && q % p != 0) ++p;
  if (p * p > q) p = q;
  while (q > 1 && q % p == 0) q /= p;
  return q == 1 && p > 1 ? p : 0;
}

// Row-major signs of the Hadamard matrix of a Paley order; empty if neither construction gives it.
constexpr std::vector<int> paley(int64_t order) {
  if (order % 4 != 0) return {};
  for (const int64_t kind : {1, 2}) {
    const int64_t size = order / kind, q = size - 1, p = prime_of(q);
    if (p == 0 || q % 4 != (kind == 1 ? 3 : 1)) continue;
    const Field field(p, q);
    // [[0, 1], [border, characters]]
    const auto core = [&](int64_t a, int64_t b) {
      if (a == 0 || b == 0) return a == b ? 0 : a == 0 || kind == 2 ? 1 : -1;
      return field.character(a - 1, b - 1);
    };
    std::vector<int> signs = zeros(order * order);
    for (int64_t i = 0; i < order; ++i) {
      for (int64_t j = 0; j < order; ++j) {
        const int64_t a = i / kind, b = j / kind, r = i % kind, c = j % kind;
        const int on_diagonal = r == 0 && c == 0 ? 1 : -1, elsewhere = r == 1 && c == 1 ? -1 : 1;
        signs[size_t(i * order + j)] = a == b ? on_diagonal : core(a, b) * elsewhere;
      }
    }
    return signs;
  }
  return {};
}

// For every output of a base and every pair (a, b) of its inputs, 4 * pair and which of a + b, a - b, -(a + b) and
// -(a - b) to add. Empty for order 1, and where there is no such base.
constexpr std::vector<int32_t> terms_of(int64_t order) {
  const std::vector<int> signs = paley(order);
  std::vector<int32_t> terms;
  for (int64_t j = 0; !signs.empty() && j < order; ++j) {
    for (int64_t i = 0; i < order; i += 2) {
      const int a = signs[size_t(i * order + j)], b = signs[size_t((i + 1) * order + j)];
      terms.push_back(int32_t(2 * i + (a == b ? 0 : 1) + (a > 0 ? 0 : 2)));
    }
  }
  return terms;
}

struct Plan {
  int64_t n, order, power;
  float norm;
  std::vector<int32_t> terms;

  // Floats of working memory that `rotate` needs.
  int64_t work_size() const { return 2 * order * kLanes; }
};

inline std::unique_ptr<const Plan> make_plan(int64_t n) {
  for (int64_t power = n & -n; power > 0 && n / power <= kMaxOrder; power /= 2) {
    std::vector<int32_t> terms = terms_of(n / power);
    if (n != power && terms.empty()) continue;
    const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
    return std::make_unique<const Plan>(Plan{n, n / power, power, norm, std::move(terms)});
  }
  return nullptr;
}

// The plan for rows of n values, n >= 1, made once and kept; null where there is none.
inline const Plan* find_plan(int64_t n) {
  static std::mutex mutex;
  static std::map<int64_t, std::unique_ptr<const Plan>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = plans.find(n);
  if (found == plans.end()) found = plans.emplace(n, make_plan(n)).first;
  return found->second.get();
}

template <typename V>
inline constexpr int kWidth = sizeof(V) / sizeof(float);

template <typename V>
inline V read(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
inline void write(V v, float* p) {
  std::memcpy(p, &v, sizeof v);
}

// Butterflies between lanes whose numbers differ in one bit. The product by -1 or 1 is exact.
template <int Bit, int... Lane>
inline Vec lane_stage(Vec v, std::integer_sequence<int, Lane...>) {
  constexpr Vec kSigns = {(Lane & Bit ? -1.0f : 1.0f)...};
  return v * kSigns + __builtin_shufflevector(v, v, (Lane ^ Bit)...);
}

template <int Bit = 1>
inline Vec lane_stages(Vec v) {
  constexpr std::make_integer_sequence<int, kLanes> lanes;
  if constexpr (Bit < kLanes) return lane_stages<2 * Bit>(lane_stage<Bit>(v, lanes));
  return v;
}
template <int = 1>
inline float lane_stages(float v) { return v; }

// Vectors that a pass keeps in registers.
inline constexpr int kMaxRadix = kMaxGroup;

// Sylvester's transform over Radix vectors that lie `step` floats apart.
template <int Radix, typename V>
inline void butterflies(float* p, int64_t step, V (&v)[Radix]) {
#pragma GCC unroll 16
  for (int i = 0; i < Radix; ++i) v[i] = read<V>(p + i * step);
#pragma GCC unroll 4
  for (int half = 1; half < Radix; half *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < Radix; ++i) {
      if (i & half) continue;
      const V a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
  }
}

// The first log2(Radix) stages over vectors, all stages within a vector, and the norm.
template <int Radix, typename V>
void first_pass(float* row, int64_t n, float norm) {
  constexpr int64_t step = kWidth<V>;
  V v[Radix];
  for (float* p = row; p < row + n; p += Radix * step) {
    butterflies<Radix>(p, step, v);
#pragma GCC unroll 16
    for (int i = 0; i < Radix; ++i) write(lane_stages(v[i]) * norm, p + i * step);
  }
}

// log2(Radix) further stages, those of values `step` floats apart first.
template <int Radix, typename V>
void next_pass(float* row, int64_t n, int64_t step) {
  V v[Radix];
  for (float* block = row; block < row + n; block += Radix * step) {
    for (float* p = block; p < block + step; p += kWidth<V>) {
      butterflies<Radix>(p, step, v);
#pragma GCC unroll 16
      for (int i = 0; i < Radix; ++i) write(v[i], p + i * step);
    }
  }
}

// Calls f(constant) for the power of two `radix`, at most kMaxRadix.
template <int Radix = kMaxRadix, typename F>
inline void for_radix(int64_t radix, F&& f) {
  if constexpr (Radix > 1)
    if (radix < Radix) return for_radix<Radix / 2>(radix, f);
  f(std::integral_constant<int, Radix>{});
}

template <int Order>
constexpr auto known_terms() {
  std::array<int32_t, size_t(Order) * Order / 2> terms{};
  const std::vector<int32_t> computed = terms_of(Order);
  std::copy(computed.begin(), computed.end(), terms.begin());
  return terms;
}
template <int Order>
inline constexpr auto kTerms = known_terms<Order>();

template <int Term, int Order, typename V>
inline V add_term(V sum, const V (&pairs)[Order]) {
  constexpr int index = Term / 4 * 2 + Term % 2;
  return Term & 2 ? sum - pairs[index] : sum + pairs[index];
}

// One output of a base from the sums and differences of its pairs of inputs.
template <int Order, int Output, typename V, int... Pair>
inline V mix_output(const V (&pairs)[Order], std::integer_sequence<int, Pair...>) {
  V sum{};
  ((sum = add_term<kTerms<Order>[size_t(Output * Order / 2 + Pair)]>(sum, pairs)), ...);
  return sum;
}

// A base whose additions are unrolled, on vectors in registers.
template <int Order, typename V, int... Output>
void mix_unrolled(int64_t power, float* row, std::integer_sequence<int, Output...>) {
  for (float* column = row; column < row + power; column += kWidth<V>) {
    V pairs[Order];
#pragma GCC unroll 16
    for (int i = 0; i < Order; i += 2) {
      const V a = read<V>(column + i * power), b = read<V>(column + (i + 1) * power);
      pairs[i] = a + b;
      pairs[i + 1] = a - b;
    }
    constexpr std::make_integer_sequence<int, Order / 2> all;
    (write(mix_output<Order, Output>(pairs, all), column + Output * power), ...);
  }
}

// Any base.
template <typename V>
void mix_any(const Plan& plan, float* row, float* work) {
  constexpr int64_t width = kWidth<V>;
  const int64_t order = plan.order, pairs = order / 2;
  for (float* column = row; column < row + plan.power; column += width) {
    for (int64_t i = 0; i < pairs; ++i) {
      const V a = read<V>(column + 2 * i * plan.power), b = read<V>(column + (2 * i + 1) * plan.power);
      float* to = work + 4 * i * width;
      write(a + b, to);
      write(a - b, to + width);
      write(-a - b, to + 2 * width);
      write(b - a, to + 3 * width);
    }
    const int32_t* term = plan.terms.data();
    for (int64_t j = 0; j < order; ++j, term += pairs) {
      V sum = read<V>(work + term[0] * width);
      for (int64_t i = 1; i < pairs; ++i) sum += read<V>(work + term[i] * width);
      write(sum, column + j * plan.power);
    }
  }
}

template <typename V>
void rotate_vectors(const Plan& plan, float* row, float* work) {
  constexpr int64_t width = kWidth<V>;
  const int64_t first = std::min<int64_t>(8, plan.power / width);
  for_radix(first, [&](auto radix) { first_pass<decltype(radix)::value, V>(row, plan.n, plan.norm); });
  for (int64_t step = first * width; step < plan.power;) {
    const int64_t next = std::min<int64_t>(kMaxRadix, plan.power / step);
    for_radix(next, [&](auto radix) { next_pass<decltype(radix)::value, V>(row, plan.n, step); });
    step *= next;
  }
  switch (plan.order) {
    case 1: break;
    case 12: mix_unrolled<12, V>(plan.power, row, std::make_integer_sequence<int, 12>()); break;
    case 20: mix_unrolled<20, V>(plan.power, row, std::make_integer_sequence<int, 20>()); break;
    case 28: mix_unrolled<28, V>(plan.power, row, std::make_integer_sequence<int, 28>()); break;
    default: mix_any<V>(plan, row, work);
  }
}

// row <- row @ matrix(n), in float32. `work` has plan.work_size() floats.
inline void rotate(const Plan& plan, float* row, float* work) {
  if (plan.power >= kLanes)
    rotate_vectors<Vec>(plan, row, work);
  else
    rotate_vectors<float>(plan, row, work);
}

}  // namespace mq_ao::hadamard
