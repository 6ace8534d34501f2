// SPDX-License-Identifier: Apache-2.0
#include <catch2/catch.hpp>
#include <cmath>
#include <map>
#include <set>
#include <vector>

#include "data/permutation.h"

using namespace flashlm;

namespace {

std::vector<std::int64_t> order_of(std::int64_t count, std::uint64_t key) {
  const Permutation permutation(count, key);
  REQUIRE(permutation.count() == count);
  std::vector<std::int64_t> order;
  for (std::int64_t i = 0; i < count; ++i) order.push_back(permutation(i));
  return order;
}

}  // namespace

TEST_CASE("every place is taken once, whatever the count", "[permutation]") {
  for (std::int64_t count = 1; count <= 1100; ++count) {
    const auto order = order_of(count, static_cast<std::uint64_t>(count) * 3);
    const std::set<std::int64_t> places(order.begin(), order.end());
    CHECK(static_cast<std::int64_t>(places.size()) == count);
    CHECK(*places.begin() == 0);
    CHECK(*places.rbegin() == count - 1);
  }
}

TEST_CASE("all orders of few things are equally likely", "[permutation]") {
  std::map<std::vector<std::int64_t>, int> seen;
  for (std::uint64_t key = 0; key < 24000; ++key) ++seen[order_of(4, key)];
  CHECK(seen.size() == 24);
  double chi_squared = 0;
  for (const auto& [order, times] : seen) chi_squared += (times - 1000) * (times - 1000) / 1000.0;
  CHECK(chi_squared < 53);  // 23 degrees of freedom: more in one case of 3,000
}

TEST_CASE("neighbours are sent anywhere, and keys have nothing in common", "[permutation]") {
  constexpr std::int64_t kCount = 20000;
  const auto order = order_of(kCount, 1);
  CHECK(order != order_of(kCount, 2));
  // For random orders each of these numbers is about normal.
  int rising = 0, same = 0;
  double distance = 0, displacement = 0;
  const auto other = order_of(kCount, 2);
  for (std::int64_t i = 0; i < kCount; ++i) {
    same += order[i] == other[i] ? 1 : 0;
    displacement += std::abs(static_cast<double>(order[i] - i));
    if (i == 0) continue;
    rising += order[i] > order[i - 1] ? 1 : 0;
    distance += std::abs(static_cast<double>(order[i] - order[i - 1]));
  }
  CHECK(rising == Approx(kCount / 2).margin(200));                         // sd 41
  CHECK(same <= 8);                                                        // Poisson, mean 1
  CHECK(distance / kCount == Approx(kCount / 3.0).margin(kCount * 0.01));  // sd 0.002 counts
  CHECK(displacement / kCount == Approx(kCount / 3.0).margin(kCount * 0.01));
}

TEST_CASE("the largest count can be had, and impossible ones cannot", "[permutation]") {
  constexpr std::int64_t kMost = std::int64_t{1} << 62;
  const Permutation permutation(kMost, 5);
  std::set<std::int64_t> places;
  for (std::int64_t i = 0; i < 1000; ++i) {
    places.insert(permutation(i));
    places.insert(permutation(kMost - 1 - i));
  }
  CHECK(places.size() == 2000);
  CHECK(*places.begin() >= 0);
  CHECK(*places.rbegin() < kMost);
  CHECK(*places.rbegin() > kMost / 2);
  for (const std::int64_t count : {std::int64_t{0}, std::int64_t{-1}, kMost + 1})
    CHECK_THROWS_AS(Permutation(count, 1), std::out_of_range);
  for (const std::int64_t i : {std::int64_t{-1}, kMost}) CHECK_THROWS_AS(permutation(i), std::out_of_range);
}

TEST_CASE("an order is the same on every machine", "[permutation]") {
  // SplitMix64's first outputs for the seed 0, as other implementations publish them.
  CHECK(mixed(0) == 0xe220a8397b1dcdaf);
  CHECK(mixed(0x9e3779b97f4a7c15) == 0x6e789e6aa1b965f4);
  // A few lines of Python, written from the header alone, gave these.
  CHECK(order_of(10, 42) == std::vector<std::int64_t>{5, 0, 2, 3, 7, 9, 1, 6, 4, 8});
  auto order = order_of(1000, 7);
  order.resize(6);
  CHECK(order == std::vector<std::int64_t>{938, 239, 117, 200, 449, 257});
}
