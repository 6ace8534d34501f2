// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>

#include "data/file.h"
#include "data/tokenizer.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

const std::string& model() {
  static const std::string serialized = train_sentencepiece(english(2000, 1), 400);
  return serialized;
}

/// What is written to standard output and standard error while `action` runs.
template <typename Action>
std::string printed_by(const std::filesystem::path& file, Action&& action) {
  const int to = open(file.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  const int out = dup(1);
  const int err = dup(2);
  dup2(to, 1);
  dup2(to, 2);
  action();
  dup2(out, 1);
  dup2(err, 2);
  for (const int descriptor : {to, out, err}) close(descriptor);
  return read_file(file);
}

}  // namespace

TEST_CASE("decoding what was encoded gives back every byte", "[tokenizer]") {
  const auto tokenizer = Tokenizer::from_serialized(model());
  const auto lossless = [&](std::string_view text) {
    return tokenizer->decode(tokenizer->encode(text)) == text;
  };
  CHECK(tokenizer->encode("").empty());
  for (const std::string_view text :
       {"the people", "  the  people   ", "\n", "\n\n\tthe\r\n", " ", "\xE2\x96\x81", "a\xE2\x96\x81 b",
        "\xE2\x96", "\xE2\x81\x87", "\xEF\xBF\xBD", "\xEF\xBB\xBFthe", "\xED\xA0\x80", "<unk>", "</s>",
        "<0x41>", "<|endoftext|>", "caf\xC3\xA9 cafe\xCC\x81 \xEF\xAC\x81 \xF0\x9F\x98\x80"})
    CHECK(lossless(text));
  for (int byte = 0; byte < 256; ++byte) CHECK(lossless(std::string(1, static_cast<char>(byte))));

  std::mt19937 random(7);
  const std::string_view alphabets[] = {" \n\t\rthe.", std::string_view("\xE2\x96\x81\x87 \0<s", 8),
                                        "\xC3\xA9\xE0\xF4 "};
  int lost = 0;
  for (int repeat = 0; repeat < 3000; ++repeat) {
    std::string text(random() % 80, ' ');
    const std::uint32_t kind = random() % 4;
    for (char& c : text)
      c = kind == 3 ? static_cast<char>(random()) : alphabets[kind][random() % alphabets[kind].size()];
    lost += !lossless(text);
  }
  CHECK(lost == 0);
}

TEST_CASE("encoding word by word equals sentencepiece on the whole text", "[tokenizer]") {
  sentencepiece::SentencePieceProcessor processor;
  REQUIRE(processor.LoadFromSerializedProto(model()).ok());
  const std::string text = english(300, 2) + "  unseen words,   and runs of   spaces \n\n x";
  std::vector<int> expected;
  REQUIRE(processor.Encode(text, &expected).ok());
  const auto tokenizer = Tokenizer::from_serialized(model());
  CHECK(tokenizer->encode(text) == expected);
  CHECK(tokenizer->encode(text) == expected);  // the second time from the cache
  CHECK(expected.size() < text.size() / 2);
}

TEST_CASE("a model whose tokens span words is used on the whole text", "[tokenizer]") {
  const Scratch scratch;
  const std::string_view phrases[] = {"of the people ", "in the year ", "and so on ", "a long time "};
  std::string text;
  for (std::uint32_t i = 0; i < 500; ++i) text += phrases[i * 2654435761U >> 30];
  put_file(scratch / "text", text);
  std::string spanning;
  REQUIRE(sentencepiece::SentencePieceTrainer::Train({{"input", (scratch / "text").string()},
                                                      {"model_type", "bpe"},
                                                      {"vocab_size", "310"},
                                                      {"split_by_whitespace", "false"},
                                                      {"byte_fallback", "true"},
                                                      {"normalization_rule_name", "identity"},
                                                      {"add_dummy_prefix", "false"},
                                                      {"remove_extra_whitespaces", "false"},
                                                      {"max_sentence_length", "100000"},
                                                      {"minloglevel", "3"}},
                                                     nullptr, &spanning)
              .ok());
  sentencepiece::SentencePieceProcessor processor;
  REQUIRE(processor.LoadFromSerializedProto(spanning).ok());
  std::vector<std::string> pieces;
  REQUIRE(processor.Encode(text, &pieces).ok());
  CHECK(std::count_if(pieces.begin(), pieces.end(), [](const std::string& piece) {
          return piece.find("\xE2\x96\x81", 1) != std::string::npos;
        }) > 10);
  std::vector<int> expected;
  REQUIRE(processor.Encode(text, &expected).ok());
  CHECK(Tokenizer::from_serialized(spanning)->encode(text) == expected);
}

TEST_CASE("tokens are the bytes they stand for", "[tokenizer]") {
  const auto tokenizer = Tokenizer::from_serialized(model());
  CHECK(tokenizer->vocab_size() == 400);
  CHECK(tokenizer->token_text(tokenizer->end_of_text()).empty());
  int spaced = 0;
  std::array<int, 256> single{};
  for (std::int32_t id = 0; id < 400; ++id) {
    const std::string& text = tokenizer->token_text(id);
    CHECK(text.find("\xE2\x96\x81") == std::string::npos);
    spaced += text == " people";
    if (text.size() == 1) ++single[static_cast<unsigned char>(text[0])];
  }
  CHECK(spaced == 1);
  CHECK(*std::min_element(single.begin(), single.end()) >= 1);
  CHECK_THAT(error_of([&] { tokenizer->token_text(400); }), Contains("400"));
  CHECK_THAT(error_of([&] { tokenizer->token_text(-1); }), Contains("-1"));
}

TEST_CASE("a model is its file and nothing else", "[tokenizer]") {
  const Scratch scratch;
  put_file(scratch / "m", model());
  const auto tokenizer = Tokenizer::load(scratch / "m");
  CHECK(tokenizer->serialized() == model());
  CHECK(tokenizer->fingerprint() == checksum(model()));
}

TEST_CASE("training is deterministic and silent", "[tokenizer]") {
  const Scratch scratch;
  put_file(scratch / "a.txt", english(1000, 1));
  put_file(scratch / "b.txt", english(1000, 3));
  std::string first;
  const std::string printed = printed_by(scratch / "printed", [&] {
    first = train_sentencepiece({scratch / "a.txt", scratch / "b.txt"}, 350);
  });
  CHECK(printed.empty());
  CHECK(first == train_sentencepiece(english(1000, 1) + english(1000, 3), 350));
  CHECK(first != train_sentencepiece(english(1000, 1) + english(1000, 4) + "other words", 350));
}

TEST_CASE("a vocabulary that the text cannot have is refused with one that it can", "[tokenizer]") {
  const auto train = [](std::string_view text, std::int64_t size) {
    return error_of([&] { train_sentencepiece(text, size); });
  };
  const std::string message = train(english(20, 1), 5000);
  CHECK_THAT(message, Contains("5000 tokens") && Contains("; use --tokenizer sentencepiece:"));
  const std::int64_t most = std::stoll(message.substr(message.find("sentencepiece:") + 14));
  CHECK(train(english(20, 1), most).empty());
  CHECK_FALSE(train(english(20, 1), most + 1).empty());
  CHECK_THAT(train(english(20, 1), 100), Contains("alone take") && Contains("use a larger"));
  CHECK_THAT(train("", 300), Contains("no text"));
}

TEST_CASE("a damaged or unsuitable model is refused", "[tokenizer]") {
  const Scratch scratch;
  const auto load = [&](std::string_view content) {
    put_file(scratch / "m", content);
    return error_of([&] { Tokenizer::load(scratch / "m"); });
  };
  CHECK_THAT(load(""), Contains("not a sentencepiece model"));
  CHECK_THAT(load("{\"vocab\": 3}"), Contains("not a sentencepiece model"));
  int accepted = 0;
  for (std::size_t size = 0; size < model().size() - 100; size += 37)
    accepted += load(model().substr(0, size)).empty();
  CHECK(accepted == 0);
  CHECK_THAT(error_of([&] { Tokenizer::load(scratch / "absent"); }), Contains("absent"));

  // sentencepiece's own settings put a space in front, fold characters and have no byte tokens.
  put_file(scratch / "text", english(500, 1));
  for (const std::string fallback : {"false", "true"}) {
    std::string altering;
    REQUIRE(sentencepiece::SentencePieceTrainer::Train({{"input", (scratch / "text").string()},
                                                        {"vocab_size", "330"},
                                                        {"hard_vocab_limit", "false"},
                                                        {"byte_fallback", fallback},
                                                        {"minloglevel", "3"}},
                                                       nullptr, &altering)
                .ok());
    CHECK_THAT(load(altering), Contains("alters text") && Contains("--add_dummy_prefix=false"));
  }
}
