// SPDX-License-Identifier: Apache-2.0
#include "data/corpus.h"

#include <algorithm>
#include <span>
#include <system_error>
#include <utility>

#include "data/text.h"

namespace flashlm {
namespace {

/// take_chunk looks at no more than this beyond `size` bytes.
constexpr std::size_t kLookahead = 64;

bool continues_character(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

std::int64_t characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char byte) { return !continues_character(byte); });
}

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

}  // namespace

CorpusReader::CorpusReader(const Corpus& corpus, const std::vector<std::uint64_t>* expected)
    : corpus_(corpus), expected_(expected) {
  for (const std::filesystem::path& file : corpus.files) {
    std::error_code unknown;  // opening the file will tell
    const std::uint64_t size = std::filesystem::file_size(file, unknown);
    sizes_.push_back(unknown ? 0 : size);
    total_size_ += sizes_.back();
  }
}

bool CorpusReader::next() {
  while (piece()) {
  }
  if (chosen_ == corpus_.max_documents) {
    if (reader_) end_file();
    return false;
  }
  while (file_hashes_.size() < corpus_.files.size()) {
    if (!reader_) reader_ = open_documents(corpus_.files[file_hashes_.size()], corpus_.reading);
    const auto first = reader_->next();
    if (first && choose(*first)) return true;
    if (!first) end_file();
  }
  return false;
}

bool CorpusReader::choose(DocumentReader::Piece piece) {
  head_ = piece.text;
  last_ = piece.last;
  std::int64_t found = characters(head_);
  // Valid text has a character in four bytes. More is not looked at, so that any text fits into memory.
  const auto enough = [&] {
    return found >= corpus_.min_chars || head_.size() >= 4 * static_cast<std::size_t>(corpus_.min_chars);
  };
  if (!enough() && !last_) {
    head_copy_ = head_;
    while (!enough() && !last_) {
      const auto more = reader_->next();
      last_ = !more || more->last;
      if (more) head_copy_ += more->text;
      if (more) found += characters(more->text);
      head_ = head_copy_;
    }
  }
  has_head_ = enough() && !head_.empty();
  if (!has_head_) return false;
  ++chosen_;
  document_ = Checksum();
  return true;
}

std::optional<std::string_view> CorpusReader::piece() {
  if (ended()) return std::nullopt;
  std::string_view text = head_;
  if (!std::exchange(has_head_, false)) {
    const auto next = reader_->next();
    text = next ? next->text : std::string_view();
    last_ = !next || next->last;
  }
  document_.update(bytes_of(text));
  if (last_) {
    hash_ = document_.digest();
    texts_.update(std::as_bytes(std::span(&hash_, 1)));
    file_texts_.update(std::as_bytes(std::span(&hash_, 1)));
  }
  if (text.empty()) return std::nullopt;
  return text;
}

void CorpusReader::end_file() {
  const std::size_t file = file_hashes_.size();
  file_hashes_.push_back(file_texts_.digest());
  file_texts_ = Checksum();
  size_before_ += sizes_[file];
  reader_.reset();
  if (expected_ != nullptr && (file >= expected_->size() || (*expected_)[file] != file_hashes_.back()))
    throw ChangedInput(corpus_.files[file]);
}

double CorpusReader::fraction() const {
  if (total_size_ == 0) return 1;
  const std::uint64_t read = size_before_ + (reader_ ? reader_->bytes_read() : 0);
  return std::min(1.0, std::max(static_cast<double>(read) / static_cast<double>(total_size_),
                                static_cast<double>(chosen_) / static_cast<double>(corpus_.max_documents)));
}

bool ChunkReader::begin_document() {
  if (!corpus_.next()) return false;
  if (position_.documents == split_.documents()) throw ChangedInput(corpus_.file());
  buffer_.clear();
  begin_ = 0;
  inside_ = true;
  return true;
}

void ChunkReader::end_document() {
  inside_ = false;
  position_ = {position_.documents + 1, 0, corpus_.texts_hash()};
}

std::optional<ChunkReader::Chunk> ChunkReader::next() {
  if (!inside_ && !begin_document()) return std::nullopt;
  while (buffer_.size() - begin_ < 2 * size_ + kLookahead && !corpus_.ended()) {
    buffer_.erase(0, std::exchange(begin_, 0));
    if (const auto piece = corpus_.piece()) buffer_ += *piece;
  }
  const auto at = static_cast<std::uint64_t>(position_.bytes);
  const std::uint64_t train = split_.train_bytes_of(position_.documents);
  const bool held_out = at >= train;
  std::string_view part = std::string_view(buffer_).substr(begin_);
  if (!held_out) part = part.substr(0, train - at);  // to its end, if that is not there yet
  const bool whole = corpus_.ended() || (!held_out && part.size() == train - at);
  const std::string_view text = take_chunk(part, size_);
  const Chunk chunk{text, held_out, at != 0 && at != train, whole && part.empty()};
  begin_ += text.size();
  position_.bytes += static_cast<std::int64_t>(text.size());
  if (corpus_.ended() && begin_ == buffer_.size()) end_document();
  return chunk;
}

bool ChunkReader::skip_document() {
  if (!begin_document()) return false;
  while (corpus_.piece()) {
  }
  end_document();
  return true;
}

bool ChunkReader::skip_bytes(std::int64_t bytes) {
  if (bytes == 0) return true;
  if (!begin_document()) return false;
  for (auto rest = static_cast<std::size_t>(bytes); rest > 0;) {
    const auto piece = corpus_.piece();
    if (!piece) return false;
    const std::size_t part = std::min(rest, piece->size());
    buffer_ = piece->substr(part);
    rest -= part;
  }
  position_.bytes = bytes;
  return !(buffer_.empty() && corpus_.ended());
}

TailFinder::TailFinder(std::uint64_t size, double fraction)
    : wanted_(static_cast<std::uint64_t>(static_cast<double>(size) * (1 - fraction))),
      last_(wanted_ + (size - wanted_) / 2),
      size_(size) {}

void TailFinder::read(std::string_view piece) {
  if (at_ + piece.size() <= wanted_) {
    at_ += piece.size();
    return;
  }
  for (const char byte : piece) {
    const std::uint64_t end = ++at_;
    if (end <= wanted_) continue;
    if (!continues_character(byte)) character_ = std::min(character_, end - 1);
    if (end > last_) continue;
    // A pair must lie behind the wanted place as a whole.
    if (byte == '\n' && before_ == '\n') paragraph_ = std::min(paragraph_, end);
    if (byte == '\n') line_ = std::min(line_, end);
    if (byte == ' ' && before_ == '.') sentence_ = std::min(sentence_, end);
    if (byte == ' ') word_ = std::min(word_, end);
    before_ = byte;
  }
}

std::uint64_t TailFinder::start() const {
  for (const std::uint64_t place : {paragraph_, line_, sentence_, word_, character_})
    if (place != UINT64_MAX) return place;
  return size_;
}

}  // namespace flashlm
