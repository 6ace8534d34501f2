// SPDX-License-Identifier: Apache-2.0
// The subcommand's flags and its few lines of output: the work itself is data/prepare.
#include "data/prepare.h"

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <memory>

#include "tools/commands.h"
#include "tools/progress.h"

namespace flashlm {
namespace {

void print_part(const char* name, std::int64_t bytes, std::int64_t tokens) {
  std::printf("%-12s %8.2f MB %12lld tokens\n", name, static_cast<double>(bytes) / 1e6,
              static_cast<long long>(tokens));
}

void run(PrepareOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  options.progress = show_progress;
  begin_progress();
  const PrepareResult result = prepare(options);
  end_progress();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;

  print_part("training", result.train_bytes, result.train_tokens);
  print_part("validation", result.val_bytes, result.val_tokens);
  std::printf("%lld files, vocabulary %lld, %.3f bytes per token, %.1f s\n",
              static_cast<long long>(result.documents), static_cast<long long>(result.vocab_size),
              result.bytes_per_token(), seconds.count());
  std::printf("%s %s\n", options.out.c_str(), result.up_to_date ? "is up to date" : "written");
}

}  // namespace

void add_prepare(CLI::App& flashlm) {
  const auto options = std::make_shared<PrepareOptions>();
  CLI::App* command = flashlm.add_subcommand("prepare", "Turn text files into tokens to train on");
  command->add_option("INPUT", options->inputs, ".txt files, or folders of them")->required();
  command->add_option("--out", options->out, "Folder to write")->required();
  command
      ->add_option("--tokenizer", options->tokenizer,
                   "sentencepiece:SIZE to train one, or a model file to use")
      ->capture_default_str();
  command->add_option("--val-fraction", options->val_fraction, "Share of the text held out for validation")
      ->capture_default_str();
  command->callback([options] { run(*options); });
}

}  // namespace flashlm
