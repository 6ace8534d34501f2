// SPDX-License-Identifier: Apache-2.0
// Against a naive twin on a made-up vocabulary, against PCRE2 with GPT-2's own pattern, and on GPT-2's
// vocabulary where tools/setup has fetched it.
#include <algorithm>
#include <catch2/catch.hpp>
#include <functional>
#include <map>
#include <random>

#include "data/byte_pair_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "data/file.h"
#include "data/text.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

std::string utf8(std::uint32_t c) {
  const auto tail = [&](int shift) { return static_cast<char>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x80) return {static_cast<char>(c)};
  if (c < 0x800) return {static_cast<char>(0xC0 | c >> 6), tail(0)};
  if (c < 0x10000) return {static_cast<char>(0xE0 | c >> 12), tail(6), tail(0)};
  return {static_cast<char>(0xF0 | c >> 18), tail(12), tail(6), tail(0)};
}

bool surrogate(std::uint32_t c) { return c >= 0xD800 && c < 0xE000; }

/// A vocabulary with few merges, in each of the forms that files have.
struct Tiny {
  // In the order of their ranks. Bytes have ids in the opposite of their order, merges follow.
  std::vector<std::pair<std::string, std::string>> merges = {
      {"a", "a"}, {"aa", "aa"}, {"b", "a"},   {" ", "t"},  {"h", "e"},       {" t", "he"},
      {"1", "2"}, {"12", "1"},  {"\n", "\n"}, {"a", "ba"}, {"\xC3", "\xA9"}, {" ", "\xC3\xA9"}};

  std::int32_t id(std::string_view token) const {
    if (token.size() == 1) return 255 - static_cast<unsigned char>(token[0]);
    const auto found = std::find_if(merges.begin(), merges.end(),
                                    [&](const auto& m) { return m.first + m.second == token; });
    return 256 + static_cast<std::int32_t>(found - merges.begin());
  }
  std::int32_t end_of_text() const { return 256 + static_cast<std::int32_t>(merges.size()); }

  /// Tokens as GPT-2's files write them, spelled here once more.
  static std::string name(std::string_view token) {
    std::string name;
    for (const char c : token) {
      const auto byte = static_cast<unsigned char>(c);
      if (byte <= 0x20)
        name += utf8(0x100 + byte);
      else if (byte < 0x7F || (byte > 0xA0 && byte != 0xAD))
        name += utf8(byte);
      else
        name += utf8(byte == 0xAD ? 0x143 : 0x121 + byte - 0x7F);
    }
    return name;
  }
  static std::string quoted(std::string_view token) {
    std::string text(1, '"');
    for (const char c : name(token))
      text += c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c);
    return text + "\"";
  }
  std::vector<std::string> tokens() const {
    std::vector<std::string> all;
    for (int byte = 0; byte < 256; ++byte) all.emplace_back(1, static_cast<char>(255 - byte));
    for (const auto& [left, right] : merges) all.push_back(left + right);
    return all;
  }

  std::string encoder_json() const {
    std::string json = "{\"<|endoftext|>\": " + std::to_string(end_of_text());
    for (const std::string& token : tokens())
      json.append(", ").append(quoted(token)).append(": ").append(std::to_string(id(token)));
    return json + "}";
  }
  std::string vocab_bpe() const {
    std::string text = "#version: 0.2\n";
    for (const auto& [left, right] : merges) text += name(left) + " " + name(right) + "\n";
    return text;
  }
  std::string ranks() const {
    constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string text;
    for (const std::string& token : tokens()) {
      for (std::size_t i = 0; i < token.size(); i += 3) {
        std::uint32_t bits = 0;
        for (std::size_t j = 0; j < 3; ++j)
          bits = bits << 8 | (i + j < token.size() ? static_cast<unsigned char>(token[i + j]) : 0);
        for (std::size_t j = 0; j < 4; ++j)
          text += i + j <= token.size() ? digits[bits >> (18 - 6 * j) & 63] : '=';
      }
      text.append(" ").append(std::to_string(id(token))).append("\n");
    }
    return text;
  }
  /// With the merges as pairs, as newer versions of tokenizers write them; `settings` go first.
  std::string tokenizer_json(const std::string& split = R"({"type":"ByteLevel","add_prefix_space":false})",
                             const std::string& model = R"("type":"BPE")",
                             const std::string& normalizer = "null", const std::string& added = "") const {
    std::string json = "{\n \"added_tokens\": [";
    json.append(added).append(R"({"id":)").append(std::to_string(end_of_text()));
    json.append(R"(,"content":"<|endoftext|>","special":true}],"normalizer":)").append(normalizer);
    json.append(R"(,"pre_tokenizer":)")
        .append(split)
        .append(R"(,"model":{)")
        .append(model)
        .append(R"(,"vocab":{)");
    for (const std::string& token : tokens())
      json.append(quoted(token)).append(":").append(std::to_string(id(token))).append(",");
    json.back() = '}';
    json += ",\"merges\":[";
    for (const auto& [left, right] : merges)
      json.append("[").append(quoted(left)).append(",").append(quoted(right)).append("],");
    json.back() = ']';
    return json + "}}";
  }

  std::unique_ptr<Tokenizer> from_gpt2() const {
    return byte_pair_from_gpt2(encoder_json(), vocab_bpe(), "tiny");
  }

  /// The ids of a piece by the book: merge the first pair of the least rank until there is none.
  void append(std::string_view piece, std::vector<std::int32_t>& ids) const {
    std::vector<std::string> parts;
    for (const char c : piece) parts.emplace_back(1, c);
    for (;;) {
      std::size_t best = merges.size();
      std::size_t at = 0;
      for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
        const auto found = std::find(merges.begin(), merges.end(), std::pair(parts[i], parts[i + 1]));
        if (const auto rank = static_cast<std::size_t>(found - merges.begin()); rank < best)
          best = rank, at = i;
      }
      if (best == merges.size()) break;
      parts[at] += parts[at + 1];
      parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at) + 1);
    }
    for (const std::string& part : parts) ids.push_back(id(part));
  }
};

/// GPT-2's pattern as published, given to PCRE2 as it is.
std::vector<std::string_view> published_split(std::string_view text) {
  static pcre2_code* const code = [] {
    int error = 0;
    std::size_t at = 0;
    return pcre2_compile(
        reinterpret_cast<PCRE2_SPTR>("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|"
                                     "\\s+(?!\\S)|\\s+"),
        PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &error, &at, nullptr);
  }();
  static pcre2_match_data* const match = pcre2_match_data_create(1, nullptr);
  std::vector<std::string_view> pieces;
  for (std::size_t start = 0; start < text.size();) {
    REQUIRE(pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), start, 0, match,
                        nullptr) > 0);
    const std::size_t* const ends = pcre2_get_ovector_pointer(match);
    pieces.push_back(text.substr(ends[0], ends[1] - ends[0]));
    start = ends[1];
  }
  return pieces;
}

std::vector<std::string> split(std::string_view text) {
  const auto pieces = gpt2_split(text);
  return {pieces.begin(), pieces.end()};
}

using Pieces = std::vector<std::string>;

/// Strings of what the pattern tells apart, with runs.
std::string random_text(std::mt19937& random, std::span<const std::string> parts) {
  std::string text;
  for (std::uint32_t n = random() % 25; n > 0; --n) {
    const std::string& part = parts[random() % parts.size()];
    for (std::uint32_t repeat = random() % 4 == 0 ? random() % 9 : 1; repeat > 0; --repeat) text += part;
  }
  return text;
}

const std::filesystem::path kGpt2 = FLASHLM_GPT2_FOLDER;

bool has_gpt2() {
  if (std::filesystem::exists(kGpt2 / "vocab.bpe")) return true;
  WARN("skipped: there is no .corpus/gpt2; tools/setup fetches it");
  return false;
}

}  // namespace

TEST_CASE("text is split as by GPT-2's pattern", "[byte_pair]") {
  CHECK(split("") == Pieces{});
  CHECK(split("Hello world") == Pieces{"Hello", " world"});
  CHECK(split("I'll don't we'RE 'sit ''s") ==
        Pieces{"I", "'ll", " don", "'t", " we", "'", "RE", " '", "sit", " ''", "s"});
  CHECK(split("a  b\n\n c \t") == Pieces{"a", " ", " b", "\n\n", " c", " \t"});
  CHECK(split("x=12.5e3, \xC2\xBD") == Pieces{"x", "=", "12", ".", "5", "e", "3", ",", " \xC2\xBD"});
  CHECK(split("a\xC2\xA0\xC2\xA0"
              "b") == Pieces{"a", "\xC2\xA0", "\xC2\xA0", "b"});

  const std::vector<std::string> ascii = {"a",    "Z",    "the", "7",  "'",  "'s", "'ll",  "'v",  "-",
                                          "\x01", "\x7F", " ",   "  ", "\n", "\t", "\r\n", "\v\f"};
  std::vector<std::string> mixed = ascii;
  for (const std::uint32_t c :
       {0x85,   0xA0,   0xE9,   0xBD,   0x17F,  0x301,  0x663,  0x1680, 0x2003,  0x200B,
        0x2019, 0x2028, 0x202F, 0x205F, 0x2167, 0x3000, 0x65E5, 0xFFFD, 0x1F600, 0x10FFFF})
    mixed.push_back(utf8(c));
  std::mt19937 random(11);
  for (int repeat = 0; repeat < 20000; ++repeat) {
    const std::string text = random_text(random, repeat % 2 ? ascii : mixed);
    REQUIRE(gpt2_split(text) == published_split(text));
  }
}

// The numbers are those of tiktoken 0.14 and tokenizers 0.23, whose classes are the same on every code point.
TEST_CASE("letters, numbers and spaces are those of Unicode 16.0", "[byte_pair]") {
  std::size_t letters = 0;
  std::size_t numbers = 0;
  std::string spaces;
  Checksum places;
  for (std::uint32_t c = 0x80; c < 0x110000; ++c) {
    if (surrogate(c)) continue;
    const auto goes_with = [c](const char* first) {
      return gpt2_split(std::string(first).append(utf8(c))).size() == 1;
    };
    const bool letter = goes_with("a");
    const bool number = goes_with("1");
    const bool other = goes_with("!");
    letters += letter;
    numbers += number;
    REQUIRE(letter + number + other <= 1);
    if (!letter && !number && !other) spaces += utf8(c);
    const std::byte kind{static_cast<unsigned char>(letter + 2 * number + 3 * other)};
    places.update({&kind, 1});
  }
  CHECK(letters == 141028 - 52);
  CHECK(numbers == 1911 - 10);
  std::string expected;
  for (const std::uint32_t c : {0x85, 0xA0, 0x1680, 0x2000, 0x2001, 0x2002, 0x2003, 0x2004, 0x2005, 0x2006,
                                0x2007, 0x2008, 0x2009, 0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000})
    expected += utf8(c);
  CHECK(spaces == expected);
  CHECK(places.digest() == 800517353728628611U);
}

TEST_CASE("a byte that is not UTF-8 counts as U+FFFD in the split", "[byte_pair]") {
  CHECK(split("a\xFF"
              "b \xFF\x80! \xC3") == Pieces{"a", "\xFF", "b", " \xFF\x80!", " \xC3"});
  const std::vector<std::string> parts = {"a",    "1",    " ",        "\n",           "'",
                                          "'s",   "-",    "\xC3\xA9", "\xE3\x80\x80", "\xF0\x9F\x98\x80",
                                          "\xFF", "\x80", "\xE3\x80", "\xED\xA0\x80"};
  std::mt19937 random(12);
  for (int repeat = 0; repeat < 5000; ++repeat) {
    const std::string text = random_text(random, parts);
    const std::string shown = valid_utf8(text);
    Pieces expected;
    for (const std::string_view piece : published_split(shown)) expected.emplace_back(piece);
    Pieces pieces = split(text);
    std::string joined;
    for (std::string& piece : pieces) {
      joined += piece;
      piece = valid_utf8(piece);
    }
    REQUIRE(pieces == expected);
    REQUIRE(joined == text);
  }
}

TEST_CASE("bytes are merged by rank, the first of equal pairs first", "[byte_pair]") {
  const Tiny tiny;
  const auto tokenizer = tiny.from_gpt2();
  const auto expect = [&](std::string_view text) {
    std::vector<std::int32_t> ids;
    for (const std::string_view piece : gpt2_split(text)) tiny.append(piece, ids);
    return ids;
  };
  CHECK(tokenizer->encode("").empty());
  CHECK(tokenizer->encode("the the") == std::vector{tiny.id("t"), tiny.id("he"), tiny.id(" the")});
  CHECK(tokenizer->encode("aaaaaaa") == std::vector{tiny.id("aaaa"), tiny.id("aa"), tiny.id("a")});
  std::mt19937 random(13);
  const std::vector<std::string> parts = {"a",  "a",        "b", " t",   "he",   "12", "1",
                                          "\n", "\xC3\xA9", " ", "\xA9", "\xC3", "z"};
  for (int repeat = 0; repeat < 3000; ++repeat) {
    const std::string text = random_text(random, parts);
    const auto expected = expect(text);
    REQUIRE(tokenizer->encode(text) == expected);
    REQUIRE(tokenizer->encode(text) == expected);  // from the cache
    REQUIRE(tokenizer->decode(expected) == text);
  }
  // On both sides of the length where the way of merging changes.
  for (std::size_t length = 1; length < 90; ++length)
    for (int repeat = 0; repeat < 20; ++repeat) {
      std::string text(length, 'a');
      for (char& c : text) c = random() % 3 ? 'a' : 'b';
      REQUIRE(tokenizer->encode(text) == expect(text));
    }
}

TEST_CASE("all forms of a vocabulary are the same tokenizer", "[byte_pair]") {
  const Tiny tiny;
  const auto first = tiny.from_gpt2();
  CHECK(first->vocab_size() == 269);
  CHECK(first->end_of_text() == 268);
  CHECK(first->token_text(268).empty());
  CHECK(first->lossless());
  CHECK(first->token_text(tiny.id(" the")) == " the");
  CHECK(first->token_text(0) == "\xFF");
  CHECK_THAT(error_of([&] { first->token_text(269); }), Contains("269 is outside the vocabulary of 269"));
  const std::string text = "the aaaba 121\n\n\xC3\xA9<|endoftext|>\xFF";
  const auto ids = first->encode(text);
  CHECK(std::count(ids.begin(), ids.end(), 268) == 0);
  for (const std::string& form : {tiny.ranks(), tiny.tokenizer_json(), first->serialized()}) {
    const auto again = Tokenizer::from_serialized(form);
    CHECK(again->serialized() == first->serialized());
    CHECK(again->fingerprint() == first->fingerprint());
    CHECK(again->encode(text) == ids);
  }
  const auto clone = first->clone();
  CHECK(clone->encode(text) == ids);
  CHECK(clone->fingerprint() == first->fingerprint());
  CHECK(clone->vocab_size() == 269);
}

TEST_CASE("a document's ids are those of its chunks", "[byte_pair]") {
  const auto tokenizer = Tiny().from_gpt2();
  const std::vector<std::string> parts = {"the",      " the",         "a",  " ", "\n", "12", "\xC3\xA9",
                                          "\xC2\xA0", "\xE3\x80\x80", "\t", "'s"};
  std::mt19937 random(14);
  for (int repeat = 0; repeat < 5000; ++repeat) {
    const std::string text = random_text(random, parts);
    std::vector<std::int32_t> ids;
    bool exact = true;
    for (std::string_view rest = text; !rest.empty();) {
      const std::string_view chunk = take_chunk(rest, 12);
      const auto more = tokenizer->encode(chunk, ids.size() > 0);
      ids.insert(ids.end(), more.begin(), more.end());
      // Cuts between characters are no promise.
      exact = exact &&
              (rest.empty() || (gpt2_split(rest)[0].find_first_of(" \t\n") == 0 &&
                                gpt2_split(chunk.substr(chunk.size() - 1))[0].find_first_of(" \t\n") != 0 &&
                                !chunk.ends_with("\xC2\xA0") && !chunk.ends_with("\xE3\x80\x80")));
    }
    if (exact) REQUIRE(ids == tokenizer->encode(text));
  }
}

// Quadratic time would be minutes.
TEST_CASE("a megabyte without a break is encoded", "[byte_pair]") {
  const auto tokenizer = Tiny().from_gpt2();
  for (const std::string& unit :
       {std::string("a"), std::string(" "), utf8(0x1F600), std::string("12"), utf8(0x3000), utf8(0xE9),
        std::string("\n"), std::string("\xFF"), std::string("'")}) {
    std::string text;
    while (text.size() < 1'000'000) text += unit;
    const auto ids = tokenizer->encode(text);
    REQUIRE(tokenizer->decode(ids) == text);
    if (unit == "a") CHECK(ids.size() == 250'000);
  }
}

TEST_CASE("damaged vocabularies are refused in one line", "[byte_pair]") {
  const Tiny tiny;
  const auto replace = [](std::string text, std::string_view what, std::string_view with) {
    const std::size_t at = text.find(what);
    REQUIRE(at != std::string::npos);
    return text.replace(at, what.size(), with);
  };
  const auto gpt2 = [&](const std::string& json, const std::string& bpe) {
    return error_of([&] { byte_pair_from_gpt2(json, bpe, "folder"); });
  };
  const std::string json = tiny.encoder_json();
  const std::string bpe = tiny.vocab_bpe();
  CHECK(gpt2(json, bpe).empty());
  CHECK_THAT(gpt2(json, replace(bpe, "h e\n", "")), Contains("no merge that makes its token 'he', id 260"));
  CHECK_THAT(gpt2(json, bpe + "x y\n"), Contains("merges 'x' and 'y', but has no token 'xy'"));
  CHECK_THAT(gpt2(json, bpe + "h e\n"), Contains("merges 'h' and 'e' twice"));
  CHECK_THAT(gpt2(json, bpe + "xy\n"), Contains("the merge 'xy', which is not two tokens"));
  CHECK_THAT(gpt2(json, bpe + "x y z\n"), Contains("the merge 'x y z', which is not two tokens"));
  CHECK_THAT(gpt2(json, bpe + "\xE6\x97\xA5 b\n"), Contains("not written in GPT-2's characters"));
  CHECK_THAT(gpt2(replace(json, "\"he\": 260", "\"hx\": 260"), bpe), Contains("has no token 'he'"));
  CHECK_THAT(gpt2(replace(json, "260", "259"), bpe), Contains("two tokens of the id 259"));
  CHECK_THAT(gpt2(replace(json, "260", "1000"), bpe), Contains("has 269 tokens, but one with the id 1000"));
  CHECK_THAT(gpt2(replace(json, "260", "-1"), bpe), Contains("one with the id -1"));
  CHECK_THAT(gpt2(replace(json, "260", "\"260\""), bpe), Contains("encoder.json is not GPT-2's list"));
  CHECK_THAT(gpt2(replace(json, "\"A\":",
                          "\"\xC4\x80"
                          "A\":"),
                  bpe),
             Contains("no token for the byte 65"));
  CHECK_THAT(gpt2(replace(json, "<|endoftext|>", "x<|endoftext|>"), bpe), Contains("no token <|endoftext|>"));
  CHECK_THAT(gpt2(json.substr(0, json.size() / 2), bpe), Contains("encoder.json is not GPT-2's list"));
  CHECK_THAT(gpt2("[]", bpe), Contains("encoder.json"));

  const auto ranks = [&](const std::string& text) {
    return error_of([&] { byte_pair_from_ranks(text, "file"); });
  };
  CHECK(ranks(tiny.ranks()).empty());
  CHECK_THAT(ranks(replace(tiny.ranks(), " 260\n", " 261\n")), Contains("line 261: rank 260 is missing"));
  CHECK_THAT(ranks(tiny.ranks() + "eA== 268\n"), Contains("has the token 'x' twice"));
  CHECK(ranks(tiny.ranks() + "YWFhYWFh 268\n").empty());  // aaaaaa, of aaaa and aa
  CHECK_THAT(ranks(tiny.ranks() + "eHl6 268\n"), Contains("lacks a token of which 'xyz', rank 268, is made"));
  CHECK_THAT(ranks(tiny.ranks() + "eC54 268\n"), Contains("GPT-2's pattern would cut"));
  CHECK_THAT(ranks(tiny.ranks() + "eC5 268\n"), Contains("line 269: 'eC5 268' is not a token in base64"));
}

TEST_CASE("what a tokenizer.json asks for beyond GPT-2's ways is refused", "[byte_pair]") {
  const Tiny tiny;
  const auto load = [](const std::string& json) {
    return error_of([&] { Tokenizer::from_serialized(json, "t.json"); });
  };
  const std::string level = R"({"type":"ByteLevel","add_prefix_space":false})";
  const std::string bpe = R"("type":"BPE")";
  CHECK(load(tiny.tokenizer_json()).empty());
  CHECK_THAT(load(tiny.tokenizer_json("null")), Contains("no pre_tokenizer"));
  CHECK_THAT(load(tiny.tokenizer_json(R"({"type":"ByteLevel"})")), Contains("add_prefix_space"));
  CHECK_THAT(load(tiny.tokenizer_json(R"({"type":"Whitespace"})")),
             Contains("pre_tokenizer of type Whitespace"));
  CHECK_THAT(load(tiny.tokenizer_json(R"({"type":"ByteLevel","add_prefix_space":true})")),
             Contains("add_prefix_space"));
  CHECK_THAT(load(tiny.tokenizer_json(R"({"type":"ByteLevel","add_prefix_space":false,"use_regex":false})")),
             Contains("use_regex"));
  CHECK_THAT(load(tiny.tokenizer_json(level, R"("type":"WordPiece")")), Contains("model of type WordPiece"));
  CHECK_THAT(load(tiny.tokenizer_json(level, bpe + R"(,"dropout":0.1)")), Contains("dropout"));
  CHECK_THAT(load(tiny.tokenizer_json(level, bpe + R"(,"ignore_merges":true)")), Contains("ignore_merges"));
  CHECK_THAT(load(tiny.tokenizer_json(level, bpe + R"(,"end_of_word_suffix":"</w>")")),
             Contains("end_of_word_suffix"));
  CHECK_THAT(load(tiny.tokenizer_json(level, bpe, R"({"type":"NFC"})")), Contains("normalizer (NFC)"));
  CHECK_THAT(load(tiny.tokenizer_json(level, bpe, "null", R"({"id":269,"content":"<x>","special":false},)")),
             Contains("added token '<x>'"));
  CHECK_THAT(load("{\"model\": 3}"), Contains("t.json is not a tokenizer.json"));
  CHECK_THAT(load("{"), Contains("t.json is not a tokenizer.json"));

  // Other special tokens are control tokens too.
  const auto tokenizer = Tokenizer::from_serialized(
      tiny.tokenizer_json(level, bpe, "null", R"({"id":269,"content":"<pad>","special":true},)"));
  CHECK(tokenizer->vocab_size() == 270);
  CHECK(tokenizer->token_text(269).empty());
  CHECK(tokenizer->end_of_text() == 268);
  CHECK(Tokenizer::from_serialized(tokenizer->serialized())->serialized() == tokenizer->serialized());
}

// From tiktoken and tokenizers, which agree.
TEST_CASE("GPT-2's ids", "[byte_pair]") {
  if (!has_gpt2()) return;
  const auto tokenizer = Tokenizer::open("gpt2:" + kGpt2.string());
  CHECK(tokenizer->vocab_size() == 50257);
  CHECK(tokenizer->end_of_text() == 50256);
  using Ids = std::vector<std::int32_t>;
  CHECK(tokenizer->encode("hello world") == Ids{31373, 995});
  CHECK(tokenizer->encode("I'll they've won't DON'T we're") ==
        Ids{40, 1183, 484, 1053, 1839, 470, 23917, 6, 51, 356, 821});
  CHECK(tokenizer->encode("hello \xF0\x9F\x91\x8B world \xF0\x9F\x8C\x8D") ==
        Ids{31373, 50169, 233, 995, 12520, 234, 235});
  CHECK(tokenizer->encode("a\xE2\x80\x8B"
                          "b\xC2\xA0"
                          "c\xE3\x80\x80"
                          "d\xE2\x80\xA8"
                          "e") == Ids{64, 9525, 65, 1849, 66, 5099, 222, 67, 447, 101, 68});
  CHECK(tokenizer->encode("<|endoftext|>") == Ids{27, 91, 437, 1659, 5239, 91, 29});
  CHECK(tokenizer->encode(std::string(100, 'x')) ==
        Ids{24223, 24223, 24223, 24223, 24223, 24223, 24223, 24223, 24223, 24223, 24223, 24223, 12343});
  CHECK(tokenizer->encode(std::string_view("\0\1\x7F", 3)) == Ids{188, 189, 221});
  std::mt19937 random(15);
  std::string bytes(100'000, 0);
  for (char& c : bytes) c = static_cast<char>(random());
  CHECK(tokenizer->decode(tokenizer->encode(bytes)) == bytes);
  CHECK(Tokenizer::from_serialized(tokenizer->serialized())->fingerprint() == tokenizer->fingerprint());
}
