// SPDX-License-Identifier: Apache-2.0
// flashlm generate: text from a trained run, streamed as it is drawn.
#include "model/generate.h"

#include <CLI/App.hpp>
#include <cstdio>
#include <iostream>
#include <iterator>

#include "data/error.h"
#include "tools/commands.h"
#include "tools/open_tokenizer.h"
#include "train/checkpoint.h"
#include "train/run_folder.h"

namespace flashlm {

namespace {

struct Options {
  std::string run, prompt, tokenizer;
  std::vector<int32_t> ids;
  int64_t tokens = 200;
  SamplingOptions sampling;
};

/// Token ids in, token ids out: a model without a tokenizer at hand.
void generate_ids(FlashLM& model, const Options& options) {
  for (const int32_t id : options.ids) {
    if (id < 0 || id >= model->config().vocab_size) {
      throw Error("--ids must be in [0, V) = [0, " + std::to_string(model->config().vocab_size) + "), got " +
                  std::to_string(id));
    }
  }
  constexpr int32_t kNever = -1;
  generate(model, options.ids, options.tokens, kNever, options.sampling, [](int32_t token) {
    std::printf("%d ", token);
    std::fflush(stdout);
  });
  std::printf("\n");
}

void run_generate(Options options) {
  options.sampling.validate();
  if (options.tokens < 0) throw Error("--tokens must be >= 0, got " + std::to_string(options.tokens));
  if (options.prompt == "-") options.prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  FlashLM model = load_any_model(RunFolder::weights(options.run));
  if (!options.ids.empty()) return generate_ids(model, options);
  if (options.tokenizer.empty()) options.tokenizer = RunFolder::of(options.run).tokenizer();
  const auto tokenizer = open_tokenizer(options.tokenizer);
  if (tokenizer->vocab_size() != model->config().vocab_size) {
    throw Error(options.tokenizer + " must have the model's " + std::to_string(model->config().vocab_size) +
                " entries, got " + std::to_string(tokenizer->vocab_size()));
  }
  std::vector<int32_t> prompt = tokenizer->encode(options.prompt);
  if (prompt.empty()) prompt = {tokenizer->end_of_text()};
  const auto print = [](const std::string& text) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  };
  print(options.prompt);
  generate(model, prompt, options.tokens, tokenizer->end_of_text(), options.sampling,
           [&](int32_t token) { print(tokenizer->token_text(token)); });
  print("\n");
}

}  // namespace

void add_generate(CLI::App& flashlm) {
  auto options = std::make_shared<Options>();
  CLI::App* app = flashlm.add_subcommand("generate", "Writes text with a trained model.");
  app->add_option("run", options->run, "run folder, or a .safetensors file of weights")->required();
  CLI::Option* prompt =
      app->add_option("--prompt", options->prompt, "the beginning; '-' reads it from standard input");
  app->add_option("--ids", options->ids, "instead of a prompt and a tokenizer: token ids, 1,2,3; prints ids")
      ->delimiter(',')
      ->excludes(prompt);
  app->add_option("--tokens", options->tokens, "most tokens to write")->capture_default_str();
  app->add_option("--temperature", options->sampling.temperature, "0: always the likeliest")
      ->capture_default_str();
  app->add_option("--top-k", options->sampling.top_k, "draw from the k likeliest; 0: from all")
      ->capture_default_str();
  app->add_option("--top-p", options->sampling.top_p, "draw from the fewest that reach this probability")
      ->capture_default_str();
  app->add_option("--seed", options->sampling.seed, "the same seed writes the same text")
      ->capture_default_str();
  app->add_option("--tokenizer", options->tokenizer,
                  "gpt2:FOLDER, a tokenizer file, or a folder with one; default: the run's own");
  app->callback([options] { run_generate(*options); });
}

}  // namespace flashlm
