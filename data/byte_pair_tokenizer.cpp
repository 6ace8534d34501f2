// SPDX-License-Identifier: Apache-2.0
// Three readers that all end in make(), the split by PCRE2 with a short cut for ASCII, and the merging with a
// heap: O(n log n) for a piece of n bytes, however long.
#include "data/byte_pair_tokenizer.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_map>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "data/error.h"
#include "data/text.h"
#include "data/word_cache.h"

namespace flashlm {
namespace {

constexpr std::string_view kEndOfText = "<|endoftext|>";

// --- The split.

// PCRE2 10.42 knows Unicode 14.0; tiktoken 0.14 and tokenizers 0.23, which agree on every code point,
// know 16.0. These are the letters and numbers that came in between. All code points are compared in
// tests/data.
constexpr const char* kNewLetters =
    R"(\x{1C89}\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}\x{105C0}-\x{105F3}\x{10D4A}-\x{10D65})"
    R"(\x{10D6F}-\x{10D85}\x{10EC2}-\x{10EC4}\x{1123F}\x{11240}\x{11380}-\x{11389}\x{1138B}\x{1138E})"
    R"(\x{11390}-\x{113B5}\x{113B7}\x{113D1}\x{113D3}\x{11BC0}-\x{11BE0}\x{11F02}\x{11F04}-\x{11F10})"
    R"(\x{11F12}-\x{11F33}\x{1342F}\x{13441}-\x{13446}\x{13460}-\x{143FA}\x{16100}-\x{1611D})"
    R"(\x{16D40}-\x{16D6C}\x{18CFF}\x{1B132}\x{1B155}\x{1DF25}-\x{1DF2A}\x{1E030}-\x{1E06D})"
    R"(\x{1E4D0}-\x{1E4EB}\x{1E5D0}-\x{1E5ED}\x{1E5F0}\x{2B739}\x{2EBF0}-\x{2EE5D}\x{31350}-\x{323AF})";
constexpr const char* kNewNumbers =
    R"(\x{10D40}-\x{10D49}\x{116D0}-\x{116E3}\x{11BF0}-\x{11BF9}\x{11F50}-\x{11F59}\x{16130}-\x{16139})"
    R"(\x{16D70}-\x{16D79}\x{1CCF0}-\x{1CCF9}\x{1D2C0}-\x{1D2D3}\x{1E4F0}-\x{1E4F9}\x{1E5F1}-\x{1E5FA})";
// Unicode's White_Space: PCRE2's \s has U+180E besides.
constexpr const char* kSpaces =
    R"(\x09-\x0D\x20\x85\xA0\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";

/// GPT-2's pattern, with possessive repeats where nothing follows that could need less.
std::string pattern_text() {
  const std::string letters = std::string("\\p{L}") + kNewLetters;
  const std::string numbers = std::string("\\p{N}") + kNewNumbers;
  const std::string spaces = kSpaces;
  std::string text = "'(?:[sdmt]|ll|ve|re)";
  for (const std::string& characters : {letters, numbers, "^" + spaces + letters + numbers})
    text.append("| ?[").append(characters).append("]++");
  return text + "|[" + spaces + "]+(?![^" + spaces + "])|[" + spaces + "]+";
}

class Pattern {
 public:
  static const Pattern& get() {
    static const Pattern pattern;
    return pattern;
  }
  const pcre2_code* code() const { return code_.get(); }

 private:
  Pattern() {
    int error = 0;
    std::size_t at = 0;
    const std::string text = pattern_text();
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &error, &at, nullptr));
    if (!code_)
      throw Error("PCRE2 does not take GPT-2's pattern: it lacks Unicode; install another build of it");
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // where there is no JIT, matching is only slower
  }

  struct Free {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  };
  std::unique_ptr<pcre2_code, Free> code_;
};

enum Kind : std::uint8_t { kLetter, kNumber, kSpace, kOther, kBeyondAscii, kEnd };

constexpr std::array<Kind, 256> kKinds = [] {
  std::array<Kind, 256> kinds{};
  for (int c = 0; c < 256; ++c)
    kinds[c] = c >= 0x80                                          ? kBeyondAscii
               : (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ? kLetter
               : c >= '0' && c <= '9'                             ? kNumber
               : c == ' ' || (c >= '\t' && c <= '\r')             ? kSpace
                                                                  : kOther;
  return kinds;
}();

/// Length of the piece that `text` begins with, where ASCII alone decides it; else 0.
std::size_t ascii_piece(std::string_view text) {
  const auto kind = [text](std::size_t i) {
    return i < text.size() ? kKinds[static_cast<unsigned char>(text[i])] : kEnd;
  };
  if (text[0] == '\'' && text.size() > 1) {
    if (text[1] == 's' || text[1] == 'd' || text[1] == 'm' || text[1] == 't') return 2;
    const std::string_view two = text.substr(1, 2);
    if (two == "ll" || two == "ve" || two == "re") return 3;
  }
  const std::size_t space = text[0] == ' ';
  if (const Kind first = kind(space); first == kLetter || first == kNumber || first == kOther) {
    std::size_t end = space + 1;
    while (kind(end) == first) ++end;
    return kind(end) == kBeyondAscii ? 0 : end;
  } else if (first == kBeyondAscii) {
    return 0;
  }
  std::size_t end = 1;
  while (kind(end) == kSpace) ++end;
  if (kind(end) == kBeyondAscii) return 0;
  return kind(end) == kEnd || end == 1 ? end : end - 1;  // the last space belongs to what follows
}

/// Cuts a text into pieces from front to back.
class Splitter {
 public:
  explicit Splitter(std::string_view text) : text_(text), valid_(text) {
    for (std::size_t i = 0; i < text.size();) {
      const std::size_t length = utf8_length(text.substr(i));
      if (length == 0) {
        if (masked_.empty()) masked_ = text;
        masked_[i] = kMask;
      }
      i += std::max<std::size_t>(length, 1);
    }
    if (!masked_.empty()) valid_ = masked_;
  }

  bool done() const { return start_ == text_.size(); }
  std::string_view next() {
    std::size_t length = ascii_piece(valid_.substr(start_));
    if (length == 0) length = match();
    start_ += length;
    return text_.substr(start_ - length, length);
  }

 private:
  // U+0001 is, as U+FFFD, neither letter nor number nor space, and as long as the byte in whose place it
  // stands.
  static constexpr char kMask = 1;

  std::size_t match() {
    if (!match_) match_.reset(pcre2_match_data_create(1, nullptr));
    const int found = pcre2_match(Pattern::get().code(), reinterpret_cast<PCRE2_SPTR>(valid_.data()),
                                  valid_.size(), start_, PCRE2_NO_UTF_CHECK, match_.get(), nullptr);
    if (found < 1)
      throw Error("PCRE2 cannot split the text: its error " + std::to_string(found) + ", see pcre2api(3)");
    return pcre2_get_ovector_pointer(match_.get())[1] - start_;
  }

  struct Free {
    void operator()(pcre2_match_data* match) const { pcre2_match_data_free(match); }
  };

  std::string_view text_;
  std::string masked_;      // text_ with a mask for each byte that is not UTF-8; empty if there is none
  std::string_view valid_;  // what is matched: text_ or masked_
  std::size_t start_ = 0;
  std::unique_ptr<pcre2_match_data, Free> match_;
};

// --- The merges.

/// The pairs of tokens that become one, by rank: the earlier a merge was learnt, the sooner it is made.
class Merges {
 public:
  static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();
  struct Merge {
    std::int32_t left, right, result;
  };

  explicit Merges(std::size_t count) {
    std::size_t slots = 2;
    while (slots < 2 * count) slots *= 2;
    slots_.assign(slots, Slot{0, 0, kNone});
    merges_.reserve(count);
  }

  /// False if the pair has a merge already.
  bool add(const Merge& merge) {
    Slot& slot = slots_[find(merge.left, merge.right)];
    if (slot.rank != kNone) return false;
    slot = {merge.left, merge.right, static_cast<std::uint32_t>(merges_.size())};
    merges_.push_back(merge);
    return true;
  }
  std::uint32_t rank(std::int32_t left, std::int32_t right) const { return slots_[find(left, right)].rank; }
  const std::vector<Merge>& by_rank() const { return merges_; }

 private:
  struct Slot {
    std::int32_t left, right;
    std::uint32_t rank;
  };

  std::size_t find(std::int32_t left, std::int32_t right) const {
    const std::uint64_t pair = static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint32_t>(right);
    std::size_t i =
        (pair * 0x9E3779B97F4A7C15U >> 32) % slots_.size();  // by the golden ratio: high bits mix best
    while (slots_[i].rank != kNone && (slots_[i].left != left || slots_[i].right != right))
      i = (i + 1) % slots_.size();
    return i;
  }

  std::vector<Slot> slots_;  // open addressing, at most half full
  std::vector<Merge> merges_;
};

using ByteIds = std::array<std::int32_t, 256>;

/// Memory for merging, kept from piece to piece.
class Merger {
 public:
  /// Appends the ids of a piece. Of equal pairs the first is merged first.
  void append(std::string_view piece, const ByteIds& bytes, const Merges& merges,
              std::vector<std::int32_t>& ids) {
    if (piece.size() <= kShort) return append_short(piece, bytes, merges, ids);
    if (piece.size() >= kNowhere) throw Error("a run of 4 GiB of text without a break cannot be encoded");
    const auto size = static_cast<std::uint32_t>(piece.size());
    tokens_.resize(size);
    for (std::uint32_t i = 0; i < size; ++i)
      tokens_[i] = {bytes[static_cast<unsigned char>(piece[i])], Merges::kNone, i - 1, i + 1};
    queue_.clear();
    for (std::uint32_t i = 0; i + 1 < size; ++i)
      if (rate(i, merges)) queue_.push_back(key(i));
    std::make_heap(queue_.begin(), queue_.end(), std::greater());
    while (!queue_.empty()) {
      std::pop_heap(queue_.begin(), queue_.end(), std::greater());
      const auto rank = static_cast<std::uint32_t>(queue_.back() >> 32);
      const auto left = static_cast<std::uint32_t>(queue_.back());
      queue_.pop_back();
      if (tokens_[left].rank != rank) continue;  // the pair has changed since
      merge(left, merges.by_rank()[rank].result);
      for (const std::uint32_t i : {tokens_[left].previous, left})
        if (i < size && rate(i, merges)) {
          queue_.push_back(key(i));
          std::push_heap(queue_.begin(), queue_.end(), std::greater());
        }
    }
    for (std::uint32_t i = 0; i < size; i = tokens_[i].next) ids.push_back(tokens_[i].id);
  }

 private:
  static constexpr std::size_t kShort = 32;

  /// The same by looking for the least rank each time: n^2, but faster than the heap where n is small.
  static void append_short(std::string_view piece, const ByteIds& bytes, const Merges& merges,
                           std::vector<std::int32_t>& ids) {
    std::array<std::int32_t, kShort + 1> tokens;
    std::array<std::uint32_t, kShort + 1> ranks;  // of the pairs (i, i + 1)
    std::size_t size = piece.size();
    for (std::size_t i = 0; i < size; ++i) tokens[i] = bytes[static_cast<unsigned char>(piece[i])];
    for (std::size_t i = 0; i + 1 < size; ++i) ranks[i] = merges.rank(tokens[i], tokens[i + 1]);
    while (size > 1) {
      const auto least = std::min_element(ranks.begin(), ranks.begin() + size - 1);
      if (*least == Merges::kNone) break;
      const auto i = static_cast<std::size_t>(least - ranks.begin());
      tokens[i] = merges.by_rank()[*least].result;
      std::copy(tokens.begin() + i + 2, tokens.begin() + size, tokens.begin() + i + 1);
      std::copy(ranks.begin() + i + 1, ranks.begin() + size - 1, ranks.begin() + i);
      --size;
      if (i > 0) ranks[i - 1] = merges.rank(tokens[i - 1], tokens[i]);
      if (i + 1 < size) ranks[i] = merges.rank(tokens[i], tokens[i + 1]);
    }
    ids.insert(ids.end(), tokens.begin(), tokens.begin() + size);
  }

  static constexpr std::uint32_t kNowhere = std::numeric_limits<std::uint32_t>::max();
  struct Token {
    std::int32_t id;
    std::uint32_t rank;            // of its merge with the next; kNone too when it has become part of another
    std::uint32_t previous, next;  // kNowhere before the first; the piece's size behind the last
  };

  std::uint64_t key(std::uint32_t i) const { return std::uint64_t{tokens_[i].rank} << 32 | i; }

  /// Sets the rank of the pair that begins at i; whether it has one.
  bool rate(std::uint32_t i, const Merges& merges) {
    Token& token = tokens_[i];
    token.rank = token.next < tokens_.size() ? merges.rank(token.id, tokens_[token.next].id) : Merges::kNone;
    return token.rank != Merges::kNone;
  }

  void merge(std::uint32_t left, std::int32_t result) {
    Token& token = tokens_[left];
    Token& right = tokens_[token.next];
    token.id = result;
    right.rank = Merges::kNone;
    token.next = right.next;
    if (right.next < tokens_.size()) tokens_[right.next].previous = left;
  }

  std::vector<Token> tokens_;  // one for each byte; merged ones stay, out of the list
  std::vector<std::uint64_t> queue_;
};

// --- Names: GPT-2's files write a token with a printable character for each of its bytes.

std::string utf8(std::uint32_t c) {  // up to U+07FF
  if (c < 0x80) return {static_cast<char>(c)};
  return {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
}

/// Printable Latin-1 stands for itself; the 68 other bytes are U+0100 and following, in their order.
const std::array<std::string, 256>& byte_names() {
  static const std::array<std::string, 256> names = [] {
    std::array<std::string, 256> all;
    std::uint32_t beyond = 0x100;
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      const bool itself = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
      all[byte] = utf8(itself ? byte : beyond++);
    }
    return all;
  }();
  return names;
}

std::string name_of(std::string_view text) {
  std::string name;
  for (const char c : text) name += byte_names()[static_cast<unsigned char>(c)];
  return name;
}

/// The bytes of a name; none if it has a character that stands for no byte.
std::optional<std::string> text_of(std::string_view name) {
  static const std::unordered_map<std::string_view, char> bytes = [] {
    std::unordered_map<std::string_view, char> all;
    for (int byte = 0; byte < 256; ++byte) all[byte_names()[byte]] = static_cast<char>(byte);
    return all;
  }();
  std::string text;
  while (!name.empty()) {
    const std::size_t length = std::max<std::size_t>(utf8_length(name), 1);
    const auto found = bytes.find(name.substr(0, length));
    if (found == bytes.end()) return std::nullopt;
    text += found->second;
    name.remove_prefix(length);
  }
  return text;
}

// --- The vocabulary.

struct Vocabulary {
  std::vector<std::string> texts;               // by id; "" for control tokens
  std::map<std::int32_t, std::string> control;  // their names
  std::int32_t end_of_text;
  ByteIds bytes;
  Merges merges;
};

/// One form for all sources: a tokenizer.json with ids and merges in order, so that equal vocabularies have
/// equal fingerprints. Merges are strings, which old and new versions of tokenizers read.
std::string serialize(const Vocabulary& vocabulary) {
  const auto quoted = [](const std::string& text) { return nlohmann::json(text).dump(); };
  std::string json = R"({"version":"1.0","truncation":null,"padding":null,"added_tokens":[)";
  for (const auto& [id, name] : vocabulary.control) {
    if (json.back() != '[') json += ',';
    json += R"({"id":)" + std::to_string(id) + R"(,"content":)" + quoted(name) +
            R"(,"single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true})";
  }
  const std::string byte_level =
      R"({"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true})";
  json +=
      R"(],"normalizer":null,"pre_tokenizer":)" + byte_level + R"(,"post_processor":null,"decoder":)" +
      byte_level +
      R"(,"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,)" +
      R"("end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":{)";
  std::vector<std::string> names;
  for (std::size_t id = 0; id < vocabulary.texts.size(); ++id) {
    const auto control = vocabulary.control.find(static_cast<std::int32_t>(id));
    names.push_back(control != vocabulary.control.end() ? control->second : name_of(vocabulary.texts[id]));
    json += (id > 0 ? "," : "") + quoted(names.back()) + ':' + std::to_string(id);
  }
  json += R"(},"merges":[)";
  for (const Merges::Merge& merge : vocabulary.merges.by_rank()) {
    if (json.back() != '[') json += ',';
    json += quoted(names[merge.left] + ' ' + names[merge.right]);
  }
  return json + "]}}\n";
}

class BytePair : public Tokenizer {
 public:
  explicit BytePair(Vocabulary vocabulary)
      : Tokenizer(serialize(vocabulary)),
        vocabulary_(std::make_shared<const Vocabulary>(std::move(vocabulary))) {}

  std::unique_ptr<Tokenizer> clone() const override {
    return std::unique_ptr<Tokenizer>(new BytePair(*this, vocabulary_));
  }
  std::int64_t vocab_size() const override { return static_cast<std::int64_t>(vocabulary_->texts.size()); }
  const std::string& token_text(std::int32_t id) const override { return vocabulary_->texts[checked(id)]; }
  std::int32_t end_of_text() const override { return vocabulary_->end_of_text; }

  std::vector<std::int32_t> encode(std::string_view text, bool /*continued*/) const override {
    std::vector<std::int32_t> ids;
    ids.reserve(text.size() / 4);
    std::array<WordCache::Key, 16> pieces;
    for (Splitter splitter(text); !splitter.done();) {
      std::size_t count = 0;
      while (count < pieces.size() && !splitter.done()) pieces[count++] = cache_.prepare(splitter.next());
      for (const WordCache::Key& piece : std::span(pieces).first(count)) append(piece, ids);
    }
    return ids;
  }

 private:
  BytePair(const BytePair& other, std::shared_ptr<const Vocabulary> vocabulary)
      : Tokenizer(other), vocabulary_(std::move(vocabulary)) {}

  void append(const WordCache::Key& piece, std::vector<std::int32_t>& ids) const {
    if (const std::span<const std::int32_t> known = cache_.find(piece); !known.empty()) {
      for (const std::int32_t id : known) ids.push_back(id);  // one or two: quicker than insert()
      return;
    }
    const std::size_t before = ids.size();
    merger_.append(piece.word, vocabulary_->bytes, vocabulary_->merges, ids);
    cache_.insert(piece, std::span(ids).subspan(before));
  }

  std::shared_ptr<const Vocabulary> vocabulary_;
  mutable WordCache cache_;
  mutable Merger merger_;
};

// --- From the files.

/// What all three kinds of files say. Tokens are byte strings.
struct Source {
  std::string name;  // for messages
  std::vector<std::pair<std::string, std::int64_t>> tokens;
  std::vector<std::pair<std::string, std::string>> merges;
  std::map<std::int64_t, std::string> control;
  std::int64_t end_of_text = -1;
};

class Builder {
 public:
  explicit Builder(const Source& source) : source_(source) {}

  std::unique_ptr<Tokenizer> build() {
    Vocabulary vocabulary{
        list_texts(), {}, static_cast<std::int32_t>(source_.end_of_text), {}, Merges(source_.merges.size())};
    for (const auto& [id, name] : source_.control) vocabulary.control[static_cast<std::int32_t>(id)] = name;
    for (int byte = 0; byte < 256; ++byte) {
      const auto found = ids_.find(std::string(1, static_cast<char>(byte)));
      if (found == ids_.end()) fail("has no token for the byte " + std::to_string(byte));
      vocabulary.bytes[byte] = found->second;
    }
    add_merges(vocabulary);
    return std::make_unique<BytePair>(std::move(vocabulary));
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(source_.name + " " + what + "; it is damaged, get it anew");
  }

  std::vector<std::string> list_texts() {
    const std::size_t size = source_.tokens.size() + source_.control.size();
    std::vector<std::string> texts(size);
    std::vector<bool> taken(size);
    const auto take = [&](std::int64_t id) {
      if (id < 0 || id >= static_cast<std::int64_t>(size))
        fail("has " + std::to_string(size) + " tokens, but one with the id " + std::to_string(id));
      if (taken[static_cast<std::size_t>(id)]) fail("has two tokens of the id " + std::to_string(id));
      taken[static_cast<std::size_t>(id)] = true;
    };
    for (const auto& [text, id] : source_.tokens) {
      take(id);
      texts[static_cast<std::size_t>(id)] = text;
      if (text.empty()) fail("has an empty token, of the id " + std::to_string(id));
      if (!ids_.emplace(text, static_cast<std::int32_t>(id)).second)
        fail("has the token '" + name_of(text) + "' twice");
    }
    for (const auto& [id, name] : source_.control) take(id);
    return texts;
  }

  void add_merges(Vocabulary& vocabulary) const {
    std::vector<bool> made(vocabulary.texts.size());
    for (const auto& [left, right] : source_.merges) {
      const auto id = [&](const std::string& part) {
        const auto found = ids_.find(part);
        if (found == ids_.end())
          fail("merges '" + name_of(left) + "' and '" + name_of(right) + "', but has no token '" +
               name_of(part) + "'");
        return found->second;
      };
      const std::int32_t result = id(left + right);
      made[static_cast<std::size_t>(result)] = true;
      if (!vocabulary.merges.add({id(left), id(right), result}))
        fail("merges '" + name_of(left) + "' and '" + name_of(right) + "' twice");
    }
    for (std::size_t id = 0; id < made.size(); ++id)
      if (vocabulary.texts[id].size() > 1 && !made[id])
        fail("has no merge that makes its token '" + name_of(vocabulary.texts[id]) + "', id " +
             std::to_string(id));
  }

  const Source& source_;
  std::unordered_map<std::string, std::int32_t> ids_;
};

/// The bytes of a name in a file.
std::string read_name(const Source& source, std::string_view name) {
  if (auto text = text_of(name)) return *text;
  throw Error(source.name + " has '" + std::string(name) +
              "', which is not written in GPT-2's characters for bytes;" + " only byte-level BPE is known");
}

/// Splits "LEFT RIGHT".
std::pair<std::string, std::string> read_merge(const Source& source, std::string_view merge) {
  const std::size_t space = std::min(merge.find(' '), merge.size());
  if (space == 0 || space + 1 >= merge.size() || merge.find(' ', space + 1) != std::string_view::npos)
    throw Error(source.name + " has the merge '" + std::string(merge) +
                "', which is not two tokens with a space between; it is damaged, get it anew");
  return {read_name(source, merge.substr(0, space)), read_name(source, merge.substr(space + 1))};
}

void read_vocabulary(Source& source, const nlohmann::json& vocabulary) {
  for (const auto& [name, id] : vocabulary.items())
    if (!source.control.contains(id.get<std::int64_t>()))
      source.tokens.emplace_back(read_name(source, name), id.get<std::int64_t>());
}

/// Runs `read` over parsed JSON: what has not the form that it looks for is damaged.
template <typename Read>
void read_json(const std::string& name, const char* kind, std::string_view json, Read&& read) {
  try {
    read(nlohmann::json::parse(json));
  } catch (const nlohmann::json::exception&) {
    throw Error(name + " is not " + kind + ", or is damaged; get it anew");
  }
}

/// Refuses what would make other ids than we do.
void check_settings(const std::string& name, const nlohmann::json& json) {
  const auto refuse = [&](const std::string& what) {
    throw Error(name + " " + what + ", which is not built in; only byte-level BPE as GPT-2's is");
  };
  const auto missing = [](const nlohmann::json& object, const char* key) {
    return !object.contains(key) || object.at(key).is_null();
  };
  const nlohmann::json& model = json.at("model");
  if (const std::string type = model.value("type", "BPE"); type != "BPE")
    refuse("has a model of type " + type);
  if (!missing(json, "normalizer"))
    refuse("has a normalizer (" + json.at("normalizer").value("type", "unknown") + ")");
  if (missing(json, "pre_tokenizer")) refuse("has no pre_tokenizer");
  const nlohmann::json& split = json.at("pre_tokenizer");
  if (const std::string type = split.value("type", "unknown"); type != "ByteLevel")
    refuse("has a pre_tokenizer of type " + type);
  if (split.value("add_prefix_space", true)) refuse("puts a space in front of text (add_prefix_space)");
  if (!split.value("use_regex", true)) refuse("does not split text (use_regex is false)");
  if (!missing(model, "dropout") && model.at("dropout") != 0) refuse("leaves out merges at random (dropout)");
  if (model.value("ignore_merges", false)) refuse("ignores merges (ignore_merges)");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!missing(model, key) && model.at(key) != "") refuse(std::string("has a ") + key);
}

/// tiktoken's ids tell the order of the merges, but not of which two tokens one is made: they are what the
/// merges before it leave of its bytes. Training made it of those two, and in text that is as far no others
/// are met.
void find_merges(Source& source) {
  std::unordered_map<std::string_view, std::int32_t> ids;
  ByteIds bytes{};
  for (const auto& [text, id] : source.tokens) {
    ids[text] = static_cast<std::int32_t>(id);
    if (text.size() == 1) bytes[static_cast<unsigned char>(text[0])] = static_cast<std::int32_t>(id);
  }
  Merges merges(source.tokens.size());
  Merger merger;
  std::vector<std::int32_t> parts;
  for (const auto& [text, id] : source.tokens) {
    if (text.size() < 2) continue;
    parts.clear();
    merger.append(text, bytes, merges, parts);
    if (parts.size() != 2)
      throw Error(source.name + " lacks a token of which '" + name_of(text) + "', rank " +
                  std::to_string(id) + ", is made; it is damaged, get it anew");
    merges.add({parts[0], parts[1], static_cast<std::int32_t>(id)});
    const std::string& left = source.tokens[static_cast<std::size_t>(parts[0])].first;
    source.merges.emplace_back(left, text.substr(left.size()));
  }
}

std::optional<std::string> from_base64(std::string_view code) {
  constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  if (code.empty() || code.size() % 4 != 0) return std::nullopt;
  for (int padding = 0; padding < 2 && code.ends_with('='); ++padding) code.remove_suffix(1);
  std::string text;
  std::uint32_t bits = 0;
  for (std::size_t i = 0; i < code.size(); ++i) {
    const std::size_t digit = digits.find(code[i]);
    if (digit == std::string_view::npos) return std::nullopt;
    bits = bits << 6 | static_cast<std::uint32_t>(digit);
    if (i % 4 != 0) text += static_cast<char>(bits >> (6 - 2 * (i % 4)));
  }
  return text;
}

/// "BASE64 RANK"
std::optional<std::pair<std::string, std::int64_t>> read_rank(std::string_view line) {
  const std::size_t space = std::min(line.find(' '), line.size());
  const auto text = from_base64(line.substr(0, space));
  std::int64_t rank = 0;
  const auto [end, error] =
      std::from_chars(line.data() + std::min(space + 1, line.size()), line.data() + line.size(), rank);
  if (!text || error != std::errc() || end != line.data() + line.size()) return std::nullopt;
  return std::pair(*text, rank);
}

/// Removes the first line from `rest` and returns it, without its end.
std::string_view take_line(std::string_view& rest) {
  const std::size_t end = std::min(rest.find('\n'), rest.size());
  std::string_view line = rest.substr(0, end);
  rest.remove_prefix(std::min(end + 1, rest.size()));
  if (line.ends_with('\r')) line.remove_suffix(1);
  return line;
}

}  // namespace

std::vector<std::string_view> gpt2_split(std::string_view text) {
  std::vector<std::string_view> pieces;
  for (Splitter splitter(text); !splitter.done();) pieces.push_back(splitter.next());
  return pieces;
}

std::unique_ptr<Tokenizer> byte_pair_from_gpt2(std::string_view encoder_json, std::string_view vocab_bpe,
                                               const std::string& name) {
  Source source{name, {}, {}, {}};
  read_json(name + "/encoder.json", "GPT-2's list of tokens", encoder_json, [&](const nlohmann::json& json) {
    if (!json.contains(kEndOfText))
      throw Error(name + "/encoder.json has no token <|endoftext|> to put between documents");
    source.end_of_text = json.at(kEndOfText).get<std::int64_t>();
    source.control[source.end_of_text] = kEndOfText;
    read_vocabulary(source, json);
  });
  if (vocab_bpe.starts_with("#version")) take_line(vocab_bpe);
  while (!vocab_bpe.empty())
    if (const std::string_view line = take_line(vocab_bpe); !line.empty())
      source.merges.push_back(read_merge(source, line));
  return Builder(source).build();
}

std::unique_ptr<Tokenizer> byte_pair_from_json(std::string_view json, const std::string& name) {
  Source source{name, {}, {}, {}};
  read_json(name, "a tokenizer.json of Hugging Face's tokenizers", json, [&](const nlohmann::json& parsed) {
    check_settings(name, parsed);
    for (const nlohmann::json& token : parsed.value("added_tokens", nlohmann::json::array())) {
      const std::string content = token.at("content");
      if (!token.value("special", false))
        throw Error(name + " has the added token '" + content +
                    "', which is to be found in text before the split; only special ones are known");
      const auto id = token.at("id").get<std::int64_t>();
      source.control[id] = content;
      if (content == kEndOfText || source.end_of_text < 0) source.end_of_text = id;
    }
    if (source.control.empty() ||
        (source.control.size() > 1 && source.control[source.end_of_text] != kEndOfText))
      throw Error(name + " has no special token <|endoftext|>, nor only one, to put between documents");
    read_vocabulary(source, parsed.at("model").at("vocab"));
    for (const nlohmann::json& merge : parsed.at("model").at("merges"))
      source.merges.push_back(merge.is_string()
                                  ? read_merge(source, merge.get<std::string>())
                                  : std::pair(read_name(source, merge.at(0).get<std::string>()),
                                              read_name(source, merge.at(1).get<std::string>())));
  });
  return Builder(source).build();
}

std::unique_ptr<Tokenizer> byte_pair_from_ranks(std::string_view ranks, const std::string& name) {
  Source source{name, {}, {}, {}};
  for (std::int64_t number = 1; !ranks.empty(); ++number) {
    const std::string_view line = take_line(ranks);
    if (line.empty()) continue;
    auto token = read_rank(line);
    if (!token)
      throw Error(name + ", line " + std::to_string(number) + ": '" + std::string(line) +
                  "' is not a token in base64 and its rank; it is damaged, get it anew");
    if (token->second != static_cast<std::int64_t>(source.tokens.size()))
      throw Error(name + ", line " + std::to_string(number) + ": rank " +
                  std::to_string(source.tokens.size()) + " is missing; it is damaged, get it anew");
    const std::string& text = token->first;
    if (valid_utf8(text) == text && gpt2_split(text).size() > 1)
      throw Error(name + " has the token '" + name_of(text) +
                  "', which GPT-2's pattern would cut: it is for another pattern, and only GPT-2's is known");
    source.tokens.push_back(std::move(*token));
  }
  find_merges(source);
  source.end_of_text = static_cast<std::int64_t>(source.tokens.size());
  source.control[source.end_of_text] = kEndOfText;
  return Builder(source).build();
}

bool looks_like_ranks(std::string_view content) { return read_rank(take_line(content)).has_value(); }

}  // namespace flashlm
