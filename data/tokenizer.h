// SPDX-License-Identifier: Apache-2.0
// Text to token ids and back. The one promise of a lossless tokenizer: decode(encode(s)) == s for every byte
// string s, valid UTF-8 or not.
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

/// Not thread-safe: encode() keeps a cache. One object per thread, made with clone().
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  /// What `--tokenizer` and the commands name: "gpt2:FOLDER" for byte-level BPE, or else the path of what
  /// load() reads.
  static std::unique_ptr<Tokenizer> open(const std::string& spec);
  /// Reads a tokenizer file, of the kinds that from_serialized() knows, or a folder: with encoder.json and
  /// vocab.bpe as OpenAI published them, with a tokenizer.json, or with our own tokenizer.model. Errors:
  /// missing, of an unknown kind, damaged, without a token to put between documents.
  static std::unique_ptr<Tokenizer> load(const std::filesystem::path& path);
  /// The same from a file's content, whose kind it tells: a sentencepiece model, Hugging Face's
  /// tokenizer.json with byte-level BPE, tiktoken's file of ranks. `name` is what messages call it.
  static std::unique_ptr<Tokenizer> from_serialized(std::string_view serialized,
                                                    const std::string& name = "tokenizer");

  /// The same tokenizer for another thread; the vocabulary is shared.
  virtual std::unique_ptr<Tokenizer> clone() const = 0;

  /// Ids are 0 ... vocab_size() - 1.
  virtual std::int64_t vocab_size() const = 0;
  /// Text is text: what looks like a control token, "<|endoftext|>", is encoded as the characters it is.
  /// `continued`: the text goes on where a former part of its document ended. A document's ids are those of
  /// its parts, one after the other, where the cuts are as exact as those of take_chunk (data/text.h).
  virtual std::vector<std::int32_t> encode(std::string_view text, bool continued = false) const = 0;
  /// The exact bytes that a token stands for; "" for control tokens. Error: no id of this vocabulary.
  virtual const std::string& token_text(std::int32_t id) const = 0;
  /// The control token that follows each document.
  virtual std::int32_t end_of_text() const = 0;
  /// "" where decode() undoes encode() for all bytes; else, in a few words, what encode() does to text.
  virtual std::string alteration() const { return ""; }
  bool lossless() const { return alteration().empty(); }

  /// The texts of the tokens, one after the other, as the beginning of a document: without the space that
  /// some sentencepiece models put in front.
  virtual std::string decode(std::span<const std::int32_t> ids) const;
  /// The tokenizer file's content: from_serialized(serialized()) is this tokenizer.
  const std::string& serialized() const { return *serialized_; }
  /// checksum(serialized()): token shards carry it to name the tokenizer they were made with.
  std::uint64_t fingerprint() const;

 protected:
  explicit Tokenizer(std::string serialized)
      : serialized_(std::make_shared<const std::string>(std::move(serialized))) {}
  Tokenizer(const Tokenizer&) = default;

  /// The index that `id` is in a table of the vocabulary. Error: it is none.
  std::size_t checked(std::int32_t id) const;

 private:
  std::shared_ptr<const std::string> serialized_;
};

}  // namespace flashlm
