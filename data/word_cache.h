// SPDX-License-Identifier: Apache-2.0
// The token ids of words met before. Words repeat: most are found here, in one line of the CPU's cache,
// without an allocation.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

namespace flashlm {

/// Keeps up to 98,304 words of up to 32 bytes and 7 ids, in 8 MB; the next one empties it.
class WordCache {
 public:
  /// A word, and its bytes as numbers: with the length they say what the word is. No length: too long to
  /// keep.
  struct Key {
    std::string_view word;
    std::array<std::uint64_t, 4> bytes{};
    std::size_t length = 0;
    std::size_t slot = 0;  // where the search begins
  };

  /// The key of a word; the memory where it might be is fetched meanwhile, so that find() need not wait for
  /// it.
  Key prepare(std::string_view word) const;
  /// The word's ids, valid until the next insert(); none if the word is not kept. Kept words have at least
  /// one.
  std::span<const std::int32_t> find(const Key& key) const;
  /// Keeps a word that find() does not know, unless it or its ids are too long.
  void insert(const Key& key, std::span<const std::int32_t> ids);

 private:
  static constexpr std::size_t kSlots = 1 << 17;

  struct alignas(64) Slot {
    std::array<std::uint64_t, 4> bytes;
    std::uint16_t length;  // 0: the slot is free
    std::uint16_t count;
    std::array<std::int32_t, 7> ids;
  };

  std::vector<Slot> slots_ = std::vector<Slot>(kSlots);  // open addressing
  std::size_t words_ = 0;
};

inline WordCache::Key WordCache::prepare(std::string_view word) const {
  const std::size_t n = word.size();
  Key key{word};
  if (n == 0 || n > sizeof(key.bytes)) return key;
  const auto load = [&word](auto number, std::size_t at) {
    std::memcpy(&number, word.data() + at, sizeof(number));
    return std::uint64_t{number};
  };
  auto& [a, b, c, d] = key.bytes;
  // Loads that overlap, rather than one byte at a time.
  if (n >= 8) {
    a = load(std::uint64_t{}, 0);
    b = load(std::uint64_t{}, n - 8);
    if (n > 16) {
      c = load(std::uint64_t{}, 8);
      d = load(std::uint64_t{}, n - 16);
    }
  } else if (n >= 4) {
    a = load(std::uint32_t{}, 0) | load(std::uint32_t{}, n - 4) << 32;
  } else {
    a = load(std::uint8_t{}, 0) | load(std::uint8_t{}, n / 2) << 8 | load(std::uint8_t{}, n - 1) << 16;
  }
  key.length = n;
  // Products by odd constants, folded: every bit of the word reaches the low bits of the sum.
  const auto fold = [](std::uint64_t x, std::uint64_t y) {
    const auto product = static_cast<unsigned __int128>(x) * y;
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
  };
  std::uint64_t hash = fold(a ^ (n << 56), 0x9E3779B97F4A7C15U) + fold(b, 0xC2B2AE3D27D4EB4FU);
  if (n > 16) hash += fold(c, 0x165667B19E3779F9U) + fold(d, 0x85EBCA77C2B2AE63U);
  key.slot = (hash ^ hash >> 32) % kSlots;
  __builtin_prefetch(&slots_[key.slot]);
  return key;
}

inline std::span<const std::int32_t> WordCache::find(const Key& key) const {
  if (key.length == 0) return {};
  const auto& [a, b, c, d] = key.bytes;
  for (std::size_t i = key.slot; slots_[i].length != 0; i = (i + 1) % kSlots) {
    const Slot& slot = slots_[i];
    // Not by ==, which calls memcmp().
    const std::uint64_t difference = (slot.bytes[0] ^ a) | (slot.bytes[1] ^ b) | (slot.bytes[2] ^ c) |
                                     (slot.bytes[3] ^ d) | (slot.length ^ key.length);
    if (difference == 0) return std::span(slot.ids).first(slot.count);
  }
  return {};
}

}  // namespace flashlm
