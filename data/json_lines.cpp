// SPDX-License-Identifier: Apache-2.0
// A parser that goes through a line once and keeps nothing of it but the piece it hands out. A parser that
// builds values would hold a long text several times over.
#include "data/json_lines.h"

#include <algorithm>
#include <array>
#include <vector>

#include "data/byte_stream.h"
#include "data/file.h"
#include "data/text.h"

namespace flashlm {
namespace {

constexpr std::size_t kWindowBytes = 1 << 18;
constexpr std::size_t kCharacterBytes = 4;  // at most, in UTF-8
constexpr std::size_t kDeepest = 1000;
constexpr int kEnd = -1;

/// Bytes that stand for themselves inside a string: ASCII but '"', '\' and control characters.
constexpr std::array<bool, 256> kPlain = [] {
  std::array<bool, 256> plain{};
  for (int c = 0x20; c < 0x80; ++c) plain[static_cast<std::size_t>(c)] = c != '"' && c != '\\';
  return plain;
}();

bool is_digit(int c) { return c >= '0' && c <= '9'; }

class JsonLines final : public DocumentReader {
 public:
  JsonLines(const std::filesystem::path& file, const std::string& field)
      : file_(file), field_(field), stream_(open_bytes(file)), window_(kWindowBytes) {}

  std::optional<Piece> next() override {
    if (!inside_text_) {
      if (!begin_line()) return std::nullopt;
      if (!find_text()) return Piece{{}, true};
    }
    piece_.clear();
    inside_text_ = !read_string(piece_);
    if (!inside_text_) find_text();  // checks the rest of the line
    return Piece{piece_, !inside_text_};
  }

  std::uint64_t bytes_read() const override { return stream_->bytes_read(); }

 private:
  // ---- Bytes ----

  int peek() {
    if (at_ == end_ && !refill()) return kEnd;
    return static_cast<unsigned char>(*at_);
  }

  int take() {
    const int c = peek();
    if (c != kEnd) ++at_;
    return c;
  }

  bool refill() {
    before_window_ += static_cast<std::uint64_t>(end_ - window_.data());
    at_ = window_.data();
    end_ = at_ + stream_->read(window_);
    return at_ != end_;
  }

  std::uint64_t position() const { return before_window_ + static_cast<std::uint64_t>(at_ - window_.data()); }

  // ---- Lines ----

  /// Goes to the next line that is not blank.
  bool begin_line() {
    if (position() == 0 && peek() == 0xEF) {  // a byte order mark, which some programs write
      std::string mark;
      read_character(mark);
      if (mark != "\xEF\xBB\xBF") fail_json("'{'", 0xEF);
    }
    while (skip_spaces() == '\n') {
      take();
      ++line_;
      line_start_ = position();
    }
    if (peek() == kEnd) return false;
    expect('{');
    first_key_ = true;
    found_ = false;
    return true;
  }

  /// Goes on in the line's object: to the first character of the field's string (true), or to the end of the
  /// line.
  bool find_text() {
    for (;; first_key_ = false) {
      int c = take_token();
      if (c == '}') break;
      if (!first_key_) {
        if (c != ',') fail_json("',' or '}'", c);
        c = take_token();
      }
      if (!take_key(c)) {
        skip_value();
        continue;
      }
      if (found_) fail("has the field '" + field_ + "' twice");
      found_ = true;
      c = take_token();
      if (c == '"') {
        first_key_ = false;
        return true;
      }
      if (c == '{' || c == '[' || c == 't' || c == 'f' || c == '-' || is_digit(c))
        fail("has a field '" + field_ + "' that is not a string; --text-field names another");
      if (c != 'n') fail_json("a string", c);
      skip_literal("null");
    }
    if (const int c = skip_spaces(); c != '\n' && c != kEnd) fail_json("the end of the line", take());
    if (!found_) fail("has no field '" + field_ + "'; --text-field names the one with the text");
    return false;
  }

  // ---- JSON ----

  int skip_spaces() {
    int c = peek();
    while (c == ' ' || c == '\t' || c == '\r') {
      ++at_;
      c = peek();
    }
    return c;
  }

  int take_token() {
    skip_spaces();
    return take();
  }

  void expect(char wanted) {
    if (const int c = take_token(); c != wanted) fail_json(std::string("'") + wanted + "'", c);
  }

  /// The key that begins with `c`, and its colon. Whether it is the field's.
  bool take_key(int c) {
    if (c != '"') fail_json("a key", c);
    skipped_.clear();
    const bool whole = read_string(skipped_);
    const bool is_field = whole && skipped_ == field_;
    if (!whole) skip_string();
    expect(':');
    return is_field;
  }

  void skip_string() {
    do skipped_.clear();
    while (!read_string(skipped_));
  }

  void skip_value() {
    std::string open;  // the brackets around what is being read
    for (;;) {
      const int c = take_token();
      if (c == '{' || c == '[') {
        if (open.size() == kDeepest) fail("nests more than " + std::to_string(kDeepest) + " brackets");
        open.push_back(static_cast<char>(c));
        if (skip_spaces() != closing(open)) {
          if (c == '{') take_key(take_token());
          continue;
        }
      } else {
        skip_scalar(c);
      }
      // A value is over, and with it every bracket that closes here.
      while (!open.empty()) {
        const int next = take_token();
        if (next == ',') break;
        if (next != closing(open)) fail_json(std::string("',' or '") + closing(open) + "'", next);
        open.pop_back();
      }
      if (open.empty()) return;
      if (open.back() == '{') take_key(take_token());
    }
  }

  static char closing(const std::string& open) { return open.back() == '{' ? '}' : ']'; }

  void skip_scalar(int c) {
    if (c == '"')
      skip_string();
    else if (c == 't')
      skip_literal("true");
    else if (c == 'f')
      skip_literal("false");
    else if (c == 'n')
      skip_literal("null");
    else if (c == '-' || is_digit(c))
      skip_number(c);
    else
      fail_json("a value", c);
  }

  void skip_literal(std::string_view word) {
    for (const char letter : word.substr(1))
      if (const int c = take(); c != letter) fail_json(std::string(word), c);
  }

  void skip_number(int c) {
    if (c == '-') c = take();
    if (!is_digit(c)) fail_json("a digit", c);
    if (c != '0')
      while (is_digit(peek())) take();
    if (peek() == '.') {
      take();
      skip_digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      take();
      if (peek() == '+' || peek() == '-') take();
      skip_digits();
    }
  }

  void skip_digits() {
    if (const int c = take(); !is_digit(c)) fail_json("a digit", c);
    while (is_digit(peek())) take();
  }

  /// Appends the string's next characters to `out`, up to about kPieceBytes and never more: true if it ends
  /// with them.
  bool read_string(std::string& out) {
    constexpr std::size_t full = kPieceBytes - kCharacterBytes;
    while (out.size() < full) {
      if (peek() == kEnd) fail_json("'\"'", kEnd);
      const char* start = at_;
      const char* stop = at_ + std::min(static_cast<std::size_t>(end_ - at_), full - out.size());
      while (at_ != stop && kPlain[static_cast<unsigned char>(*at_)]) ++at_;
      out.append(start, at_);
      if (at_ == stop) continue;
      if (static_cast<unsigned char>(*at_) >= 0x80) {
        read_character(out);
        continue;
      }
      const int c = take();
      if (c == '"') return true;
      if (c != '\\') fail_json("'\"'", c);
      read_escape(out);
    }
    if (peek() != '"') return false;
    take();
    return true;
  }

  void read_character(std::string& out) {
    const std::size_t start = out.size();
    do out.push_back(static_cast<char>(take()));
    while (out.size() - start < kCharacterBytes && (peek() & ~0x3F) == 0x80);
    if (utf8_length(std::string_view(out).substr(start)) != out.size() - start)
      fail("is not UTF-8, which JSON must be (" + place() + ")");
  }

  void read_escape(std::string& out) {
    constexpr std::string_view names = "\"\\/bfnrt";
    constexpr std::string_view meanings = "\"\\/\b\f\n\r\t";
    const int c = take();
    if (c == 'u') return read_code_point(out);
    const std::size_t which = c == kEnd ? names.npos : names.find(static_cast<char>(c));
    if (which == names.npos) fail_json("an escaped character", c);
    out.push_back(meanings[which]);
  }

  /// The digits after \u, and the second half of a pair of surrogates.
  void read_code_point(std::string& out) {
    unsigned code = read_hex();
    if (code >= 0xD800 && code < 0xE000) {
      const bool pair = code < 0xDC00 && take() == '\\' && take() == 'u';
      const unsigned low = pair ? read_hex() : 0;
      if (low < 0xDC00 || low >= 0xE000) fail("has half a pair of surrogates (" + place() + ")");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    const auto push = [&](unsigned byte) { out.push_back(static_cast<char>(byte)); };
    if (code < 0x80) return push(code);
    if (code < 0x800) {
      push(0xC0 | code >> 6);
    } else {
      if (code < 0x10000) {
        push(0xE0 | code >> 12);
      } else {
        push(0xF0 | code >> 18);
        push(0x80 | (code >> 12 & 0x3F));
      }
      push(0x80 | (code >> 6 & 0x3F));
    }
    push(0x80 | (code & 0x3F));
  }

  unsigned read_hex() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i) {
      const int c = take();
      const int letter = c | 0x20;
      if (!is_digit(c) && (letter < 'a' || letter > 'f')) fail_json("four hexadecimal digits", c);
      code = code << 4 | static_cast<unsigned>(is_digit(c) ? c - '0' : letter - 'a' + 10);
    }
    return code;
  }

  // ---- Errors ----

  std::string place() const { return "byte " + std::to_string(position() - line_start_) + " of it"; }

  [[noreturn]] void fail(const std::string& why) const {
    fail_reading(file_, "line " + std::to_string(line_) + " " + why);
  }

  [[noreturn]] void fail_json(const std::string& expected, int found) const {
    std::string what = "byte " + std::to_string(found);
    if (found == kEnd) what = "the end of the file";
    if (found == '\n') what = "the end of the line";
    if (found >= 0x20 && found < 0x7F) what = {'\'', static_cast<char>(found), '\''};
    fail("is not JSON: " + expected + " is expected, and there is " + what + " (" + place() + ")");
  }

  std::filesystem::path file_;
  std::string field_;
  std::unique_ptr<ByteStream> stream_;
  std::vector<char> window_;
  const char* at_ = window_.data();
  const char* end_ = window_.data();
  std::uint64_t before_window_ = 0;  // bytes in front of the window
  std::uint64_t line_ = 1;
  std::uint64_t line_start_ = 0;
  std::string piece_;
  std::string skipped_;
  bool inside_text_ = false;
  bool first_key_ = true;  // no key of the line has been read
  bool found_ = false;     // the field has been, in this line
};

}  // namespace

std::unique_ptr<DocumentReader> open_json_lines(const std::filesystem::path& file, const std::string& field) {
  return std::make_unique<JsonLines>(file, field);
}

}  // namespace flashlm
