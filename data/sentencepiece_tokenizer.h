// SPDX-License-Identifier: Apache-2.0
// sentencepiece (Kudo and Richardson 2018): models from elsewhere, and training our own.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "data/tokenizer.h"

namespace flashlm {

/// From a sentencepiece model. One with byte tokens that leaves text as it is, or only puts a space in front,
/// is lossless here; others do to text what alteration() says. Errors: damaged; neither an end-of-sentence
/// nor a beginning-of-sentence token to put between documents (the latter serves where the former is
/// missing).
std::unique_ptr<Tokenizer> sentencepiece_tokenizer(std::string_view serialized, const std::string& name);

/// Trains a lossless model and returns its file content: "bpe" (Sennrich et al. 2016) or "unigram" (Kudo
/// 2018), with byte tokens and text as it is. The same text gives the same bytes. Seconds and memory grow
/// with the text: 16 MB is plenty, and prepare() samples down to that. Error: another model type; the
/// vocabulary is smaller than the bytes and characters need, or larger than the text yields.
std::string train_sentencepiece(std::string_view text, std::int64_t vocab_size,
                                const std::string& model_type = "bpe");

}  // namespace flashlm
