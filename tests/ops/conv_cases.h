// SPDX-License-Identifier: Apache-2.0
// The convolutions that the tests of causal_conv1d and gated_conv run over, and random cuts of time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <random>
#include <vector>

namespace flashlm::testing {

struct Conv {
  int64_t width, groups, taps, dilation;
  int64_t reach() const { return (taps - 1) * dilation; }
  std::vector<int64_t> weight_shape() const { return {width, width / groups, taps}; }
};

inline std::ostream& operator<<(std::ostream& out, const Conv& c) {
  return out << "D " << c.width << " groups " << c.groups << " K " << c.taps << " dilation " << c.dilation;
}

/// The v3 preset's, narrow and wide; one group, depthwise, one tap, and group widths that no vector divides.
inline const std::vector<Conv> kConvs = {{256, 16, 4, 64}, {64, 4, 4, 1}, {48, 1, 4, 4}, {8, 8, 4, 2},
                                         {20, 2, 1, 3},    {6, 2, 3, 5},  {10, 2, 2, 7}, {48, 2, 3, 64}};

/// 0 = c[0] < c[1] < ... = end in random steps of 1 .. longest.
inline std::vector<int64_t> random_cuts(int64_t end, int64_t longest) {
  std::mt19937 generator(static_cast<uint32_t>(longest));
  std::vector<int64_t> cuts = {0};
  while (cuts.back() < end) {
    cuts.push_back(std::min(end, cuts.back() + 1 + static_cast<int64_t>(generator()) % longest));
  }
  return cuts;
}

}  // namespace flashlm::testing
