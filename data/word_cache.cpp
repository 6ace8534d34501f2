// SPDX-License-Identifier: Apache-2.0
// The part of the cache that is not called for every word.
#include "data/word_cache.h"

#include <algorithm>

namespace flashlm {

void WordCache::insert(const Key& key, std::span<const std::int32_t> ids) {
  if (key.length == 0 || ids.empty() || ids.size() > std::tuple_size_v<decltype(Slot::ids)>) return;
  if (words_ == kSlots / 4 * 3) {
    slots_.assign(kSlots, Slot{});
    words_ = 0;
  }
  std::size_t i = key.slot;
  while (slots_[i].length != 0) i = (i + 1) % kSlots;
  Slot& slot = slots_[i];
  slot.bytes = key.bytes;
  slot.length = static_cast<std::uint16_t>(key.length);
  slot.count = static_cast<std::uint16_t>(ids.size());
  std::copy(ids.begin(), ids.end(), slot.ids.begin());
  ++words_;
}

}  // namespace flashlm
