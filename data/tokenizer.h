// SPDX-License-Identifier: Apache-2.0
// Text to token ids and back. The one promise: decode(encode(s)) == s for every byte string s, valid UTF-8 or
// not.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace flashlm {

/// Not thread-safe: encode() keeps a cache. One object per thread.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  /// Reads a tokenizer file: a sentencepiece model. Errors: missing, of an unknown kind, damaged, or a model
  /// that alters text (normalisation, a dummy prefix, no byte fallback).
  static std::unique_ptr<Tokenizer> load(const std::filesystem::path& path);
  /// The same from a file's content; `name` is what messages call it.
  static std::unique_ptr<Tokenizer> from_serialized(std::string_view serialized,
                                                    const std::string& name = "tokenizer");

  /// Ids are 0 ... vocab_size() - 1.
  virtual std::int64_t vocab_size() const = 0;
  virtual std::vector<std::int32_t> encode(std::string_view text) const = 0;
  /// The exact bytes that a token stands for; "" for control tokens.
  virtual const std::string& token_text(std::int32_t id) const = 0;
  /// The control token that follows each document.
  virtual std::int32_t end_of_text() const = 0;

  /// The texts of the tokens, one after the other.
  std::string decode(std::span<const std::int32_t> ids) const;
  /// The tokenizer file's content: from_serialized(serialized()) is this tokenizer.
  const std::string& serialized() const { return serialized_; }
  /// checksum(serialized()): token shards carry it to name the tokenizer they were made with.
  std::uint64_t fingerprint() const;

 protected:
  explicit Tokenizer(std::string serialized) : serialized_(std::move(serialized)) {}

 private:
  std::string serialized_;
};

/// Trains a sentencepiece BPE model (Sennrich et al. 2016; Kudo and Richardson 2018) and returns its file
/// content. The same text gives the same bytes. Seconds and memory grow with the text: 16 MB is plenty, and
/// prepare() samples down to that. Error: the vocabulary is smaller than the bytes and characters need, or
/// larger than the text yields.
std::string train_sentencepiece(std::string_view text, std::int64_t vocab_size);
std::string train_sentencepiece(const std::vector<std::filesystem::path>& files, std::int64_t vocab_size);

}  // namespace flashlm
