// SPDX-License-Identifier: Apache-2.0
// dot4 of every ISA level that this machine runs, against the sum of four products, bit for bit.
#include <catch2/catch.hpp>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "ops/kernels/kernels.h"

using Dot4Lanes = void(int64_t n, int32_t* sum, const int32_t* w, const int32_t* a);

namespace flashlm::kernels {
#define FLASHLM_X(level) \
  namespace level {      \
  Dot4Lanes dot4_lanes;  \
  }
FLASHLM_EACH_LEVEL
#undef FLASHLM_X
}  // namespace flashlm::kernels

using namespace flashlm::kernels;

namespace {

struct {
  const char* name;
  Dot4Lanes* dot4_lanes;
} const kLevels[] = {
#define FLASHLM_X(level) {#level, level::dot4_lanes},
    FLASHLM_EACH_LEVEL
#undef FLASHLM_X
};

/// A lane for each of `sums` and each four of bytes: dot4 on every level equals the plain sum.
void require_exact(std::vector<int32_t> sums, const std::vector<uint8_t>& w, const std::vector<int8_t>& a) {
  const auto n = static_cast<int64_t>(sums.size());
  std::vector<int32_t> want = sums, w_lanes(n), a_lanes(n);
  for (int64_t i = 0; i < 4 * n; ++i) want[i / 4] += w[i] * a[i];
  std::memcpy(w_lanes.data(), w.data(), w.size());
  std::memcpy(a_lanes.data(), a.data(), a.size());
  for (int64_t i = 0; i < levels().count; ++i) {
    const Level& level = levels().first[i];
    if (!level.supported()) continue;
    INFO(level.name);
    REQUIRE(std::string(kLevels[i].name) == level.name);
    auto got = sums;
    kLevels[i].dot4_lanes(n, got.data(), w_lanes.data(), a_lanes.data());
    REQUIRE(got == want);
  }
}

}  // namespace

TEST_CASE("dot4 is exact at the ends of its ranges, in each byte alone and in all", "[dot4]") {
  constexpr int64_t kMaxLanes = 16;
  for (int sum : {0, 1, -1, 2147483647 - 4 * 127 * 127, -2147483647 - 1 + 4 * 127 * 128}) {
    for (int w : {0, 1, 2, 127}) {
      for (int a : {-128, -127, -1, 0, 1, 127}) {
        std::vector<uint8_t> w_bytes(4 * kMaxLanes, static_cast<uint8_t>(w));
        std::vector<int8_t> a_bytes(4 * kMaxLanes, static_cast<int8_t>(a));
        require_exact(std::vector<int32_t>(kMaxLanes, sum), w_bytes, a_bytes);
        // Byte i % 4 of lane i only: a byte that meets the wrong one, or none, shows.
        for (int64_t i = 0; i < 4 * kMaxLanes; ++i) {
          if (i % 4 != i / 4 % 4) w_bytes[i] = 0;
        }
        require_exact(std::vector<int32_t>(kMaxLanes, sum), w_bytes, a_bytes);
      }
    }
  }
}

TEST_CASE("dot4 is exact on any bytes", "[dot4]") {
  constexpr int64_t kLanes = 64 * 16;
  std::mt19937 generator(1);
  std::vector<int32_t> sums(kLanes);
  std::vector<uint8_t> w(4 * kLanes);
  std::vector<int8_t> a(4 * kLanes);
  for (int32_t& x : sums) x = static_cast<int32_t>(generator() % 2000001) - 1000000;
  for (uint8_t& x : w) x = static_cast<uint8_t>(generator() % 128);
  for (int8_t& x : a) x = static_cast<int8_t>(static_cast<int>(generator() % 256) - 128);
  require_exact(sums, w, a);
}
