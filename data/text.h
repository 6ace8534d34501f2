// SPDX-License-Identifier: Apache-2.0
// Cutting text: whole UTF-8 characters and chunks that end between words.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace flashlm {

/// Bytes of the UTF-8 character that `text` begins with; 0 when it is empty or malformed there (RFC 3629: no
/// overlong forms, no surrogates, nothing above U+10FFFF).
std::size_t utf8_length(std::string_view text);

/// The text with each byte that is not UTF-8 replaced by U+FFFD: for showing what a model drew byte by byte.
std::string valid_utf8(std::string_view text);

/// Removes a chunk of about `size` bytes from the front of `text` and returns it. It ends before the first
/// space at or after `size` that follows what is no white space; where none comes within `size` more bytes,
/// before other ASCII white space of that kind; else between characters.
///
/// Tokens of the chunks, one after the other, are those of the whole. GPT-2's pattern has a boundary before
/// white space that follows something else in any case: none of its alternatives goes from the one to the
/// other, none looks back, and the one that looks ahead ends in white space, which the chunk does not.
/// sentencepiece's tokens, as a rule, have spaces in front only, so that none lies across. Only cuts between
/// characters may cost a token or two, and for sentencepiece those before other white space.
std::string_view take_chunk(std::string_view& text, std::size_t size);

}  // namespace flashlm
