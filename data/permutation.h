// SPDX-License-Identifier: Apache-2.0
// An order of n things that takes no memory: any place in it is computed, none is stored.
#pragma once

#include <array>
#include <cstdint>

namespace flashlm {

/// A permutation of 0 ... count - 1, one for each key, the same on every machine: a Feistel network of eight
/// rounds (Luby and Rackoff 1988) over the smallest square power of two, 256 or more, that holds count. What
/// falls outside is sent through again until it falls inside ("cycle walking", Black and Rogaway 2002,
/// Ciphers with Arbitrary Finite Domains): fewer than four times on average, but for count < 64.
class Permutation {
 public:
  /// count in 1 ... 2^62.
  Permutation(std::int64_t count, std::uint64_t key);

  std::int64_t count() const { return count_; }
  /// The place of i in 0 ... count - 1. std::out_of_range for another i.
  std::int64_t operator()(std::int64_t i) const;

 private:
  std::int64_t count_;
  int half_bits_ = 4;
  std::array<std::uint64_t, 8> round_keys_;
};

/// A number that looks random, and differs for each `value`: the output function of SplitMix64 (Steele, Lea
/// and Flood 2014), which is a bijection.
std::uint64_t mixed(std::uint64_t value);

}  // namespace flashlm
