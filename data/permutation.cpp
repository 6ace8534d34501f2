// SPDX-License-Identifier: Apache-2.0
#include "data/permutation.h"

#include <stdexcept>
#include <string>

namespace flashlm {

std::uint64_t mixed(std::uint64_t value) {
  value += 0x9e3779b97f4a7c15;  // without it 0 would stay 0
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

Permutation::Permutation(std::int64_t count, std::uint64_t key) : count_(count) {
  constexpr std::int64_t kMost = std::int64_t{1} << 62;
  if (count < 1 || count > kMost)
    throw std::out_of_range("Permutation: count must be in 1 ... 2^62, got " + std::to_string(count));
  while (count > std::int64_t{1} << (2 * half_bits_)) ++half_bits_;
  for (std::uint64_t& round_key : round_keys_) round_key = key = mixed(key);
}

std::int64_t Permutation::operator()(std::int64_t i) const {
  if (i < 0 || i >= count_)
    throw std::out_of_range("Permutation: " + std::to_string(i) + " of " + std::to_string(count_));
  const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
  auto value = static_cast<std::uint64_t>(i);
  do {
    std::uint64_t left = value >> half_bits_;
    std::uint64_t right = value & mask;
    for (const std::uint64_t round_key : round_keys_) {
      const std::uint64_t next = left ^ (mixed(right ^ round_key) & mask);
      left = right;
      right = next;
    }
    value = left << half_bits_ | right;
  } while (value >= static_cast<std::uint64_t>(count_));
  return static_cast<std::int64_t>(value);
}

}  // namespace flashlm
