// SPDX-License-Identifier: Apache-2.0
// mlgru's kernels on plain arrays, on every ISA level this machine runs, against the formulas in long double;
// and the levels against each other, bit for bit. Arrays have no element to spare: a sanitizer sees a read or
// write past an end.
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "tests/ops/kernel_check.h"

using namespace flashlm::kernels;

namespace {

/// One call's arrays. Channels lie among others, `gap` between the rows, none after the last row.
template <class T>
struct Arrays {
  int64_t rows, width, row;
  std::vector<T> f, c, before, lower_bound, grad_h, carry, grad_lower_bound;

  Arrays(int64_t rows_, int64_t width_, int64_t gap, bool silu)
      : rows(rows_), width(width_), row(width_ + gap) {
    std::mt19937 generator(static_cast<uint32_t>(rows * 1000 + width));
    const auto uniform = [&](int64_t n, double low, double high) {
      std::uniform_real_distribution<double> distribution(low, high);
      std::vector<T> out(n);
      for (T& x : out) x = static_cast<T>(distribution(generator));
      return out;
    };
    const int64_t n = rows == 0 ? 0 : rows * row - gap;
    f = silu ? uniform(n, -4, 6) : uniform(n, 0, 1);
    c = uniform(n, -3, 3);
    grad_h = uniform(n, -1, 1);
    before = uniform(width, -1, 1);
    carry = uniform(width, -1, 1);
    if (silu) lower_bound = uniform(width, 0, 0.9);
    if (silu) grad_lower_bound = uniform(width, -1, 1);
  }

  MlgruRows<T> call() const {
    return {rows, width, row, f.data(), c.data(), lower_bound.empty() ? nullptr : lower_bound.data()};
  }
};

template <class T>
struct Results {
  std::vector<T> h, grad_f, grad_c, carry, grad_lower_bound, product, end, back_product, back_end;

  Results(const Table<T>& table, const Arrays<T>& in)
      : carry(in.carry), grad_lower_bound(in.grad_lower_bound) {
    // Sevens where nothing is to be written.
    h = grad_f = grad_c = std::vector<T>(in.f.size(), T(7));
    product = back_product = std::vector<T>(in.width, T(1));
    end = back_end = std::vector<T>(in.width, T(0));
    const MlgruRows<T> call = in.call();
    table.mlgru(call, in.before.data(), h.data());
    table.mlgru_end(call, product.data(), end.data());
    table.mlgru_backward(call, in.before.data(), h.data(), in.grad_h.data(), carry.data(), grad_f.data(),
                         grad_c.data(), grad_lower_bound.empty() ? nullptr : grad_lower_bound.data());
    table.mlgru_backward_end(call, in.grad_h.data(), back_product.data(), back_end.data());
  }

  bool operator==(const Results&) const = default;
};

/// Channel i by the formulas, in long double.
template <class T>
void require_channel(const Arrays<T>& in, const Results<T>& got, int64_t i) {
  using Real = long double;
  const bool silu = !in.lower_bound.empty();
  const auto sigmoid = [](Real x) { return 1 / (1 + std::exp(-x)); };
  const Real bound = silu ? in.lower_bound[i] : 0;
  const auto at = [&](const std::vector<T>& x, int64_t t) { return static_cast<Real>(x[t * in.row + i]); };
  const auto f_of = [&](int64_t t) {
    return silu ? bound + (1 - bound) * sigmoid(at(in.f, t)) : at(in.f, t);
  };
  const auto c_of = [&](int64_t t) { return silu ? at(in.c, t) * sigmoid(at(in.c, t)) : at(in.c, t); };
  // |h|, |c| <= 3 and |delta| <= rows + 1; each step rounds a few times.
  const auto require_close = [&](Real value, Real want) {
    REQUIRE(std::abs(value - want) <= 16 * (in.rows + 1) * std::numeric_limits<T>::epsilon());
  };
  std::vector<Real> h = {in.before[i]};
  Real product = 1, end = 0;
  for (int64_t t = 0; t < in.rows; ++t) {
    const Real f = f_of(t);
    h.push_back(f * h.back() + (1 - f) * c_of(t));
    require_close(at(got.h, t), h.back());
    product *= f;
    end = f * end + (1 - f) * c_of(t);
  }
  require_close(got.product[i], product);
  require_close(got.back_product[i], product);
  require_close(got.end[i], end);
  Real carry = in.carry[i], back_end = 0, grad_bound = silu ? in.grad_lower_bound[i] : 0;
  for (int64_t t = in.rows - 1; t >= 0; --t) {
    const Real f = f_of(t), c = c_of(t), delta = at(in.grad_h, t) + carry;
    Real grad_f = delta * (h[t] - c), grad_c = delta * (1 - f);
    carry = delta * f;
    back_end = (at(in.grad_h, t) + back_end) * f;
    if (silu) {
      const Real open = sigmoid(at(in.f, t)), swish = sigmoid(at(in.c, t));
      grad_bound += grad_f * (1 - open);
      grad_f *= (1 - bound) * open * (1 - open);
      grad_c *= swish * (1 + at(in.c, t) * (1 - swish));
    }
    require_close(at(got.grad_f, t), grad_f);
    require_close(at(got.grad_c, t), grad_c);
  }
  require_close(got.carry[i], carry);
  require_close(got.back_end[i], back_end);
  if (silu) require_close(got.grad_lower_bound[i], grad_bound);
}

}  // namespace

TEST_CASE("mlgru equals its formulas at every width and length, with the same bits on every level",
          "[mlgru]") {
  for_each_table([](const auto& table) {
    using T = decltype(element_of(table));
    for (bool silu : {false, true}) {
      for (int64_t rows : {0, 1, 2, 7, 33}) {
        for (int64_t width : {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 67}) {
          const int64_t gap = width % 2 == 0 ? 0 : 5;
          INFO("silu " << silu << " rows " << rows << " width " << width << " gap " << gap);
          const Arrays<T> in(rows, width, gap, silu);
          const Results<T> got(table, in);
          REQUIRE(got == Results<T>(baseline<T>(), in));
          for (int64_t i = 0; i < width; ++i) require_channel(in, got, i);
          for (int64_t t = 0; t + 1 < rows; ++t) {
            for (int64_t i = width; i < in.row; ++i) {
              for (const auto* x : {&got.h, &got.grad_f, &got.grad_c}) REQUIRE((*x)[t * in.row + i] == 7);
            }
          }
        }
      }
    }
  });
}

TEST_CASE("mlgru's activations stay right far from zero", "[mlgru]") {
  for_each_table([](const auto& table) {
    using T = decltype(element_of(table));
    // 1 - sigmoid(30) is 9.4e-14, which 1 minus the rounded sigmoid would lose in float32.
    const std::vector<T> f = {30, 800, -800, -30, 0}, c = {2, 2, 800, -800, -800}, zero = {0, 0, 0, 0, 0};
    const auto infinity = std::numeric_limits<T>::infinity();
    const std::vector<T> ones(5, T(1));
    std::vector<T> h(5), grad_f(5), grad_c(5), carry(5), grad_bound(5);
    const MlgruRows<T> call = {1, 5, 5, f.data(), c.data(), zero.data()};
    table.mlgru(call, zero.data(), h.data());
    table.mlgru_backward(call, zero.data(), h.data(), ones.data(), carry.data(), grad_f.data(), grad_c.data(),
                         grad_bound.data());
    const double silu = 2 / (1 + std::exp(-2.0)), shut = 1 / (1 + std::exp(30.0));
    REQUIRE(h[0] == Approx(shut * silu).epsilon(1e-6).margin(0));
    REQUIRE(grad_f[0] == Approx(-shut * silu).epsilon(1e-6).margin(0));
    REQUIRE(std::abs(h[1]) < 1e-30);
    REQUIRE(h[2] == Approx(800));
    REQUIRE(grad_c[2] == Approx(1));
    for (int i : {3, 4}) REQUIRE(std::abs(h[i]) < 1e-30);
    for (const auto* x : {&h, &grad_f, &grad_c, &carry, &grad_bound}) {
      for (const T value : *x) REQUIRE(std::abs(value) < infinity);  // nor NaN
    }
  });
}
