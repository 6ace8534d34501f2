// SPDX-License-Identifier: Apache-2.0
// The documents that prepare() uses, as often as it needs them: chosen, hashed, and cut into chunks to
// encode, in memory that does not grow with them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "data/documents.h"
#include "data/error.h"
#include "data/file.h"

namespace flashlm {

/// What was read is no longer what it was in an earlier pass.
class ChangedInput : public Error {
 public:
  explicit ChangedInput(const std::filesystem::path& file)
      : Error(file.string() + " was changed while it was read; run the command again") {}
};

/// Which documents: of these files, in this order, the first `max_documents` that are not empty and have at
/// least `min_chars` characters (code points).
struct Corpus {
  std::vector<std::filesystem::path> files;
  DocumentOptions reading;
  std::int64_t min_chars = 0;
  std::int64_t max_documents = INT64_MAX;
};

/// One pass over a corpus.
class CorpusReader {
 public:
  /// `expected`: file_hashes() of an earlier pass over the same corpus.
  explicit CorpusReader(const Corpus& corpus, const std::vector<std::uint64_t>* expected = nullptr);

  /// Goes on to the next document, whether the one before was read to its end or not. False: there is none.
  /// Error: a file has other documents than `expected`.
  bool next();
  /// The document's next piece, not empty, valid until the next call; nullopt behind its end.
  std::optional<std::string_view> piece();
  /// No piece is left.
  bool ended() const { return !has_head_ && last_; }
  /// XXH3 of the document, once it has ended.
  std::uint64_t hash() const { return hash_; }

  /// Where the document is; the last file, if there is none any more.
  const std::filesystem::path& file() const {
    return corpus_.files[std::min(file_hashes_.size(), corpus_.files.size() - 1)];
  }

  /// XXH3 over the hashes of all documents that have ended.
  std::uint64_t texts_hash() const { return texts_.digest(); }
  /// The same for each file, once next() has returned false.
  const std::vector<std::uint64_t>& file_hashes() const { return file_hashes_; }
  /// How much was read, by the size of the files and the number of documents.
  double fraction() const;

 private:
  bool choose(DocumentReader::Piece piece);
  void end_file();

  const Corpus& corpus_;
  const std::vector<std::uint64_t>* expected_;
  std::vector<std::uint64_t> sizes_;  // of the files on disk
  std::uint64_t total_size_ = 0;
  std::uint64_t size_before_ = 0;  // of the files before the present one
  std::unique_ptr<DocumentReader> reader_;
  std::int64_t chosen_ = 0;
  std::string_view head_;  // what choose() had to read of the document
  std::string head_copy_;
  bool has_head_ = false;
  bool last_ = true;
  Checksum document_;
  std::uint64_t hash_ = 0;
  Checksum texts_;
  Checksum file_texts_;
  std::vector<std::uint64_t> file_hashes_;
};

/// Which part of each document is for training; the rest is held out.
struct Split {
  std::vector<bool> held_out;              // whole documents, or else
  std::vector<std::uint64_t> train_bytes;  // bytes in front that are for training, if not empty

  std::int64_t documents() const {
    return static_cast<std::int64_t>(train_bytes.empty() ? held_out.size() : train_bytes.size());
  }
  std::uint64_t train_bytes_of(std::int64_t document) const {
    const auto i = static_cast<std::size_t>(document);
    if (!train_bytes.empty()) return train_bytes[i];
    return held_out[i] ? 0 : UINT64_MAX;
  }
};

/// The documents in chunks of about `size` bytes, at most twice that, as take_chunk (data/text.h) cuts the
/// two parts of each.
class ChunkReader {
 public:
  struct Chunk {
    std::string_view text;  // not empty; valid until the next call
    bool held_out;
    bool continued;  // not the first of its part of the document
    bool ends;       // the last of it
  };
  /// What was read up to some chunk.
  struct Position {
    std::int64_t documents = 0;    // whole ones
    std::int64_t bytes = 0;        // of the next one
    std::uint64_t texts_hash = 0;  // CorpusReader::texts_hash() of the whole ones

    bool operator==(const Position&) const = default;
  };

  /// Keeps references.
  ChunkReader(CorpusReader& corpus, const Split& split, std::size_t size)
      : corpus_(corpus), split_(split), size_(size) {}

  std::optional<Chunk> next();
  const Position& position() const { return position_; }
  /// From the start to just behind the last whole document of a position.
  bool skip_document();
  /// From there to `bytes` of the next one. False: it does not have as many.
  bool skip_bytes(std::int64_t bytes);

 private:
  bool begin_document();
  void end_document();

  CorpusReader& corpus_;
  const Split& split_;
  std::size_t size_;
  std::string buffer_;  // of the present document, what was read and not yet given out: from begin_ on
  std::size_t begin_ = 0;
  bool inside_ = false;
  Position position_;
};

/// Where the held-out end of a text begins: behind the first good place in the half after the wanted one.
class TailFinder {
 public:
  TailFinder(std::uint64_t size, double fraction);
  /// Takes the text in pieces.
  void read(std::string_view piece);
  std::uint64_t start() const;

 private:
  std::uint64_t wanted_;
  std::uint64_t last_;
  std::uint64_t at_ = 0;
  std::uint64_t size_;
  char before_ = 0;
  // Behind the first such place; UINT64_MAX: not found.
  std::uint64_t paragraph_ = UINT64_MAX;
  std::uint64_t line_ = UINT64_MAX;
  std::uint64_t sentence_ = UINT64_MAX;
  std::uint64_t word_ = UINT64_MAX;
  std::uint64_t character_ = UINT64_MAX;
};

}  // namespace flashlm
