// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <catch2/catch.hpp>
#include <map>
#include <random>
#include <string>

#include "data/word_cache.h"

using namespace flashlm;

namespace {

std::vector<std::int32_t> found(const WordCache& cache, std::string_view word) {
  const auto ids = cache.find(cache.prepare(word));
  return {ids.begin(), ids.end()};
}

}  // namespace

TEST_CASE("what was kept is found, and nothing else", "[word_cache]") {
  WordCache cache;
  CHECK(found(cache, "word").empty());
  std::map<std::string, std::vector<std::int32_t>> kept;
  std::mt19937 random(3);
  // Words that differ in one byte or only in length, zero bytes among them.
  for (int repeat = 0; repeat < 40000; ++repeat) {
    std::string word(1 + random() % 32, static_cast<char>(random() % 2));
    word[random() % word.size()] = static_cast<char>(random());
    word.back() = static_cast<char>(random() % 8);
    auto& ids = kept[word];
    const auto known = found(cache, word);
    REQUIRE(known == ids);
    if (!known.empty()) continue;
    for (std::uint32_t n = 1 + random() % 7; n > 0; --n) ids.push_back(static_cast<std::int32_t>(random()));
    cache.insert(cache.prepare(word), ids);
  }
  CHECK(kept.size() > 10000);
  for (const auto& [word, ids] : kept) REQUIRE(found(cache, word) == ids);
}

// In a full cache most searches pass by other words.
TEST_CASE("words that differ in any one of their bytes are told apart", "[word_cache]") {
  WordCache cache;
  const auto word = [](std::size_t part, std::uint32_t number) {
    std::string text(32, 'x');
    for (std::size_t i = 0; i < 4; ++i)
      text[8 * part + 2 * i] = static_cast<char>('a' + (number >> 4 * i) % 16);
    return text;
  };
  std::size_t wrong = 0;
  for (std::size_t part = 0; part < 4; ++part)
    for (std::uint32_t number = 0; number < 20000; ++number) {
      const std::string text = word(part, number);
      wrong += !found(cache, text).empty();
      const auto id = static_cast<std::int32_t>(part << 16 | number);
      cache.insert(cache.prepare(text), {&id, 1});
    }
  for (std::size_t part = 0; part < 4; ++part)
    for (std::uint32_t number = 0; number < 20000; ++number)
      wrong +=
          found(cache, word(part, number)) != std::vector{static_cast<std::int32_t>(part << 16 | number)};
  CHECK(wrong == 0);
}

TEST_CASE("words that are too long, and too many, are not kept", "[word_cache]") {
  WordCache cache;
  const std::int32_t ids[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  for (const std::string& word : {std::string(), std::string(33, 'a'), std::string("eight ids")}) {
    cache.insert(cache.prepare(word), std::span(ids).first(word.size() > 32 ? 1 : 8));
    CHECK(found(cache, word).empty());
  }
  cache.insert(cache.prepare("none"), {});
  CHECK(found(cache, "none").empty());
  const auto insert = [&](int i) { cache.insert(cache.prepare(std::to_string(i)), std::span(ids).first(1)); };
  for (int i = 0; i < 98304; ++i) insert(i);
  CHECK(found(cache, "0").size() == 1);
  insert(98304);
  CHECK(found(cache, "0").empty());
  CHECK(found(cache, "98304").size() == 1);
  for (int i = 98305; i < 300000; ++i) insert(i);
  CHECK(found(cache, "299999").size() == 1);
}
