// SPDX-License-Identifier: Apache-2.0
// The subcommand's flags and its few lines of output: the work itself is data/prepare.
#include "data/prepare.h"

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>

#include "tools/commands.h"
#include "tools/progress.h"
#include "train/progress.h"

namespace flashlm {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

/// On a terminal a line that changes, elsewhere one every ten seconds:
///   encoding 42 %  31.2 MB/s  2011 documents  7.00M tokens  0:12 left
class Display {
 public:
  void show(const PrepareProgress& now) {
    stop_if_interrupted();
    const Clock::time_point time = Clock::now();
    if (stage_ != now.stage) {
      stage_ = now.stage;
      first_ = now;
      began_ = time;
      if (progress_is_live()) shown_ = {};
    }
    if (seconds_between(shown_, time) < (progress_is_live() ? 0.1 : 10)) return;
    shown_ = time;
    std::printf(progress_is_live() ? "\r\x1b[K%s" : "%s\n", line(now, seconds_between(began_, time)).c_str());
    std::fflush(stdout);
  }

 private:
  /// Speed and the time left count from where the stage began, which in a call that goes on is not zero.
  std::string line(const PrepareProgress& now, double seconds) const {
    char text[200];
    std::snprintf(text, sizeof(text), "%s %.0f %%", stage_.c_str(), 100 * now.fraction);
    std::string line = text;
    const auto bytes = static_cast<double>(now.text_bytes - first_.text_bytes);
    if (bytes > 0 && seconds > 0) {
      std::snprintf(text, sizeof(text), "  %.1f MB/s", bytes * 1e-6 / seconds);
      line += text;
    }
    if (now.documents > 0) line += "  " + std::to_string(now.documents) + " documents";
    if (now.tokens > 0) line += "  " + format_count(static_cast<double>(now.tokens)) + " tokens";
    if (now.fraction > first_.fraction)
      line +=
          "  " + format_duration(seconds * (1 - now.fraction) / (now.fraction - first_.fraction)) + " left";
    return line;
  }

  std::string stage_;
  PrepareProgress first_{};
  Clock::time_point began_;
  Clock::time_point shown_ = Clock::now();
};

void print_part(const char* name, std::int64_t bytes, std::int64_t tokens, std::int64_t documents) {
  std::printf("%-12s %8.2f MB %12lld tokens %9lld documents\n", name, static_cast<double>(bytes) / 1e6,
              static_cast<long long>(tokens), static_cast<long long>(documents));
}

void run(PrepareOptions& options) {
  const Clock::time_point start = Clock::now();
  const auto line = std::make_shared<Display>();
  options.progress = [line](const PrepareProgress& now) { line->show(now); };
  begin_progress();
  PrepareResult result;
  try {
    result = prepare(options);
  } catch (const CLI::RuntimeError&) {
    end_progress();
    if (can_resume_prepare(options.out))
      std::fprintf(stderr, "flashlm: interrupted; the same command goes on from here\n");
    throw;
  }
  end_progress();

  if (result.resumed_bytes > 0)
    std::printf("%-12s %8.2f MB were encoded by an earlier call\n", "resumed",
                static_cast<double>(result.resumed_bytes) / 1e6);
  print_part("training", result.train_bytes, result.train_tokens, result.train_documents);
  print_part("validation", result.val_bytes, result.val_tokens, result.val_documents);
  std::printf("%lld documents, vocabulary %lld, %.3f bytes per token, %.1f s\n",
              static_cast<long long>(result.documents), static_cast<long long>(result.vocab_size),
              result.bytes_per_token(), seconds_between(start, Clock::now()));
  if (!result.alteration.empty()) std::printf("note: the tokenizer %s\n", result.alteration.c_str());
  std::printf("%s %s\n", options.out.c_str(), result.up_to_date ? "is up to date" : "written");
}

}  // namespace

void add_prepare(CLI::App& flashlm) {
  const auto options = std::make_shared<PrepareOptions>();
  CLI::App* command = flashlm.add_subcommand("prepare", "Turn text into tokens to train on");
  command
      ->add_option(
          "INPUT", options->inputs,
          ".txt, .jsonl (both also .gz and .zst) and .parquet files, folders of them, or - for standard "
          "input")
      ->required();
  command->add_option("--out", options->out, "Folder to write; a killed command goes on when given again")
      ->required();
  command
      ->add_option("--tokenizer", options->tokenizer,
                   "sentencepiece:SIZE to train one, gpt2:FOLDER of GPT-2's vocabulary, or a model file")
      ->capture_default_str();
  command->add_option("--model-type", options->model_type, "Of the one to train: bpe or unigram")
      ->capture_default_str();
  command->add_option("--val-fraction", options->val_fraction, "Share of the text held out for validation")
      ->capture_default_str();
  command
      ->add_option("--text-field", options->text_field, "Field of .jsonl, column of .parquet with the text")
      ->capture_default_str();
  command->add_option("--min-chars", options->min_chars, "Leave out documents with fewer characters")
      ->capture_default_str();
  command->add_option("--max-documents", options->max_documents, "Use the first so many of the others");
  command->add_option("--stdin-format", options->stdin_format, "What - is: txt, jsonl, jsonl.gz, ...")
      ->capture_default_str();
  command->add_option("--threads", options->threads, "0: one for each processor")->capture_default_str();
  command->callback([options] { run(*options); });
}

}  // namespace flashlm
