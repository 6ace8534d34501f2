// SPDX-License-Identifier: Apache-2.0
// The gated linear units' kernels on plain arrays, on every ISA level this machine runs, against the formulas
// in long double; and the levels against each other, bit for bit. Arrays have no element to spare: a
// sanitizer sees a read or write past an end.
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "tests/ops/kernel_check.h"

using namespace flashlm::kernels;

namespace {

using Real = long double;

/// An activation, its derivative, and the largest of the terms that the derivative is the sum of.
struct Activation {
  Real value, slope, term;
};

Activation relu2(Real x) {
  const Real open = x > 0 ? x : 0;
  return {open * open, 2 * open, 2 * open};
}

Activation silu(Real x) {
  const Real open = 1 / (1 + std::exp(-x)), shut = 1 / (1 + std::exp(x));
  return {x * open, open * (1 + x * shut), open * (1 + std::abs(x) * shut)};
}

Activation sigmoid(Real x) {
  const Real open = 1 / (1 + std::exp(-x)), shut = 1 / (1 + std::exp(x));
  return {open, open * shut, open * shut};
}

template <class T>
struct Unit {
  const char* name;
  Glu<T> Table<T>::*kernels;
  Activation (*activation)(Real x);
};

template <class T>
constexpr Unit<T> kUnits[] = {{"relu2_glu", &Table<T>::relu2_glu, relu2},
                              {"silu_glu", &Table<T>::silu_glu, silu},
                              {"sigmoid_glu", &Table<T>::sigmoid_glu, sigmoid}};

template <class T>
struct Arrays {
  std::vector<T> gate, up, grad_y;

  Arrays(int64_t n, double widest) {
    std::mt19937 generator(static_cast<uint32_t>(n));
    const auto uniform = [&](double bound) {
      std::uniform_real_distribution<double> distribution(-bound, bound);
      std::vector<T> out(n);
      for (T& x : out) x = static_cast<T>(distribution(generator));
      return out;
    };
    gate = uniform(widest);
    up = uniform(2);
    grad_y = uniform(2);
  }
};

template <class T>
struct Results {
  std::vector<T> y, grad_gate, grad_up;

  Results(const Glu<T>& kernels, const Arrays<T>& in)
      : y(in.gate.size()), grad_gate(in.gate.size()), grad_up(in.gate.size()) {
    const auto n = static_cast<int64_t>(y.size());
    kernels.forward(n, in.gate.data(), in.up.data(), y.data());
    kernels.backward(n, in.grad_y.data(), in.gate.data(), in.up.data(), grad_gate.data(), grad_up.data());
  }

  bool operator==(const Results&) const = default;
};

}  // namespace

TEST_CASE("gated linear units equal their formulas at every length, with the same bits on every level",
          "[glu]") {
  for_each_table([](const auto& table) {
    using T = decltype(element_of(table));
    for (const Unit<T>& unit : kUnits<T>) {
      for (const double widest : {2., 80.}) {
        for (int64_t n = 0; n <= 67; ++n) {
          INFO(unit.name << " n " << n << " |gate| <= " << widest);
          const Arrays<T> in(n, widest);
          const Results<T> got(table.*unit.kernels, in);
          REQUIRE(got == Results<T>(baseline<T>().*unit.kernels, in));
          // Relative to the result's own size: vec_exp is right to one epsilon, the rest rounds a few times.
          const auto require_close = [](Real value, Real want, Real size) {
            REQUIRE(std::abs(value - want) <= 6 * std::numeric_limits<T>::epsilon() * std::abs(size));
          };
          for (int64_t i = 0; i < n; ++i) {
            const Activation a = unit.activation(in.gate[i]);
            const Real up = in.up[i], grad_y = in.grad_y[i];
            require_close(got.y[i], a.value * up, a.value * up);
            require_close(got.grad_gate[i], a.slope * up * grad_y, a.term * up * grad_y);
            require_close(got.grad_up[i], a.value * grad_y, a.value * grad_y);
          }
        }
      }
    }
  });
}

TEST_CASE("gated linear units keep their limits far from zero, and a NaN, in vectors and in tails", "[glu]") {
  for_each_table([](const auto& table) {
    using T = decltype(element_of(table));
    const T infinity = std::numeric_limits<T>::infinity(), largest = std::numeric_limits<T>::max();
    for (const Unit<T>& unit : kUnits<T>) {
      const bool bounded = unit.kernels == &Table<T>::sigmoid_glu;
      for (const int64_t n : {1, 64}) {  // part of a vector; whole ones
        const auto run = [&](T gate) {
          Arrays<T> in(n, 1);
          for (T& x : in.gate) x = gate;
          for (auto* x : {&in.up, &in.grad_y}) *x = std::vector<T>(n, T(1));
          return Results<T>(table.*unit.kernels, in);
        };
        for (const T far : {T(88), T(800), largest, infinity}) {
          INFO(unit.name << " n " << n << " gate +-" << far);
          const Results<T> open = run(far), shut = run(-far);
          const Activation a = unit.activation(far);
          for (int64_t i = 0; i < n; ++i) {
            REQUIRE(open.y[i] == (bounded ? 1 : static_cast<T>(a.value)));
            REQUIRE(open.grad_up[i] == open.y[i]);
            const T slope = unit.activation == relu2 ? 2 * far : T(bounded ? 0 : 1);
            REQUIRE((open.grad_gate[i] == slope || std::abs(open.grad_gate[i] - slope) < T(1e-30)));
            for (const auto* x : {&shut.y, &shut.grad_gate, &shut.grad_up})
              REQUIRE(std::abs((*x)[i]) < 1e-30);
          }
        }
        const Results<T> lost = run(std::numeric_limits<T>::quiet_NaN());
        INFO(unit.name << " n " << n << " gate NaN");
        for (const auto* x : {&lost.y, &lost.grad_gate, &lost.grad_up}) {
          for (const T value : *x) REQUIRE(std::isnan(value));
        }
      }
    }
  });
}
