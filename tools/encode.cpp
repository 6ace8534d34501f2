// SPDX-License-Identifier: Apache-2.0
// flashlm encode and decode: text on standard input to token ids on standard output, and back. A document's
// ids are one line, so that other programs can read and write them.
#include <CLI/App.hpp>
#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/error.h"
#include "data/text.h"
#include "data/tokenizer.h"
#include "tools/commands.h"
#include "tools/open_tokenizer.h"

namespace flashlm {
namespace {

constexpr std::size_t kChunkBytes = 1 << 20;  // what is encoded at once, as by prepare()

struct Options {
  std::string tokenizer;
  std::string end_of_text;  // what stands for the token of that name in text; "": nothing does
  bool lines = false;
  bool null = false;

  /// What ends a document of text; none: the end of the input.
  std::optional<char> separator() const {
    if (lines) return '\n';
    return null ? std::optional('\0') : std::nullopt;
  }
};

/// Appends what comes next on standard input; false at its end.
bool read_more(std::string& buffer) {
  const std::size_t before = buffer.size();
  buffer.resize(before + kChunkBytes);
  const std::size_t count = std::fread(buffer.data() + before, 1, kChunkBytes, stdin);
  buffer.resize(before + count);
  if (std::ferror(stdin)) throw Error(std::string("cannot read standard input: ") + std::strerror(errno));
  return count > 0;
}

class Output {
 public:
  void append(std::string_view text) {
    buffer_ += text;
    if (buffer_.size() >= kChunkBytes) flush();
  }
  void flush() {
    const bool written = std::fwrite(buffer_.data(), 1, buffer_.size(), stdout) == buffer_.size();
    if (!written || std::fflush(stdout) != 0)
      throw Error(std::string("cannot write standard output: ") + std::strerror(errno));
    buffer_.clear();
  }

 private:
  std::string buffer_;
};

/// Writes documents as lines of ids. Long ones come in parts, so that memory does not grow with them.
class Encoder {
 public:
  Encoder(const Tokenizer& tokenizer, std::string_view end_of_text)
      : tokenizer_(tokenizer), end_of_text_(end_of_text) {}

  void part(std::string_view text) {
    for (std::size_t at; !end_of_text_.empty() && (at = text.find(end_of_text_)) != std::string_view::npos;) {
      encode(text.substr(0, at));
      write(tokenizer_.end_of_text());
      continued_ = false;
      text.remove_prefix(at + end_of_text_.size());
    }
    encode(text);
  }
  void end_line() {
    output_.append("\n");
    continued_ = line_begun_ = false;
  }
  void flush() { output_.flush(); }

 private:
  void encode(std::string_view text) {
    if (text.empty()) return;
    for (const std::int32_t id : tokenizer_.encode(text, continued_)) write(id);
    continued_ = true;
  }
  void write(std::int32_t id) {
    char digits[12];
    char* const end = std::to_chars(digits + 1, std::end(digits), id).ptr;
    digits[0] = ' ';
    const char* const start = digits + !line_begun_;
    output_.append({start, static_cast<std::size_t>(end - start)});
    line_begun_ = true;
  }

  const Tokenizer& tokenizer_;
  std::string_view end_of_text_;
  Output output_;
  bool continued_ = false;
  bool line_begun_ = false;
};

void run_encode(const Options& options) {
  const auto tokenizer = open_tokenizer(options.tokenizer);
  const std::optional<char> separator = options.separator();
  Encoder encoder(*tokenizer, options.end_of_text);
  std::string buffer;
  while (read_more(buffer)) {
    std::string_view rest = buffer;
    const auto encode_all = [&encoder](std::string_view text) {
      while (!text.empty()) encoder.part(take_chunk(text, kChunkBytes));
    };
    for (std::size_t end; separator && (end = rest.find(*separator)) != std::string_view::npos;) {
      encode_all(rest.substr(0, end));
      encoder.end_line();
      rest.remove_prefix(end + 1);
    }
    // take_chunk must see as much as it would of the whole document.
    while (rest.size() > 2 * kChunkBytes + 1) encoder.part(take_chunk(rest, kChunkBytes));
    buffer.erase(0, buffer.size() - rest.size());
  }
  for (std::string_view rest = buffer; !rest.empty();) encoder.part(take_chunk(rest, kChunkBytes));
  // A last line without its end stays without, so that decode gives back the same bytes.
  if (!separator) encoder.end_line();
  encoder.flush();
}

std::vector<std::int32_t> parse_ids(std::string_view line, std::int64_t number) {
  std::vector<std::int32_t> ids;
  const char* const end = line.data() + line.size();
  for (const char* at = line.data(); at != end;) {
    if (*at == ' ' || *at == '\t' || *at == '\r') {
      ++at;
      continue;
    }
    std::int32_t id = 0;
    const auto [after, error] = std::from_chars(at, end, id);
    if (error != std::errc() || (after != end && *after != ' ' && *after != '\t' && *after != '\r')) {
      const std::string_view word(at, static_cast<std::size_t>(std::find(at, end, ' ') - at));
      throw Error("line " + std::to_string(number) + ": '" + valid_utf8(word.substr(0, 40)) +
                  "' is not a token id; each line must be ids with spaces between");
    }
    ids.push_back(id);
    at = after;
  }
  return ids;
}

void run_decode(const Options& options) {
  const auto tokenizer = Tokenizer::open(options.tokenizer);
  const std::optional<char> separator = options.separator();
  Output output;
  std::int64_t number = 0;
  const auto decode_line = [&](std::string_view line) {
    ++number;
    try {
      const std::vector<std::int32_t> ids = parse_ids(line, number);
      for (auto from = ids.begin(); from != ids.end();) {
        const auto to = std::find(from, ids.end(), tokenizer->end_of_text());
        output.append(tokenizer->decode({from, to}));
        if (to != ids.end()) output.append(options.end_of_text);
        from = to == ids.end() ? to : to + 1;
      }
    } catch (const Error& error) {
      output.flush();
      const std::string message = error.what();
      throw Error(message.starts_with("line ") ? message : "line " + std::to_string(number) + ": " + message);
    }
  };
  std::string buffer;
  std::size_t searched = 0;
  while (read_more(buffer)) {
    std::string_view rest = buffer;
    for (std::size_t end; (end = rest.find('\n', searched)) != std::string_view::npos; searched = 0) {
      decode_line(rest.substr(0, end));
      if (separator) output.append({&*separator, 1});
      rest.remove_prefix(end + 1);
    }
    searched = rest.size();
    buffer.erase(0, buffer.size() - rest.size());
  }
  if (!buffer.empty()) decode_line(buffer);
  output.flush();
}

void add_options(CLI::App& command, Options& options) {
  command
      .add_option("TOKENIZER", options.tokenizer,
                  "gpt2:FOLDER, a tokenizer file, or a folder with one: a run, for example")
      ->required();
  command.add_option(
      "--end-of-text", options.end_of_text,
      "What stands in text for the token that ends it, as '<|endoftext|>'; default: nothing does");
  CLI::Option* lines =
      command.add_flag("--lines", options.lines, "Each line of text is a document of its own");
  command.add_flag("-0,--null", options.null, "Documents end with a zero byte, and may have lines")
      ->excludes(lines);
}

}  // namespace

void add_encode(CLI::App& flashlm) {
  const auto options = std::make_shared<Options>();
  CLI::App* command = flashlm.add_subcommand(
      "encode", "Turn text on standard input, one document, into a line of token ids on standard output");
  add_options(*command, *options);
  command->callback([options] { run_encode(*options); });
}

void add_decode(CLI::App& flashlm) {
  const auto options = std::make_shared<Options>();
  CLI::App* command = flashlm.add_subcommand(
      "decode", "Turn lines of token ids on standard input into the bytes that they stand for");
  add_options(*command, *options);
  command->callback([options] { run_decode(*options); });
}

}  // namespace flashlm
