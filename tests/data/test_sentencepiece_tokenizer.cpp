// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <unordered_map>

#include "data/file.h"
#include "data/sentencepiece_tokenizer.h"
#include "tests/data/support.h"

using Catch::Contains;
using namespace flashlm;

namespace {

const std::string& model() {
  static const std::string serialized = train_sentencepiece(english(2000, 1), 400);
  return serialized;
}

const std::string& unigram_model() {
  static const std::string serialized = train_sentencepiece(english(2000, 1), 340, "unigram");
  return serialized;
}

/// A model made with sentencepiece's own settings, but for those given.
std::string foreign_model(std::unordered_map<std::string, std::string> settings) {
  const Scratch scratch;
  put_file(scratch / "text", english(500, 1));
  settings["input"] = (scratch / "text").string();
  settings["minloglevel"] = "3";
  settings.emplace("vocab_size", "330");
  settings.emplace("hard_vocab_limit", "false");
  std::string serialized;
  const auto status = sentencepiece::SentencePieceTrainer::Train(settings, nullptr, &serialized);
  REQUIRE(status.ok());
  return serialized;
}

/// Text with everything that models alter or cannot carry.
std::string random_text(std::mt19937& random) {
  const std::string_view alphabets[] = {" \n\t\rthe.", std::string_view("\xE2\x96\x81\x87 \0<s", 8),
                                        "\xC3\xA9\xE0\xF4 "};
  std::string text(random() % 80, ' ');
  const std::uint32_t kind = random() % 4;
  for (char& c : text)
    c = kind == 3 ? static_cast<char>(random()) : alphabets[kind][random() % alphabets[kind].size()];
  return text;
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

TEST_CASE("decoding what was encoded gives back every byte", "[sentencepiece]") {
  // The last puts a space in front, which decoding takes away again.
  const std::string prefixing = foreign_model({{"byte_fallback", "true"},
                                               {"normalization_rule_name", "identity"},
                                               {"remove_extra_whitespaces", "false"}});
  for (const std::string& serialized : {model(), unigram_model(), prefixing}) {
    const auto tokenizer = Tokenizer::from_serialized(serialized);
    CHECK(tokenizer->lossless());
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
    int lost = 0;
    for (int repeat = 0; repeat < 3000; ++repeat) lost += !lossless(random_text(random));
    CHECK(lost == 0);
  }
}

TEST_CASE("encoding word by word equals sentencepiece on the whole text", "[sentencepiece]") {
  for (const std::string& serialized : {model(), unigram_model()}) {
    sentencepiece::SentencePieceProcessor processor;
    REQUIRE(processor.LoadFromSerializedProto(serialized).ok());
    const std::string text = english(300, 2) + "  unseen words,   and runs of   spaces \n\n x";
    std::vector<int> expected;
    REQUIRE(processor.Encode(text, &expected).ok());
    const auto tokenizer = Tokenizer::from_serialized(serialized);
    CHECK(tokenizer->encode(text) == expected);
    CHECK(tokenizer->encode(text) == expected);  // the second time from the cache
    CHECK(tokenizer->clone()->encode(text) == expected);
    CHECK(tokenizer->clone()->serialized() == serialized);
    CHECK(expected.size() < text.size() / 2);
  }
}

TEST_CASE("models from elsewhere give sentencepiece's ids and say what they alter", "[sentencepiece]") {
  const auto made_with = [](std::unordered_map<std::string, std::string> settings) {
    const std::string serialized = foreign_model(std::move(settings));
    sentencepiece::SentencePieceProcessor processor;
    REQUIRE(processor.LoadFromSerializedProto(serialized).ok());
    const auto tokenizer = Tokenizer::from_serialized(serialized);
    for (const std::string_view text :
         {"the people", "  two  spaces ", " \xEF\xAC\x81ne \xC2\xBD", "Tabs\tand\nlines", "x"}) {
      std::vector<int> expected;
      REQUIRE(processor.Encode(text, &expected).ok());
      CHECK(tokenizer->encode(text) == expected);
    }
    for (const std::string_view text : {"a\xE2\x96\x81 the", "the \xFF people"}) {
      std::vector<int> expected;
      REQUIRE(processor.Encode(text, &expected).ok());
      CHECK((tokenizer->encode(text) == expected) == !tokenizer->lossless());
    }
    // A document in two parts, as take_chunk cuts it.
    auto parts = tokenizer->encode("the people");
    const auto second = tokenizer->encode(" shall unite", true);
    parts.insert(parts.end(), second.begin(), second.end());
    CHECK(parts == tokenizer->encode("the people shall unite"));
    CHECK(tokenizer->decode(parts) == "the people shall unite");
    CHECK(tokenizer->lossless() == tokenizer->alteration().empty());
    return tokenizer->alteration();
  };
  const std::pair<std::string, std::string> bytes{"byte_fallback", "true"},
      same{"normalization_rule_name", "identity"}, spaces{"remove_extra_whitespaces", "false"};
  CHECK(made_with({bytes, same, spaces}).empty());
  CHECK(made_with({bytes, same, spaces, {"model_type", "bpe"}, {"add_dummy_prefix", "false"}}).empty());
  CHECK(made_with({bytes, same}) == "joins and strips spaces, replaces bytes that are not UTF-8");
  CHECK(made_with({bytes, spaces}) ==
        "changes newlines or tabs, normalises characters, replaces bytes that are not UTF-8");
  CHECK(made_with({bytes, spaces, {"normalization_rule_name", "nfkc_cf"}}) ==
        "changes case, normalises characters, replaces bytes that are not UTF-8");
  CHECK_THAT(made_with({same, spaces}), Contains("loses characters that are not in its vocabulary"));
  CHECK_THAT(made_with({}), Contains("joins and strips spaces, changes newlines or tabs, loses characters"));
}

TEST_CASE("a model whose tokens span words is used on the whole text", "[sentencepiece]") {
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

TEST_CASE("tokens are the bytes they stand for", "[sentencepiece]") {
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

TEST_CASE("a model is its file and nothing else", "[sentencepiece]") {
  const Scratch scratch;
  put_file(scratch / "m", model());
  const auto tokenizer = Tokenizer::load(scratch / "m");
  CHECK(tokenizer->serialized() == model());
  CHECK(tokenizer->fingerprint() == checksum(model()));
}

TEST_CASE("training is deterministic and silent", "[sentencepiece]") {
  const Scratch scratch;
  std::string first;
  const std::string text = english(1000, 1) + english(1000, 3);
  const std::string printed =
      printed_by(scratch / "printed", [&] { first = train_sentencepiece(text, 350); });
  CHECK(printed.empty());
  CHECK(first == train_sentencepiece(text, 350));
  CHECK(unigram_model() == train_sentencepiece(english(2000, 1), 340, "unigram"));
  CHECK(unigram_model() != model());
  CHECK(first != train_sentencepiece(english(1000, 1) + english(1000, 4) + "other words", 350));
}

TEST_CASE("a vocabulary that the text cannot have is refused with one that it can", "[sentencepiece]") {
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
  CHECK_THAT(error_of([] { train_sentencepiece("text", 300, "word"); }),
             Contains("bpe or unigram, got 'word'"));
}

TEST_CASE("a damaged or unsuitable model is refused", "[sentencepiece]") {
  const Scratch scratch;
  const auto load = [&](std::string_view content) {
    put_file(scratch / "m", content);
    return error_of([&] { Tokenizer::load(scratch / "m"); });
  };
  CHECK_THAT(load(""), Contains("not a sentencepiece model"));
  int accepted = 0;
  for (std::size_t size = 0; size < model().size() - 100; size += 37)
    accepted += load(model().substr(0, size)).empty();
  CHECK(accepted == 0);
  CHECK_THAT(error_of([&] { Tokenizer::load(scratch / "absent"); }), Contains("absent"));
  CHECK_THAT(load(foreign_model({{"eos_id", "-1"}, {"bos_id", "-1"}})), Contains("no end-of-sentence token"));
  const auto begins = Tokenizer::from_serialized(foreign_model({{"eos_id", "-1"}, {"bos_id", "1"}}));
  CHECK(begins->end_of_text() == 1);
}
