// SPDX-License-Identifier: Apache-2.0
// What the builders of word classes share; not for others.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "data/word_classes.h"

namespace flashlm {

/// All words, the most frequent first, equal ones by id.
std::vector<std::int64_t> words_by_frequency(std::span<const std::int64_t> counts);

/// Error unless 1 <= count <= most.
void check_class_count(std::int64_t count, std::int64_t most);

/// The classes of class_of, in each the words in `order`.
WordClasses group_by_class(std::span<const std::int64_t> order, std::span<const std::int32_t> class_of,
                           std::int64_t count);

}  // namespace flashlm
