// SPDX-License-Identifier: Apache-2.0
// The cross-entropy kernels on plain arrays, on every ISA level this machine runs, against sums in double
// over whole rows.
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "ops/kernels/kernels.h"

using namespace flashlm::kernels;

namespace {

const Table<float>& table_of(const Level& level, float) { return level.float_table(); }
const Table<double>& table_of(const Level& level, double) { return level.double_table(); }

/// body(table) for every level this CPU runs.
template <class T, class Body>
void on_every_level(const Body& body) {
  for (int64_t i = 0; i < levels().count; ++i) {
    const Level& level = levels().first[i];
    if (!level.supported()) continue;
    INFO(level.name);
    body(table_of(level, T()));
  }
}

template <class T>
std::vector<T> normal(int64_t n, T scale, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<T> distribution(0, scale);
  std::vector<T> out(n);
  for (T& x : out) x = distribution(generator);
  return out;
}

/// What the forward kernel keeps for each row.
template <class T>
struct Running {
  explicit Running(int64_t rows) : max(rows, std::numeric_limits<T>::lowest()), sum_exp(rows), sum_z(rows) {}
  std::vector<T> max, sum_exp, sum_z;

  /// Takes in columns [begin, end) of z (rows, width).
  void add(const Table<T>& t, const std::vector<T>& z, int64_t width, int64_t begin, int64_t end) {
    t.cross_entropy(static_cast<int64_t>(max.size()), end - begin, z.data() + begin, width, max.data(),
                    sum_exp.data(), sum_z.data());
  }
};

template <class T>
void check_forward(T scale, double tolerance) {
  on_every_level<T>([&](const Table<T>& t) {
    constexpr int64_t kRows = 3;
    // From column 1 on: misaligned for every vector width, and a row longer than the block.
    for (int64_t width = 2; width <= 70; ++width) {
      const auto z = normal<T>(kRows * width, scale, static_cast<uint32_t>(width));
      for (int64_t cut : {int64_t{1}, (width + 1) / 2, width}) {
        Running<T> got(kRows);
        got.add(t, z, width, 1, cut);
        got.add(t, z, width, cut, width);
        for (int64_t r = 0; r < kRows; ++r) {
          double max = -INFINITY, sum_exp = 0, sum_z = 0, sum_abs = 0;
          for (int64_t i = r * width + 1; i < (r + 1) * width; ++i) max = std::max<double>(max, z[i]);
          for (int64_t i = r * width + 1; i < (r + 1) * width; ++i) {
            sum_exp += std::exp(z[i] - max);
            sum_z += z[i];
            sum_abs += std::abs(z[i]);
          }
          INFO("width " << width << " cut " << cut << " row " << r);
          REQUIRE(got.max[r] == max);
          REQUIRE(std::abs(got.sum_exp[r] - sum_exp) <= tolerance * sum_exp);
          REQUIRE(std::abs(got.sum_z[r] - sum_z) <= tolerance * sum_abs);
        }
      }
    }
  });
}

template <class T>
void check_backward(double tolerance) {
  on_every_level<T>([&](const Table<T>& t) {
    constexpr int64_t kRows = 3;
    const T lse[kRows] = {1, -2, 5}, factor[kRows] = {0.5, -1, 0}, shift[kRows] = {0, 0.25, -3};
    for (int64_t width = 1; width <= 70; ++width) {
      const auto z = normal<T>(kRows * width, 2, static_cast<uint32_t>(width));
      auto got = z;
      t.cross_entropy_backward(kRows, width - 1, got.data() + 1, width, lse, factor, shift);
      for (int64_t r = 0; r < kRows; ++r) {
        REQUIRE(got[r * width] == z[r * width]);  // left of the block: untouched
        for (int64_t i = r * width + 1; i < (r + 1) * width; ++i) {
          const T log_p = z[i] - lse[r];  // rounded as the kernel rounds it
          const double p = factor[r] * std::exp(static_cast<double>(log_p));
          INFO("width " << width << " row " << r << " column " << i - r * width);
          REQUIRE(std::abs(got[i] - (p - shift[r])) <= tolerance * (std::abs(p) + std::abs(shift[r])));
        }
      }
    }
  });
}

}  // namespace

TEST_CASE("cross_entropy sums rows in any two blocks", "[cross_entropy]") {
  check_forward<float>(3, 1e-6);
  check_forward<double>(3, 1e-14);
  check_forward<float>(1000, 1e-6);  // all but a few e^(z - max) are far below the smallest float
}

TEST_CASE("cross_entropy_backward at every width, inside its block only", "[cross_entropy]") {
  check_backward<float>(4e-7);
  check_backward<double>(1e-15);
}

TEST_CASE("cross_entropy_bf16 keeps what cross_entropy sums, for its gradient", "[cross_entropy]") {
  on_every_level<float>([](const Table<float>& t) {
    if (t.bf16_panel == 0) return;
    constexpr int64_t kRows = 3;
    const float lse[kRows] = {1, 12, -2}, factor[kRows] = {0.5, -1, 2}, shift[kRows] = {0, 0.25, -3};
    constexpr uint16_t kUntouched = 0x1234;
    for (int64_t width = 2; width <= 70; ++width) {
      const auto z = normal<float>(kRows * width, 3, static_cast<uint32_t>(width));
      std::vector<uint16_t> kept(kRows * width, kUntouched);
      Running<float> want(kRows), got(kRows);
      std::vector<float> grad = z;
      // From column 1 on: misaligned for every vector width, and a row longer than the block.
      const auto take = [&](int64_t begin, int64_t end) {
        want.add(t, z, width, begin, end);
        t.cross_entropy_bf16(kRows, end - begin, z.data() + begin, width, got.max.data(), got.sum_exp.data(),
                             got.sum_z.data(), kept.data() + begin, width);
        t.cross_entropy_bf16_backward(kRows, end - begin, kept.data() + begin, width, got.max.data(), lse,
                                      factor, shift, grad.data() + begin, width);
      };
      take(1, (width + 1) / 2);
      take((width + 1) / 2, width);
      REQUIRE(got.max == want.max);
      REQUIRE(got.sum_exp == want.sum_exp);
      REQUIRE(got.sum_z == want.sum_z);
      for (int64_t r = 0; r < kRows; ++r) {
        REQUIRE(kept[r * width] == kUntouched);  // left of the blocks
        REQUIRE(grad[r * width] == z[r * width]);
        for (int64_t i = r * width + 1; i < (r + 1) * width; ++i) {
          const double p = factor[r] * std::exp(static_cast<double>(z[i]) - lse[r]);
          INFO("width " << width << " row " << r << " column " << i - r * width);
          // Half a unit in the last place of bfloat16, and what float32 adds.
          REQUIRE(std::abs(grad[i] - (p - shift[r])) <= 0x1.01p-8 * std::abs(p) + 1e-6 * std::abs(shift[r]));
        }
      }
    }
  });
}

TEST_CASE("cross_entropy: masked words count for nothing, NaN is not hidden", "[cross_entropy]") {
  on_every_level<float>([](const Table<float>& t) {
    for (int64_t width : {1, 5, 33}) {
      std::vector<float> z(width, -INFINITY);
      Running<float> row(1);
      row.add(t, z, width, 0, width);
      z[width / 2] = 3;
      row.add(t, z, width, 0, width);
      REQUIRE(row.max[0] == 3);
      REQUIRE(row.sum_exp[0] == 1);
      z[0] = NAN;
      row.add(t, z, width, 0, width);
      REQUIRE(std::isnan(row.sum_exp[0]));
    }
  });
}

TEST_CASE("the kernels' exponential is right to 1.2e-7 from -87 to 88", "[vec_exp]") {
  on_every_level<float>([](const Table<float>& t) {
    // With lse and shift 0 and factor 1, cross_entropy_backward is e^z.
    std::vector<float> x;
    for (int i = -870000; i <= 880000; ++i) x.push_back(static_cast<float>(i) * 1e-4f);
    auto got = x;
    const float zero = 0, one = 1;
    t.cross_entropy_backward(1, static_cast<int64_t>(x.size()), got.data(), 0, &zero, &one, &zero);
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = std::exp(static_cast<double>(x[i]));
      worst = std::max(worst, std::abs(got[i] - want) / want);
    }
    REQUIRE(worst <= 1.2e-7);
    std::vector<float> edge = {0, -INFINITY, -1e30f, 1e30f, NAN};
    t.cross_entropy_backward(1, 5, edge.data(), 0, &zero, &one, &zero);
    REQUIRE(edge[0] == 1);
    REQUIRE((edge[1] < 2e-38f && edge[2] == edge[1]));
    REQUIRE((std::isfinite(edge[3]) && edge[3] > 1e38f));
    REQUIRE(std::isnan(edge[4]));
  });
}
