// SPDX-License-Identifier: Apache-2.0
// AdamW's kernels against plain loops, bit for bit on every level: this file too is compiled without
// contraction to fused multiply-adds.
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "ops/kernels/kernels.h"

using namespace flashlm::kernels;

namespace {

template <class T>
const Table<T>& table_of(const Level& level) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return level.float_table();
  } else {
    return level.double_table();
  }
}

template <class T>
std::vector<T> normal(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<T> distribution;
  std::vector<T> out(n);
  for (T& x : out) x = distribution(generator);
  return out;
}

template <class T>
void require_same_bits(const std::vector<T>& got, const std::vector<T>& want) {
  REQUIRE(std::memcmp(got.data(), want.data(), got.size() * sizeof(T)) == 0);
}

template <class T>
struct Row {
  std::vector<T> w, m, v;

  explicit Row(int64_t n) : w(normal<T>(n, 1)), m(normal<T>(n, 2)), v(normal<T>(n, 3)) {
    for (T& x : v) x = x * x;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("adamw and what is owed equal the plain loops bit for bit on every level", "[adamw]",
                   float, double) {
  using T = TestType;
  const AdamWStep<T> step{T(0.99997), T(0.9), T(0.95), T(3e-3), T(1.7), T(1e-8)};
  const AdamWOwed<T> owed{T(0.9995), T(2e-3), T(0.6), T(0.8), T(1e-8)};
  for (int64_t i = 0; i < levels().count; ++i) {
    const Level& level = levels().first[i];
    if (!level.supported()) continue;
    INFO(level.name);
    for (int64_t n = 0; n <= 67; ++n) {
      INFO("n " << n);
      // One element in: misaligned for every vector width.
      const auto g = normal<T>(n + 1, 4);
      Row<T> got(n + 1), want = got;
      table_of<T>(level).adamw(n, step, g.data() + 1, got.w.data() + 1, got.m.data() + 1, got.v.data() + 1);
      for (int64_t j = 1; j <= n; ++j) {
        want.m[j] = step.beta1 * want.m[j] + (1 - step.beta1) * g[j];
        want.v[j] = step.beta2 * want.v[j] + (1 - step.beta2) * g[j] * g[j];
        want.w[j] =
            step.keep * want.w[j] - step.rate * want.m[j] / (std::sqrt(want.v[j]) * step.root + step.eps);
      }
      require_same_bits(got.w, want.w);
      require_same_bits(got.m, want.m);
      require_same_bits(got.v, want.v);
      table_of<T>(level).adamw_owed(n, owed, got.w.data() + 1, got.m.data() + 1, got.v.data() + 1);
      for (int64_t j = 1; j <= n; ++j) {
        want.w[j] = owed.keep * want.w[j] - owed.tail * want.m[j] / (std::sqrt(want.v[j]) + owed.eps);
        want.m[j] = owed.beta1 * want.m[j];
        want.v[j] = owed.beta2 * want.v[j];
      }
      require_same_bits(got.w, want.w);
      require_same_bits(got.m, want.m);
      require_same_bits(got.v, want.v);
    }
  }
}

TEMPLATE_TEST_CASE("all_zero sees a value anywhere", "[adamw]", float, double) {
  using T = TestType;
  for (int64_t i = 0; i < levels().count; ++i) {
    const Level& level = levels().first[i];
    if (!level.supported()) continue;
    INFO(level.name);
    const auto all_zero = table_of<T>(level).all_zero;
    for (int64_t n = 0; n <= 67; ++n) {
      // Something else on both sides.
      std::vector<T> x(n + 2, T(1));
      for (int64_t j = 1; j <= n; ++j) x[j] = j % 3 == 0 ? T(-0.0) : T(0);
      REQUIRE(all_zero(n, x.data() + 1));
      for (int64_t j = 1; j <= n; ++j) {
        for (const T value :
             {std::numeric_limits<T>::denorm_min(), T(-1), std::numeric_limits<T>::quiet_NaN()}) {
          INFO("n " << n << " position " << j << " value " << value);
          const T before = std::exchange(x[j], value);
          REQUIRE_FALSE(all_zero(n, x.data() + 1));
          x[j] = before;
        }
      }
    }
  }
}
