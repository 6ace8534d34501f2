// SPDX-License-Identifier: Apache-2.0
// flashlm classes: the words of a vocabulary divided among classes, for output layers that choose a class
// first.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>

#include "data/dataset.h"
#include "data/error.h"
#include "data/word_classes.h"
#include "tools/commands.h"
#include "tools/progress.h"
#include "train/checkpoint.h"
#include "train/run_folder.h"

namespace flashlm {

namespace {

struct Options {
  std::string data, tokens, out, run;
  std::string method = "frequency";
  int64_t vocab_size = 0, count = 0;
  std::vector<int64_t> cutoffs;
  ExchangeOptions exchange;
};

TokenShard open_tokens(const Options& options) {
  if (options.data.empty() == options.tokens.empty())
    throw Error("classes: give either --data DIR (made by flashlm prepare) or --tokens FILE --vocab-size V");
  const TokenShard tokens = options.data.empty() ? TokenShard::open_raw(options.tokens, options.vocab_size)
                                                 : Dataset::open(options.data).train;
  if (tokens.size() == 0) throw Error((options.data + options.tokens) + " must hold tokens, got none");
  return tokens;
}

WordClasses classes_of_run(const Options& options, std::span<const int64_t> counts, int64_t count) {
  if (options.run.empty()) throw Error("--method kmeans needs --run RUN, whose embedding it divides");
  const FlashLM model = load_any_model(RunFolder::weights(options.run));
  const at::Tensor embedding = model->embedding.detach().to(at::kFloat).contiguous();
  if (embedding.size(0) != static_cast<int64_t>(counts.size()))
    throw Error(options.run + " must have the tokens' vocabulary of " + std::to_string(counts.size()) +
                ", got " + std::to_string(embedding.size(0)));
  return kmeans_classes({embedding.const_data_ptr<float>(), static_cast<size_t>(embedding.numel())}, counts,
                        count, 10, [](int iteration, double fraction) {
                          show_progress("iteration " + std::to_string(iteration + 1), fraction);
                        });
}

void run_classes(Options& options) {
  if (options.method == "cutoffs" && options.cutoffs.empty())
    throw Error("--method cutoffs needs --cutoffs, as 2000,10000");
  const auto start = std::chrono::steady_clock::now();
  begin_progress();
  show_progress("reading", 0);
  const TokenShard tokens = open_tokens(options);
  const std::vector<int64_t> counts = word_counts(tokens);
  const auto vocab_size = static_cast<double>(counts.size());
  const int64_t count = options.count > 0 ? options.count : std::llround(std::sqrt(vocab_size));
  std::string stage = "bringing words in";
  options.exchange.progress = [&stage](int sweep, double fraction, double objective) {
    show_progress(stage, fraction);
    if (fraction == 1) {
      stage = "sweep " + std::to_string(sweep + 1) + ", " + std::to_string(objective) + " nats per token";
    }
  };

  const WordClasses classes = options.method == "frequency" ? frequency_classes(counts, count)
                              : options.method == "exchange"
                                  ? exchange_classes(tokens, count, options.exchange)
                              : options.method == "kmeans" ? classes_of_run(options, counts, count)
                                                           : cutoff_classes(counts, options.cutoffs);
  show_progress("measuring", 0);
  const double information = class_information(classes, tokens);
  show_progress("writing", 0);
  classes.save(options.out);
  end_progress();

  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  int64_t smallest = classes.size(0), largest = 0;
  for (int64_t c = 0; c < classes.count(); ++c) {
    smallest = std::min(smallest, classes.size(c));
    largest = std::max(largest, classes.size(c));
  }
  std::printf(
      "%s: %lld words in %lld classes of %lld to %lld, %.1f rows per position, %.4f nats per token of bigram "
      "information, %.1f s\n",
      options.out.c_str(), static_cast<long long>(classes.vocab_size()),
      static_cast<long long>(classes.count()), static_cast<long long>(smallest),
      static_cast<long long>(largest), rows_per_position(classes, counts), information, seconds.count());
}

}  // namespace

void add_classes(CLI::App& flashlm) {
  auto options = std::make_shared<Options>();
  CLI::App* app =
      flashlm.add_subcommand("classes", "Divides a vocabulary into classes, for a cheaper output layer.");
  app->add_option("--data", options->data, "folder that `flashlm prepare` made: its training tokens");
  app->add_option("--tokens", options->tokens, "a raw token file (uint16 .bin or .npy)");
  app->add_option("--vocab-size", options->vocab_size, "of the raw token file");
  app->add_option("--out", options->out, "file to write")->required();
  app->add_option("--method", options->method,
                  "frequency: fewest rows of weights per position; exchange: by a bigram of classes; kmeans: "
                  "by a run's embedding; cutoffs: for the adaptive softmax")
      ->check(CLI::IsMember({"frequency", "exchange", "kmeans", "cutoffs"}))
      ->capture_default_str();
  app->add_option("--count", options->count, "classes; default: the root of the vocabulary")
      ->check(CLI::PositiveNumber);
  app->add_option("--cutoffs", options->cutoffs, "places in the order of frequency, as 2000,10000")
      ->delimiter(',');
  app->add_option("--run", options->run, "kmeans: run folder, or a .safetensors file of weights");
  app->add_option("--sweeps", options->exchange.sweeps, "exchange: most passes over the vocabulary")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->add_option("--row-price", options->exchange.row_price,
                  "exchange: nats per token that a row less per position is worth")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->callback([options] { run_classes(*options); });
}

}  // namespace flashlm
