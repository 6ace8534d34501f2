// SPDX-License-Identifier: Apache-2.0
// The table of well-formed UTF-8 (Unicode standard, table 3-7) as comparisons, and a search for the next
// word.
#include "data/text.h"

#include <algorithm>

namespace flashlm {

std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  if (text.empty()) return 0;
  const unsigned char lead = byte(0);
  if (lead < 0x80) return 1;
  if (lead < 0xC2 || lead > 0xF4) return 0;
  const std::size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  if (text.size() < length) return 0;
  // The second byte's range is narrower after four leads: overlong forms, surrogates, beyond U+10FFFF.
  const unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  if (byte(1) < low || byte(1) > high) return 0;
  for (std::size_t i = 2; i < length; ++i)
    if (byte(i) < 0x80 || byte(i) > 0xBF) return 0;
  return length;
}

std::string valid_utf8(std::string_view text) {
  std::string valid;
  while (!text.empty()) {
    const std::size_t length = utf8_length(text);
    valid += length > 0 ? text.substr(0, length) : std::string_view("\xEF\xBF\xBD");
    text.remove_prefix(length > 0 ? length : 1);
  }
  return valid;
}

namespace {

bool is_ascii_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

/// Whether the text ends with one of Unicode's White_Space.
bool ends_with_space(std::string_view text) {
  if (is_ascii_space(text.back())) return true;
  for (const std::string_view space : {"\xC2\x85", "\xC2\xA0", "\xE1\x9A\x80", "\xE2\x80\xA8", "\xE2\x80\xA9",
                                       "\xE2\x80\xAF", "\xE2\x81\x9F", "\xE3\x80\x80"})
    if (text.ends_with(space)) return true;
  return text.size() >= 3 && text.substr(text.size() - 3, 2) == "\xE2\x80" &&
         static_cast<unsigned char>(text.back()) <= 0x8A;
}

}  // namespace

std::string_view take_chunk(std::string_view& text, std::size_t size) {
  std::size_t end = std::min(std::max<std::size_t>(size, 1), text.size());
  const std::size_t limit = std::min(end + size, text.size());
  const auto between_words = [text](std::size_t i) {
    return is_ascii_space(text[i]) && !ends_with_space(text.substr(0, i));
  };
  std::size_t other = limit;  // the first place before white space other than ' '
  while (end < limit && !(between_words(end) && text[end] == ' ')) {
    if (other == limit && between_words(end)) other = end;
    ++end;
  }
  if (end == limit && end < text.size()) end = other;
  if (end < text.size() && !is_ascii_space(text[end])) {
    const auto continues = [&](std::size_t i) {
      return (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80;
    };
    for (int steps = 0; steps < 3 && end > 1 && continues(end); ++steps) --end;
  }
  const std::string_view chunk = text.substr(0, end);
  text.remove_prefix(end);
  return chunk;
}

}  // namespace flashlm
