// SPDX-License-Identifier: Apache-2.0
#include <catch2/catch.hpp>
#include <random>
#include <string>

#include "data/text.h"

using namespace flashlm;

namespace {

/// Encodes a code point: the opposite direction of what utf8_length checks.
std::string utf8(std::uint32_t c) {
  const auto tail = [&](int shift) { return static_cast<char>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x80) return {static_cast<char>(c)};
  if (c < 0x800) return {static_cast<char>(0xC0 | c >> 6), tail(0)};
  if (c < 0x10000) return {static_cast<char>(0xE0 | c >> 12), tail(6), tail(0)};
  return {static_cast<char>(0xF0 | c >> 18), tail(12), tail(6), tail(0)};
}

}  // namespace

TEST_CASE("utf8_length accepts every character and nothing else", "[text]") {
  std::size_t wrong = 0;
  std::size_t four_bytes = 0;
  for (std::uint32_t c = 0; c < 0x110000; ++c) {
    const std::string encoded = utf8(c);
    const bool surrogate = c >= 0xD800 && c < 0xE000;
    wrong += utf8_length(encoded + "x") != (surrogate ? 0 : encoded.size());
    wrong += encoded.size() > 1 && utf8_length(encoded.substr(0, encoded.size() - 1)) != 0;
    four_bytes += encoded.size() == 4;
  }
  CHECK(wrong == 0);
  // As many sequences are accepted as there are characters: so no other is.
  std::size_t accepted = 0;
  for (int lead = 0xF0; lead < 0x100; ++lead)
    for (int second = 0; second < 0x100; ++second) {
      const std::string start = {static_cast<char>(lead), static_cast<char>(second)};
      accepted += 64 * 64 * (utf8_length(start + "\x80\x80") == 4);
      wrong += utf8_length(start + "\x80\x7F") != 0 || utf8_length(start + "\xC0\x80") != 0;
    }
  CHECK(accepted == four_bytes);
  CHECK(wrong == 0);
  for (const char* malformed :
       {"", "\x80", "\xBF", "\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xC3", "\xC3x"})
    CHECK(utf8_length(malformed) == 0);
}

TEST_CASE("chunks make up the text and end between words or characters", "[text]") {
  std::mt19937 random(5);
  for (int repeat = 0; repeat < 300; ++repeat) {
    std::string text;
    for (std::uint32_t n = random() % 400; n > 0; --n) text += random() % 5 ? utf8(random() % 0x500) : "  ";
    const std::size_t size = random() % 20;
    std::string joined;
    for (std::string_view rest = text; !rest.empty();) {
      const std::string_view chunk = take_chunk(rest, size);
      REQUIRE(!chunk.empty());
      REQUIRE(chunk.size() <= 2 * size + 1);
      REQUIRE((rest.empty() || utf8_length(rest) > 0 || size < 4));
      joined += chunk;
    }
    REQUIRE(joined == text);
  }
  std::string_view rest = "one two  three";
  CHECK(take_chunk(rest, 5) == "one two");
  CHECK(take_chunk(rest, 5) == "  three");
  CHECK(rest.empty());
  const auto first = [](std::string_view text, std::size_t size) {
    return std::string(take_chunk(text, size));
  };
  // Not before a space that follows white space of any kind.
  CHECK(first("one\n two three", 4) == "one\n two");
  const auto cut = [](std::uint32_t c) {  // what is left of a text with that character before a space
    const std::string text = std::string("a").append(utf8(c)).append(" bcd efg");
    std::string_view left = text;
    take_chunk(left, utf8(c).size() + 1);
    return std::string(left);
  };
  for (const std::uint32_t space :
       {0x9, 0xD, 0x85, 0xA0, 0x1680, 0x2000, 0x2005, 0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000})
    CHECK(cut(space) != " bcd efg");
  for (const std::uint32_t other : {0xE9, 0x84, 0x200B, 0x2027, 0x3001, 0x10000})
    CHECK(cut(other) == " bcd efg");
  // Without such a space, before other white space that follows none.
  CHECK(first("abcdef\tgh\nij", 4) == "abcdef");
  CHECK(first("abcdef\n\ngh", 4) == "abcdef");
  CHECK(first("\n\n\n\n\n\n\n\n\n", 4) == "\n\n\n\n\n\n\n\n");
}

TEST_CASE("bytes that are not UTF-8 are shown as U+FFFD, the rest as it is", "[text]") {
  CHECK(valid_utf8("") == "");
  CHECK(valid_utf8("na\xC3\xAFve \xF0\x9F\x98\x80") == "na\xC3\xAFve \xF0\x9F\x98\x80");
  CHECK(valid_utf8("a\x85\xC3z\xE2\x82") == "a\xEF\xBF\xBD\xEF\xBF\xBDz\xEF\xBF\xBD\xEF\xBF\xBD");
}
