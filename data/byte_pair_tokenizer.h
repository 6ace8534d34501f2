// SPDX-License-Identifier: Apache-2.0
// Byte-level byte pair encoding as in GPT-2 (Radford et al. 2019): text is split into pieces by a pattern,
// and within a piece bytes are merged pair by pair, the earliest merge of the vocabulary first (Sennrich et
// al. 2016). Ids equal those of Hugging Face's tokenizers (0.23) and of tiktoken (0.14, encode_ordinary).
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"

namespace flashlm {

/// From the files that OpenAI published for GPT-2: the ids of the tokens, and the merges in their order.
/// All errors below are one line: damaged; a token that no merge makes; a merge of or to something that is
/// no token; an id missing or taken twice; a byte without a token; no end-of-text token.
std::unique_ptr<Tokenizer> byte_pair_from_gpt2(std::string_view encoder_json, std::string_view vocab_bpe,
                                               const std::string& name);
/// From Hugging Face's tokenizer.json. Refused: other models than BPE, normalisers, splits other than that of
/// ByteLevel, a space put in front, added tokens that are not special. Special tokens are control tokens
/// here, never found in text (as with Hugging Face's encode_special_tokens), and a post-processor's are not
/// added.
std::unique_ptr<Tokenizer> byte_pair_from_json(std::string_view json, const std::string& name);
/// From tiktoken's file of ranks: lines of a token in base64 and its id. The file tells neither pattern nor
/// control tokens: it must be one for GPT-2's pattern, as r50k_base is, and the id after the last rank
/// becomes
/// <|endoftext|>. Refused: tokens that GPT-2's pattern would cut (cl100k_base, o200k_base).
std::unique_ptr<Tokenizer> byte_pair_from_ranks(std::string_view ranks, const std::string& name);
/// Whether a file begins as one of ranks does.
bool looks_like_ranks(std::string_view content);

/// The pieces of a text by GPT-2's pattern
///   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
/// with letters, numbers and spaces as in Unicode 16.0. A byte that is not UTF-8 counts as one character that
/// is none of the three, as U+FFFD in its place would.
std::vector<std::string_view> gpt2_split(std::string_view text);

}  // namespace flashlm
