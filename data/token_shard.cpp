// SPDX-License-Identifier: Apache-2.0
// The shard header, its checks, and the three foreign formats. Everything is little-endian, as the file and
// as every machine we build for; ids are read through memcpy because a foreign header may leave them
// unaligned.
#include "data/token_shard.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstddef>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "data/error.h"

static_assert(std::endian::native == std::endian::little, "token shards are read without byte swapping");

namespace flashlm {
namespace {

constexpr std::array<char, 8> kMagic = {'F', 'L', 'M', 'T', 'O', 'K', 'E', 'N'};
constexpr std::uint32_t kVersion = 2;
constexpr std::int64_t kReleasedIds = 1 << 22;  // looked at between two calls of MappedFile::release
constexpr std::int64_t kLargestVocabulary = std::numeric_limits<std::int32_t>::max();

struct Header {
  std::array<char, 8> magic;
  std::uint32_t version;
  std::uint32_t bytes_per_id;  // 2 or 4
  std::uint64_t vocab_size;
  std::uint64_t fingerprint;
  std::uint64_t size;        // ids that follow
  std::uint64_t text_bytes;  // that they stand for
  std::uint64_t documents;   // ends of documents that follow the ids
  std::uint64_t payload_checksum;
  std::uint64_t header_checksum;  // of all fields above
};
static_assert(sizeof(Header) == 72);

std::uint64_t header_checksum(const Header& header) {
  return checksum(std::as_bytes(std::span(&header, 1)).first(offsetof(Header, header_checksum)));
}

int bytes_per_id_for(std::int64_t vocab_size) { return vocab_size <= 65536 ? 2 : 4; }

void check_vocab_size(std::int64_t vocab_size) {
  if (vocab_size < 1 || vocab_size > kLargestVocabulary)
    throw Error("--vocab-size must be between 1 and " + std::to_string(kLargestVocabulary) + ", got " +
                std::to_string(vocab_size));
}

template <typename T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

/// The largest id, by a loop that the compiler vectorises.
template <typename T>
T largest(const std::byte* ids, std::int64_t size) {
  T result = 0;
  for (std::int64_t i = 0; i < size; ++i) result = std::max(result, load<T>(ids + i * sizeof(T)));
  return result;
}

/// Where the ids of a foreign file are and how they are stored.
struct Layout {
  std::size_t offset;
  std::int64_t size;
  int bytes_per_id;
};

[[noreturn]] void refuse_npy(const std::filesystem::path& path, const std::string& why) {
  throw Error(path.string() + ": " + why + "; save the ids with numpy.save(file, ids.astype(numpy.uint16))");
}

/// The text between `key` and one of `ends` in the dictionary of an .npy header.
std::string_view npy_field(std::string_view header, std::string_view key, std::string_view ends) {
  const std::size_t start = header.find(key);
  if (start == std::string_view::npos) return {};
  const std::string_view rest = header.substr(start + key.size());
  return rest.substr(0, rest.find_first_of(ends));
}

Layout npy_layout(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  // "\x93NUMPY", major, minor, then the header's length: 2 bytes in version 1, 4 bytes later.
  const std::size_t prefix = bytes.size() < 12 ? 0 : bytes[6] == std::byte{1} ? 10 : 12;
  const std::size_t header_size = prefix == 0    ? 0
                                  : prefix == 10 ? load<std::uint16_t>(&bytes[8])
                                                 : load<std::uint32_t>(&bytes[8]);
  if (prefix == 0 || header_size > bytes.size() - prefix) refuse_npy(path, "the .npy header is incomplete");
  const std::string_view header(reinterpret_cast<const char*>(&bytes[prefix]), header_size);

  const std::string_view type = npy_field(header, "'descr': '", "'");
  if (type != "<u2" && type != "<u4" && type != "<i4")
    refuse_npy(path, "ids must be little-endian uint16, uint32 or int32, got '" + std::string(type) + "'");
  const int bytes_per_id = type == "<u2" ? 2 : 4;

  const std::string_view shape = npy_field(header, "'shape': (", ")");  // "123," when there is one dimension
  std::int64_t size = -1;
  const auto [end, error] = std::from_chars(shape.data(), shape.data() + shape.size(), size);
  if (error != std::errc() || size < 0 || std::string_view(end, shape.data() + shape.size()) != ",")
    refuse_npy(path, "ids must have one dimension, got shape (" + std::string(shape) + ")");
  return {prefix + header_size, size, bytes_per_id};
}

constexpr std::int32_t kLlmcMagic = 20240520;
constexpr std::size_t kLlmcHeaderBytes = 256 * sizeof(std::int32_t);

Layout llmc_layout(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  if (bytes.size() < kLlmcHeaderBytes)
    throw Error(path.string() + ": the llm.c header is incomplete; copy it again");
  const auto version = load<std::int32_t>(&bytes[4]);
  if (version != 1)
    throw Error(path.string() + ": version 1 of llm.c's token file (uint16) is needed, got version " +
                std::to_string(version));
  return {kLlmcHeaderBytes, load<std::int32_t>(&bytes[8]), 2};
}

Layout headerless_layout(const std::filesystem::path& path, std::span<const std::byte> bytes,
                         std::int64_t vocab_size) {
  if (vocab_size > 65536)
    throw Error(path.string() + ": a file without header holds uint16 ids, and --vocab-size " +
                std::to_string(vocab_size) + " needs more; save the ids as uint32 with numpy.save");
  if (bytes.size() % 2 != 0)
    throw Error(path.string() + ": a file without header must hold uint16 ids, and " +
                std::to_string(bytes.size()) + " bytes is an odd number; copy it again");
  return {0, static_cast<std::int64_t>(bytes.size() / 2), 2};
}

bool begins_with(std::span<const std::byte> bytes, std::string_view magic) {
  return bytes.size() >= magic.size() && std::memcmp(bytes.data(), magic.data(), magic.size()) == 0;
}

}  // namespace

TokenShard TokenShard::open(const std::filesystem::path& path) {
  const auto require = [&](bool holds, const std::string& why) {
    if (!holds)
      throw Error(path.string() + ": " + why + "; make it again with `flashlm prepare INPUT... --out DIR`");
  };
  TokenShard shard;
  shard.file_ = std::make_shared<MappedFile>(path);
  const std::span<const std::byte> bytes = shard.file_->bytes();
  require(begins_with(bytes, {kMagic.data(), kMagic.size()}), "not a token shard");
  require(bytes.size() >= sizeof(Header), "the header is incomplete");
  const auto header = load<Header>(bytes.data());
  require(header.version == kVersion, "token shard version " + std::to_string(header.version) +
                                          ", and this program reads version " + std::to_string(kVersion));
  require(header.header_checksum == header_checksum(header),
          "the header is corrupt (its checksum does not match)");
  require(header.bytes_per_id == 2 || header.bytes_per_id == 4, "ids must have 2 or 4 bytes");

  const std::span<const std::byte> payload = bytes.subspan(sizeof(Header));
  // Compared by subtraction: sizes that a forged header announces must not wrap.
  const bool whole =
      header.size <= payload.size() / header.bytes_per_id &&
      header.documents <= payload.size() / sizeof(std::uint64_t) &&
      payload.size() - header.size * header.bytes_per_id == header.documents * sizeof(std::uint64_t);
  require(whole, "truncated or overlong: " + std::to_string(header.size) + " ids of " +
                     std::to_string(header.bytes_per_id) + " bytes and " + std::to_string(header.documents) +
                     " ends of documents are announced, and " + std::to_string(payload.size()) +
                     " bytes are there");
  Checksum content;
  shard.file_->for_each_piece(sizeof(Header),
                              [&](std::span<const std::byte> piece) { content.update(piece); });
  require(content.digest() == header.payload_checksum,
          "corrupt (the checksum of its content does not match)");

  shard.ids_ = payload.data();
  shard.size_ = static_cast<std::int64_t>(header.size);
  shard.bytes_per_id_ = static_cast<int>(header.bytes_per_id);
  shard.vocab_size_ = static_cast<std::int64_t>(header.vocab_size);
  shard.fingerprint_ = header.fingerprint;
  shard.text_bytes_ = static_cast<std::int64_t>(header.text_bytes);
  shard.document_ends_ = payload.data() + header.size * header.bytes_per_id;
  shard.document_count_ = static_cast<std::int64_t>(header.documents);
  std::int64_t end = 0;
  for (std::int64_t i = 0; i < shard.document_count_; ++i) {
    require(shard.document_end(i) > end, "the ends of its documents do not rise");
    end = shard.document_end(i);
    if (i % kReleasedIds == 0) shard.file_->release();
  }
  require(shard.document_count_ == 0 || end == shard.size_, "its last document does not end with its ids");
  shard.check_ids(path);
  return shard;
}

TokenShard TokenShard::open_raw(const std::filesystem::path& path, std::int64_t vocab_size) {
  check_vocab_size(vocab_size);
  TokenShard shard;
  shard.file_ = std::make_shared<MappedFile>(path);
  const std::span<const std::byte> bytes = shard.file_->bytes();
  if (begins_with(bytes, {kMagic.data(), kMagic.size()})) {
    shard = open(path);
    if (shard.vocab_size_ != vocab_size)
      throw Error(path.string() + ": its vocabulary has " + std::to_string(shard.vocab_size_) +
                  " tokens; use --vocab-size " + std::to_string(shard.vocab_size_));
    return shard;
  }
  const bool llmc = bytes.size() >= 8 && load<std::int32_t>(bytes.data()) == kLlmcMagic;
  const Layout layout = begins_with(bytes, "\x93NUMPY") ? npy_layout(path, bytes)
                        : llmc                          ? llmc_layout(path, bytes)
                                                        : headerless_layout(path, bytes, vocab_size);
  const std::size_t payload = bytes.size() - layout.offset;
  if (layout.size < 0 || payload % layout.bytes_per_id != 0 ||
      payload / layout.bytes_per_id != static_cast<std::size_t>(layout.size))
    throw Error(path.string() + ": truncated or overlong: " + std::to_string(layout.size) + " ids of " +
                std::to_string(layout.bytes_per_id) + " bytes are announced, and " + std::to_string(payload) +
                " bytes are there; copy it again");
  shard.ids_ = bytes.data() + layout.offset;
  shard.size_ = layout.size;
  shard.bytes_per_id_ = layout.bytes_per_id;
  shard.vocab_size_ = vocab_size;
  shard.check_ids(path);
  return shard;
}

void TokenShard::check_ids(const std::filesystem::path& path) const {
  // An int32 below zero is a large uint32 here, and is found by the same scan.
  std::uint32_t found = 0;
  for (std::int64_t start = 0; start < size_; start += kReleasedIds) {
    const std::byte* const ids = ids_ + start * bytes_per_id_;
    const std::int64_t count = std::min(size_ - start, kReleasedIds);
    found = std::max<std::uint32_t>(
        found, bytes_per_id_ == 2 ? largest<std::uint16_t>(ids, count) : largest<std::uint32_t>(ids, count));
    file_->release();
  }
  if (size_ == 0 || found < vocab_size_) return;
  std::int64_t position = 0;
  while (static_cast<std::uint32_t>((*this)[position]) < vocab_size_) ++position;
  const std::int32_t id = (*this)[position];
  throw Error(path.string() + ": the id at position " + std::to_string(position) + " is " +
              std::to_string(id) + ", outside the vocabulary of " + std::to_string(vocab_size_) +
              " tokens; " +
              (static_cast<std::int32_t>(found) < 0
                   ? "ids must not be negative"
                   : "use --vocab-size " + std::to_string(std::int64_t{found} + 1) + " or more"));
}

std::int32_t TokenShard::operator[](std::int64_t position) const {
  return bytes_per_id_ == 2 ? load<std::uint16_t>(ids_ + position * 2)
                            : load<std::int32_t>(ids_ + position * 4);
}

std::int64_t TokenShard::document_end(std::int64_t i) const {
  return load<std::int64_t>(document_ends_ + i * sizeof(std::uint64_t));
}

void TokenShard::copy(std::int64_t offset, std::span<std::int64_t> out) const {
  const auto count = static_cast<std::int64_t>(out.size());
  if (offset < 0 || offset > size_ || count > size_ - offset)
    throw std::out_of_range("TokenShard::copy: " + std::to_string(count) + " ids at " +
                            std::to_string(offset) + " of " + std::to_string(size_));
  for (std::int64_t i = 0; i < count; ++i) out[static_cast<std::size_t>(i)] = (*this)[offset + i];
}

TokenShard TokenShard::slice(std::int64_t offset, std::int64_t count) const {
  if (offset < 0 || count < 0 || offset > size_ || count > size_ - offset)
    throw std::out_of_range("TokenShard::slice: " + std::to_string(count) + " ids at " +
                            std::to_string(offset) + " of " + std::to_string(size_));
  TokenShard part = *this;
  part.ids_ += offset * bytes_per_id_;
  part.size_ = count;
  part.text_bytes_ = 0;
  part.document_count_ = 0;
  return part;
}

TokenShardWriter::TokenShardWriter(const std::filesystem::path& path, std::int64_t vocab_size,
                                   std::uint64_t fingerprint, const ShardExtent& saved)
    : ids_(path, path.string() + ".part",
           saved.size == 0 ? 0 : sizeof(Header) + saved.size * bytes_per_id_for(vocab_size)),
      ends_(path, path.string() + ".part-ends", saved.documents * sizeof(std::uint64_t)),
      ends_path_(path.string() + ".part-ends"),
      vocab_size_(vocab_size),
      fingerprint_(fingerprint),
      extent_(saved) {
  check_vocab_size(vocab_size);
  if (saved.size == 0) {
    ids_.write(std::string(sizeof(Header), '\0'));  // its place; commit() fills it in
    return;
  }
  MappedFile(path.string() + ".part").for_each_piece(sizeof(Header), [&](std::span<const std::byte> bytes) {
    payload_.update(bytes);
  });
  if (saved.documents > 0)
    last_end_ = load<std::int64_t>(MappedFile(ends_path_).bytes().last(sizeof(std::uint64_t)).data());
}

void TokenShardWriter::append(std::span<const std::int32_t> ids, std::int64_t text_bytes) {
  const auto bytes_per_id = static_cast<std::size_t>(bytes_per_id_for(vocab_size_));
  encoded_.resize(ids.size() * bytes_per_id);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size_)
      throw Error("token id " + std::to_string(ids[i]) + " is outside the vocabulary of " +
                  std::to_string(vocab_size_) + " tokens");
    std::memcpy(&encoded_[i * bytes_per_id], &ids[i],
                bytes_per_id);  // little-endian: the low bytes come first
  }
  payload_.update(encoded_);
  ids_.write(encoded_);
  extent_.size += static_cast<std::int64_t>(ids.size());
  extent_.text_bytes += text_bytes;
}

void TokenShardWriter::end_document() {
  if (extent_.size == last_end_)
    throw std::logic_error("TokenShardWriter::end_document: a document must hold an id");
  last_end_ = extent_.size;
  ++extent_.documents;
  ends_.write(std::as_bytes(std::span(&last_end_, 1)));
}

ShardExtent TokenShardWriter::save() {
  ids_.save();
  ends_.save();
  return extent_;
}

void TokenShardWriter::discard() {
  ids_.discard();
  ends_.discard();
}

void TokenShardWriter::commit() {
  if (extent_.documents > 0 && last_end_ != extent_.size)
    throw std::logic_error("TokenShardWriter::commit: the last document was not ended");
  ends_.flush();
  MappedFile(ends_path_).for_each_piece(0, [&](std::span<const std::byte> ends) {
    payload_.update(ends);
    ids_.write(ends);
  });
  Header header{.magic = kMagic,
                .version = kVersion,
                .bytes_per_id = static_cast<std::uint32_t>(bytes_per_id_for(vocab_size_)),
                .vocab_size = static_cast<std::uint64_t>(vocab_size_),
                .fingerprint = fingerprint_,
                .size = static_cast<std::uint64_t>(extent_.size),
                .text_bytes = static_cast<std::uint64_t>(extent_.text_bytes),
                .documents = static_cast<std::uint64_t>(extent_.documents),
                .payload_checksum = payload_.digest(),
                .header_checksum = 0};
  header.header_checksum = header_checksum(header);
  ids_.seek(0);
  ids_.write(std::as_bytes(std::span(&header, 1)));
  ids_.commit();
  ends_.discard();  // they are in the shard now
}

}  // namespace flashlm
