// SPDX-License-Identifier: Apache-2.0
// flashlm embeddings: another model's token table, made as narrow as a FlashLM, to start training from.
#include "model/embeddings.h"

#include <ATen/ATen.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>
#include <memory>

#include "data/error.h"
#include "model/safetensors.h"
#include "tools/commands.h"

namespace flashlm {

namespace {

struct Options {
  std::string table, name, out, map_from, tokenizer;
  int64_t dim = 256;
  bool center = false;
  double rms = 0;
};

double rms_of(const at::Tensor& t) {
  const double norm = at::linalg_vector_norm(t, 2, std::nullopt, false, at::kDouble).item<double>();
  return norm / std::sqrt(static_cast<double>(t.numel()));
}

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

/// The first, those on both sides of the cut, and the last.
void print_singular_values(const at::Tensor& values, int64_t dim) {
  int64_t last = -1;
  for (const int64_t i : {int64_t{0}, dim - 1, std::min(dim, values.size(0) - 1), values.size(0) - 1}) {
    if (i != last)
      std::printf("%s %lld: %.4f", last < 0 ? "singular values" : ",", static_cast<long long>(i + 1),
                  values[i].item<double>());
    last = i;
  }
  std::printf("\n");
}

void run_embeddings(const Options& options) {
  if (options.map_from.empty() != options.tokenizer.empty()) {
    throw Error("--map-from, the table's tokenizer, and --tokenizer, the model's, go together");
  }
  Table table = load_table(options.table, options.name);
  std::printf("%s of %s: %lld x %lld\n", table.name.c_str(), options.table.c_str(),
              static_cast<long long>(table.rows.size(0)), static_cast<long long>(table.rows.size(1)));
  if (!options.map_from.empty()) {
    table.rows =
        map_table(table.rows, *Tokenizer::open(options.map_from), *Tokenizer::open(options.tokenizer));
    std::printf("mapped from %s to %s: %lld tokens\n", options.map_from.c_str(), options.tokenizer.c_str(),
                static_cast<long long>(table.rows.size(0)));
  }
  CompressedTable result = compress_table(table.rows, options.dim, options.center);
  if (options.rms > 0) result.rows.mul_(options.rms / rms_of(result.rows));
  std::printf("variance kept %.2f %%, %s\n", 100 * result.variance_kept,
              options.center ? "of that about the mean row" : "uncentred");
  print_singular_values(result.singular_values, options.dim);
  save_safetensors(options.out,
                   {{"embedding.weight", result.rows}, {"singular_values", result.singular_values}},
                   {{"format", "flashlm-embedding"},
                    {"source", table.name},
                    {"centered", options.center ? "true" : "false"},
                    {"variance_kept", fixed(result.variance_kept, 6)}});
  // A row that all words share moves no probability.
  const double spread = rms_of(result.rows - result.rows.mean(0));
  std::printf(
      "%s: %lld x %lld, RMS %.4f, about the mean row %.4f: a tied output layer's first logits have a "
      "standard "
      "deviation of about %.2f\n",
      options.out.c_str(), static_cast<long long>(result.rows.size(0)),
      static_cast<long long>(result.rows.size(1)), rms_of(result.rows), spread,
      std::sqrt(static_cast<double>(options.dim)) * spread);
}

}  // namespace

void add_embeddings(CLI::App& flashlm) {
  auto options = std::make_shared<Options>();
  CLI::App* app = flashlm.add_subcommand(
      "embeddings",
      "Makes another model's token table as narrow as a FlashLM, for train_flashlm --init-embedding.");
  app->add_option("table", options->table, ".safetensors file with the table, such as GPT-2's")->required();
  app->add_option("--out", options->out, ".safetensors file to write")->required();
  app->add_option("--name", options->name, "the table's name; default: wte.weight or transformer.wte.weight");
  app->add_option("--dim", options->dim, "width of the model, d-model")->capture_default_str();
  app->add_option(
      "--map-from", options->map_from,
      "the table's tokenizer, as gpt2:FOLDER, where the model has another: each token gets the mean of the "
      "rows of its pieces");
  app->add_option("--tokenizer", options->tokenizer, "with --map-from: the model's tokenizer");
  app->add_flag("--center", options->center, "take the mean row off first; v3 did not");
  app->add_option(
         "--rms", options->rms,
         "size to give the result, for presets with embedding-std: that; default: as it comes, as in v3")
      ->check(CLI::PositiveNumber);
  app->callback([options] { run_embeddings(*options); });
}

}  // namespace flashlm
