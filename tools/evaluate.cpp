// SPDX-License-Identifier: Apache-2.0
// flashlm evaluate: a trained run on held-out tokens.
#include "train/evaluate.h"

#include <CLI/App.hpp>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "data/dataset.h"
#include "data/error.h"
#include "tools/commands.h"
#include "train/checkpoint.h"
#include "train/run_folder.h"

namespace flashlm {

namespace {

struct Options {
  std::string run, data, tokens;
  int64_t seq_len = 256, max_tokens = 0;
  bool json = false;
};

void run_evaluate(const Options& options) {
  if (options.data.empty() == options.tokens.empty()) {
    throw Error("evaluate: give either --data DIR (made by flashlm prepare) or --tokens FILE");
  }
  if (options.seq_len < 1)
    throw Error("--seq-len must be at least 1, got " + std::to_string(options.seq_len));
  if (options.max_tokens < 0)
    throw Error("--max-tokens must be >= 0, got " + std::to_string(options.max_tokens));
  FlashLM model = load_any_model(RunFolder::weights(options.run));
  const int64_t vocab_size = model->config().vocab_size;
  std::vector<int32_t> bytes;
  Evaluation result;
  if (options.data.empty()) {
    const TokenShard shard = TokenShard::open_raw(options.tokens, vocab_size);
    result = evaluate(model, {{shard}}, options.seq_len, options.max_tokens, {});
  } else {
    const Dataset dataset = Dataset::open(options.data);
    if (dataset.val.vocab_size() != vocab_size) {
      throw Error(options.data + " must have the model's vocabulary of " + std::to_string(vocab_size) +
                  ", got " + std::to_string(dataset.val.vocab_size()) +
                  "; prepare it with the run's tokenizer.model");
    }
    result = evaluate(model, {{dataset.val}}, options.seq_len, options.max_tokens,
                      token_bytes(*dataset.tokenizer));
  }
  const double perplexity = std::exp(result.nats_per_token);
  if (options.json) {
    nlohmann::ordered_json json = {{"tokens", result.tokens},
                                   {"nats_per_token", result.nats_per_token},
                                   {"perplexity", perplexity},
                                   {"bits_per_byte", nullptr}};
    if (result.bits_per_byte) json["bits_per_byte"] = *result.bits_per_byte;
    std::printf("%s\n", json.dump().c_str());
    return;
  }
  std::printf("%lld tokens: %.4f nats/token, perplexity %.2f", static_cast<long long>(result.tokens),
              result.nats_per_token, perplexity);
  if (result.bits_per_byte) std::printf(", %.4f bits/byte", *result.bits_per_byte);
  std::printf("\n");
}

}  // namespace

void add_evaluate(CLI::App& flashlm) {
  auto options = std::make_shared<Options>();
  CLI::App* app = flashlm.add_subcommand("evaluate", "Measures a trained model on held-out tokens.");
  app->add_option("run", options->run, "run folder, or a .safetensors file of weights")->required();
  app->add_option("--data", options->data, "folder that `flashlm prepare` made: its held-out tokens");
  app->add_option("--tokens", options->tokens, "a raw token file (uint16 .bin or .npy)");
  app->add_option("--seq-len", options->seq_len, "tokens in a window")->capture_default_str();
  app->add_option("--max-tokens", options->max_tokens, "use only the first so many; 0: all")
      ->capture_default_str();
  app->add_flag("--json", options->json, "one JSON object");
  app->callback([options] { run_evaluate(*options); });
}

}  // namespace flashlm
