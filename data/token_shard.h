// SPDX-License-Identifier: Apache-2.0
// Token ids in a file, mapped into memory. Our own format (docs/formats.md) names its tokenizer, knows where
// documents end and carries checksums; the raw files of other programs (headerless uint16, .npy, llm.c's
// .bin) are read as they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

#include "data/file.h"

namespace flashlm {

/// A sequence of token ids, each in 0 ... vocab_size() - 1: checked when the file is opened. Copies and
/// slices share the mapping.
class TokenShard {
 public:
  /// Opens a shard of our format. Errors: not a shard, another version, truncated, corrupt, an id out of
  /// range.
  static TokenShard open(const std::filesystem::path& path);
  /// Opens a file of ids without a tokenizer: .npy (one dimension; uint16, uint32 or int32), llm.c's .bin
  /// (magic 20240520, version 1), our own format, or else uint16 ids and nothing more, whatever the file's
  /// name.
  static TokenShard open_raw(const std::filesystem::path& path, std::int64_t vocab_size);

  std::int64_t size() const { return size_; }
  std::int32_t operator[](std::int64_t position) const;
  /// out[i] = the id at offset + i. std::out_of_range when the shard ends before.
  void copy(std::int64_t offset, std::span<std::int64_t> out) const;
  /// The ids offset ... offset + count - 1, as a shard whose text_bytes() and documents are unknown.
  TokenShard slice(std::int64_t offset, std::int64_t count) const;

  std::int64_t vocab_size() const { return vocab_size_; }
  /// Tokenizer::fingerprint() of the tokenizer that made the ids; 0 if unknown.
  std::uint64_t fingerprint() const { return fingerprint_; }
  /// Bytes of text that the ids stand for; 0 if unknown.
  std::int64_t text_bytes() const { return text_bytes_; }
  /// Documents, one after the other; 0 if unknown.
  std::int64_t document_count() const { return document_count_; }
  /// Where document i ends, its end-of-text token included: the next one's first position, or size(). Rises.
  std::int64_t document_end(std::int64_t i) const;

 private:
  TokenShard() = default;
  void check_ids(const std::filesystem::path& path) const;

  std::shared_ptr<const MappedFile> file_;
  const std::byte* ids_ = nullptr;  // in file_, little-endian, of any alignment
  std::int64_t size_ = 0;
  int bytes_per_id_ = 2;
  std::int64_t vocab_size_ = 0;
  std::uint64_t fingerprint_ = 0;
  std::int64_t text_bytes_ = 0;
  const std::byte* document_ends_ = nullptr;  // in file_, uint64, of any alignment
  std::int64_t document_count_ = 0;
};

/// How much of a shard is written.
struct ShardExtent {
  std::int64_t size = 0;        // ids
  std::int64_t text_bytes = 0;  // that they stand for
  std::int64_t documents = 0;   // that were ended
};

/// Writes a shard as ids arrive; nothing is at `path` before commit(). Until then they are in `<path>.part`,
/// the ends of documents in `<path>.part-ends`, so that another process can go on after save().
class TokenShardWriter {
 public:
  /// Begins anew, or goes on behind what an earlier writer of the same shard had saved. Error: that is not
  /// there.
  TokenShardWriter(const std::filesystem::path& path, std::int64_t vocab_size, std::uint64_t fingerprint,
                   const ShardExtent& saved = {});

  /// Appends ids that stand for `text_bytes` bytes of text. Error: an id outside the vocabulary.
  void append(std::span<const std::int32_t> ids, std::int64_t text_bytes);
  /// What was appended since the last call, at least one id, is a document. Without any call the shard's
  /// documents are unknown; else the last call must come after the last id.
  void end_document();
  /// Makes durable what there is. From then on, and when begun behind something saved, the two working files
  /// outlive a writer without commit(), until discard().
  ShardExtent save();
  void discard();
  void commit();

  const ShardExtent& extent() const { return extent_; }

 private:
  AtomicFile ids_;
  AtomicFile ends_;
  std::filesystem::path ends_path_;
  Checksum payload_;
  std::int64_t vocab_size_;
  std::uint64_t fingerprint_;
  ShardExtent extent_;
  std::int64_t last_end_ = 0;
  std::vector<std::byte> encoded_;
};

}  // namespace flashlm
