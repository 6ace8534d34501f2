// SPDX-License-Identifier: Apache-2.0
// sentencepiece behind the Tokenizer interface. sentencepiece alone loses two things: bytes that are not
// UTF-8, and the character U+2581, which it uses for the space. Both go around it, through the model's 256
// byte tokens, where these are all that it loses.
#include "data/sentencepiece_tokenizer.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <array>

#include "data/error.h"
#include "data/text.h"
#include "data/word_cache.h"

// libsentencepiece and LibTorch's libc10 both export a variable of this name: an absl::Flag<int> of 32 bytes,
// and an int. In a program linked to both, the loader gives them one place. Were that libc10's, the
// constructor of the flag would overwrite what lies behind it, a mutex among other things. This definition
// comes before either; both kinds begin with the int.
extern "C" {
__attribute__((visibility("default"), used)) alignas(16) char FLAGS_minloglevel[64] = {};
}

namespace flashlm {
namespace {

constexpr std::string_view kEscapedSpace = "\xE2\x96\x81";  // U+2581
constexpr std::size_t kSentenceBytes = 2048;                // a training sentence
// Appended to a model, sets its normalizer_spec.add_dummy_prefix (fields 3 and 3) to false: Protocol Buffers
// merge.
const std::string kNoPrefix("\x1A\x02\x18\x00", 4);

/// Text that a model must carry unchanged: no prefix, runs of spaces, case, compatibility characters, rare
/// ones.
constexpr std::string_view kProbe = "A  b \n\n\tc \xC3\xA9 \xEF\xAC\x81 e\xCC\x81 \xF0\x9F\x9C\x81 ";

std::string byte_piece(int byte) {
  constexpr std::string_view digits = "0123456789ABCDEF";
  return {'<', '0', 'x', digits[byte / 16], digits[byte % 16], '>'};
}

std::string unescape(std::string_view piece) {
  std::string text;
  while (!piece.empty()) {
    const bool space = piece.starts_with(kEscapedSpace);
    text += space ? ' ' : piece.front();
    piece.remove_prefix(space ? kEscapedSpace.size() : 1);
  }
  return text;
}

/// Whether the token could lie across the gap between two words, as in "of the".
bool spans_words(std::string_view token) {
  const std::size_t first = token.find_first_not_of(' ');
  return first != std::string_view::npos && token.find(' ', first) != std::string_view::npos;
}

/// Length of the longest front of `text` that sentencepiece carries unchanged.
std::size_t carried_length(std::string_view text) {
  std::size_t length = 0;
  while (length < text.size()) {
    const std::string_view rest = text.substr(length);
    const std::size_t character = utf8_length(rest);
    if (character == 0 || rest.starts_with(kEscapedSpace)) break;
    length += character;
  }
  return length;
}

class SentencePiece : public Tokenizer {
 public:
  SentencePiece(std::string_view serialized, const std::string& name) : Tokenizer(std::string(serialized)) {
    auto model = std::make_shared<Model>();
    if (!model->processor.LoadFromSerializedProto(serialized).ok())
      throw Error(name + " is no tokenizer, or is damaged: not a sentencepiece model, a tokenizer.json or" +
                  " tiktoken's ranks; make one with `flashlm prepare INPUT... --out DIR`");
    model_ = model;
    const auto& processor = model->processor;
    model->end_of_text = processor.eos_id() >= 0 ? processor.eos_id() : processor.bos_id();
    if (model->end_of_text < 0)
      throw Error(name + " has no end-of-sentence token to put between documents; train it with --eos_id=1");
    for (int id = 0; id < processor.GetPieceSize(); ++id) model->texts.push_back(text_of(processor, id));
    for (const std::string& text : model->texts) model->words_are_separate &= !spans_words(text);
    model->has_bytes = true;
    for (int byte = 0; byte < 256; ++byte) {
      const int id = processor.PieceToId(byte_piece(byte));
      model->byte_ids[byte] = id;
      model->has_bytes &= processor.IsByte(id);
      if (processor.IsByte(id)) model->texts[id] = static_cast<char>(byte);
    }
    model->prefix = carried("a").starts_with(' ');
    model->alteration = describe();
    // Where spaces stay, we put the one in front ourselves: in front of a document, not of each of its parts.
    model->own_prefix = model->prefix && is_carried("  a  b ");
    if (model->own_prefix &&
        !model->processor.LoadFromSerializedProto(std::string(serialized) + kNoPrefix).ok())
      throw Error(name + " is damaged; get it anew");
  }

  std::unique_ptr<Tokenizer> clone() const override {
    return std::unique_ptr<Tokenizer>(new SentencePiece(*this, model_));
  }
  std::int64_t vocab_size() const override { return static_cast<std::int64_t>(model_->texts.size()); }
  const std::string& token_text(std::int32_t id) const override { return model_->texts[checked(id)]; }
  std::int32_t end_of_text() const override { return model_->end_of_text; }
  std::string alteration() const override { return model_->alteration; }

  std::vector<std::int32_t> encode(std::string_view text, bool continued) const override {
    std::string prefixed;
    if (model_->own_prefix && !continued && !text.empty()) {
      prefixed.append(1, ' ').append(text);
      text = prefixed;
    }
    if (!lossless()) return encode_raw(text);
    std::vector<std::int32_t> ids;
    while (!text.empty()) {
      const std::size_t length = carried_length(text);
      append_words(text.substr(0, length), ids);
      text.remove_prefix(length);
      if (text.empty()) break;
      ids.push_back(model_->byte_ids[static_cast<unsigned char>(text.front())]);
      text.remove_prefix(1);
    }
    return ids;
  }

  std::string decode(std::span<const std::int32_t> ids) const override {
    std::string text = Tokenizer::decode(ids);
    if (model_->prefix && text.starts_with(' ')) text.erase(0, 1);
    return text;
  }

 private:
  struct Model {
    sentencepiece::SentencePieceProcessor processor;
    std::vector<std::string> texts;
    std::array<std::int32_t, 256> byte_ids;  // if has_bytes
    std::int32_t end_of_text;
    bool has_bytes;
    bool words_are_separate = true;
    bool prefix;      // a space is put in front of text
    bool own_prefix;  // by us
    std::string alteration;
  };

  SentencePiece(const SentencePiece& other, std::shared_ptr<const Model> model)
      : Tokenizer(other), model_(std::move(model)) {}

  static std::string text_of(const sentencepiece::SentencePieceProcessor& processor, int id) {
    if (processor.IsControl(id) || processor.IsUnknown(id)) return "";
    return unescape(processor.IdToPiece(id));
  }

  std::vector<std::int32_t> encode_raw(std::string_view text) const {
    std::vector<int> ids;
    if (const auto status = model_->processor.Encode(text, &ids); !status.ok())
      throw Error(std::string("sentencepiece cannot encode the text: ") + status.error_message());
    return ids;
  }

  /// What sentencepiece by itself makes of a text, with the space in front.
  std::string carried(std::string_view text) const { return Tokenizer::decode(encode_raw(text)); }
  bool is_carried(std::string_view text) const {
    const std::string whole = carried(text);
    return std::string_view(whole).substr(model_->prefix && !whole.empty()) == text;
  }

  std::string describe() const {
    std::string words;
    const auto add = [&words](const char* what) { words += (words.empty() ? "" : ", ") + std::string(what); };
    if (!is_carried("  a  b ")) add("joins and strips spaces");
    if (!is_carried("a\nb\tc")) add("changes newlines or tabs");
    if (const std::string lower = carried("a"); lower.ends_with('a') && carried("A") == lower)
      add("changes case");
    if (!model_->has_bytes) {
      add("loses characters that are not in its vocabulary");
    } else if (!is_carried("\xEF\xAC\x81 e\xCC\x81 \xEF\xBC\xA1 \xC2\xBD")) {  // a ligature, a decomposed e
                                                                               // acute, ...
      add("normalises characters");
    } else if (words.empty() && !is_carried(kProbe)) {
      add("changes some text");
    }
    if (!words.empty()) add("replaces bytes that are not UTF-8");
    return words;
  }

  // A word is a run of spaces and what follows up to the next space. When no token spans two words, tokens
  // can be found word by word: the result is the same, and since words repeat, a cache makes it ten times
  // faster. (Over long text sentencepiece's unigram adds up log probabilities in float and loses their last
  // digits; word by word it does not.)
  void append_words(std::string_view text, std::vector<std::int32_t>& ids) const {
    while (!text.empty()) {
      const std::size_t first = std::min(text.find_first_not_of(' '), text.size());
      const std::size_t length =
          model_->words_are_separate ? std::min(text.find(' ', first), text.size()) : text.size();
      append_word(text.substr(0, length), ids);
      text.remove_prefix(length);
    }
  }

  void append_word(std::string_view word, std::vector<std::int32_t>& ids) const {
    const WordCache::Key key = cache_.prepare(word);
    if (const std::span<const std::int32_t> known = cache_.find(key); !known.empty()) {
      ids.insert(ids.end(), known.begin(), known.end());
      return;
    }
    const std::vector<std::int32_t> found = encode_raw(word);
    cache_.insert(key, found);
    ids.insert(ids.end(), found.begin(), found.end());
  }

  std::shared_ptr<const Model> model_;
  mutable WordCache cache_;
};

/// Hands the text to the trainer in sentences of about 2 kB, which end between words. Newlines stay inside,
/// so that the trainer can merge them with what precedes (".\n"): 2 to 6 % fewer tokens than with a newline
/// of its own.
class Sentences : public sentencepiece::SentenceIterator {
 public:
  explicit Sentences(std::string_view text) : rest_(text) { Next(); }
  bool done() const override { return sentence_.empty(); }
  void Next() override { sentence_ = take_chunk(rest_, kSentenceBytes); }
  const std::string& value() const override { return sentence_; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  std::string_view rest_;
  std::string sentence_;
};

/// The message of a failed training: sentencepiece puts its own source line in front, up to "] ".
[[noreturn]] void fail_training(std::int64_t vocab_size, std::string message) {
  if (const std::size_t bracket = message.rfind("] "); bracket != std::string::npos)
    message.erase(0, bracket + 2);
  const std::string prefix = "cannot train a tokenizer of " + std::to_string(vocab_size) + " tokens: ";
  const auto number_after = [&](std::string_view mark) {
    const std::size_t digits = message.find_first_of("0123456789", message.find(mark) + mark.size());
    return message.substr(digits, message.find_first_not_of("0123456789", digits) - digits);
  };
  if (message.find("too high") != std::string::npos)
    throw Error(prefix + "the text yields at most " + number_after("<=") +
                "; use --tokenizer sentencepiece:" + number_after("<=") + " or more text");
  if (message.find("smaller than required_chars") != std::string::npos)
    throw Error(prefix + "its bytes and characters alone take " + number_after("vs") +
                "; use a larger --tokenizer sentencepiece:SIZE");
  throw Error(prefix + message);
}

}  // namespace

std::unique_ptr<Tokenizer> sentencepiece_tokenizer(std::string_view serialized, const std::string& name) {
  return std::make_unique<SentencePiece>(serialized, name);
}

// BPE by default, not unigram: on 10.8 MB of speeches with 4096 tokens it trains in 2.5 s instead of 12 s,
// and a trigram model over its tokens needs 1.377 bits per byte against 1.386 (though unigram has 2 % fewer
// tokens).
std::string train_sentencepiece(std::string_view text, std::int64_t vocab_size,
                                const std::string& model_type) {
  if (model_type != "bpe" && model_type != "unigram")
    throw Error("a sentencepiece model must be of type bpe or unigram, got '" + model_type + "'");
  if (text.empty()) throw Error("cannot train a tokenizer: there is no text");
  Sentences sentences(text);
  std::string serialized;
  const auto status = sentencepiece::SentencePieceTrainer::Train(
      {{"model_type", model_type},
       {"vocab_size", std::to_string(vocab_size)},
       {"byte_fallback", "true"},
       {"character_coverage", "0.9999"},
       {"normalization_rule_name", "identity"},
       {"add_dummy_prefix", "false"},
       {"remove_extra_whitespaces", "false"},
       {"allow_whitespace_only_pieces", "true"},
       {"unk_id", "0"},
       {"eos_id", "1"},
       {"bos_id", "-1"},
       {"pad_id", "-1"},
       {"eos_piece", "<|endoftext|>"},
       {"max_sentence_length", std::to_string(4 * kSentenceBytes)},
       {"num_threads", "2"},  // a fixed number: the model file records it
       {"minloglevel", "3"}},
      &sentences, &serialized);
  if (!status.ok()) fail_training(vocab_size, status.error_message());
  return serialized;
}

}  // namespace flashlm
