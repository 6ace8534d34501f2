// SPDX-License-Identifier: Apache-2.0
// What the kernel tests share: the tables of every ISA level that this machine runs, and exact inputs.
#pragma once

#include <catch2/catch.hpp>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "ops/kernels/kernels.h"

namespace flashlm::kernels {

/// Calls f(table) for both types of every level that this machine runs.
template <class F>
void for_each_table(const F& f) {
  for (int64_t i = 0; i < levels().count; ++i) {
    const Level& level = levels().first[i];
    if (!level.supported()) continue;
    INFO(level.name);
    f(level.float_table());
    f(level.double_table());
  }
}

/// Calls f(table) for float and for every level that this machine runs and that has what `panel` tells the
/// width of.
template <class F>
void for_each_table_with(int64_t Table<float>::*panel, const F& f) {
  for (int64_t i = 0; i < levels().count; ++i) {
    const Level& level = levels().first[i];
    if (!level.supported() || level.float_table().*panel == 0) continue;
    INFO(level.name);
    f(level.float_table());
  }
}

/// The bits of a bfloat16: x rounded to nearest, ties to even.
inline uint16_t bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// The table of the level that every machine runs, whose bits the others are held to.
template <class T>
const Table<T>& baseline();
template <>
inline const Table<float>& baseline<float>() {
  return levels().first[0].float_table();
}
template <>
inline const Table<double>& baseline<double>() {
  return levels().first[0].double_table();
}

/// The T of a Table<T>, for decltype.
template <class T>
T element_of(const Table<T>&);

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// Multiples of 1/8 in [-2, 2]: sums and products of a few thousand of them are exact in float32.
template <class T>
std::vector<T> dyadic(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<T> out(n);
  for (T& x : out) x = static_cast<T>(static_cast<int>(generator() % 33) - 16) / 8;
  return out;
}

/// Values of low .. high.
inline std::vector<int8_t> integers(int64_t n, int low, int high, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<int8_t> out(n);
  for (int8_t& x : out) x = static_cast<int8_t>(low + static_cast<int>(generator() % (high - low + 1)));
  return out;
}

/// Values with many significant bits, in [-10/3, 10/3].
template <class T>
std::vector<T> uneven(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<T> out(n);
  for (T& x : out) x = (static_cast<T>(generator() % 20001) - T(10000)) / T(3000);
  return out;
}

/// Leaves NaN, in bfloat16, float32 and float64, where the next call has its variables: one that multiplies
/// what it has not written by zero is found out.
[[gnu::noinline]] inline void leave_nan_on_stack() {
  uint8_t bytes[1 << 18];
  std::memset(bytes, 0xff, sizeof bytes);
  asm volatile("" : : "r"(bytes) : "memory");  // or there would be no bytes
}

}  // namespace flashlm::kernels
