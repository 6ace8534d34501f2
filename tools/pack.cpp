// SPDX-License-Identifier: Apache-2.0
// flashlm pack: a trained model for inference, its ternary weights in 2 bits.
#include "model/pack.h"

#include <CLI/App.hpp>
#include <cstdio>

#include "data/error.h"
#include "tools/commands.h"
#include "train/checkpoint.h"
#include "train/config.h"
#include "train/run_folder.h"

namespace flashlm {

namespace {

struct Options {
  std::string run, random, out;
};

void run_pack(const Options& options) {
  if (options.run.empty() == options.random.empty()) {
    throw Error("give either a run folder or a .safetensors file, or --random CONFIG.toml");
  }
  if (std::filesystem::exists(options.out)) throw Error(options.out + " exists; choose another --out");
  const FlashLM model = options.random.empty() ? pack(load_any_model(RunFolder::weights(options.run)))
                                               : random_packed(model_config_from_toml(options.random));
  save_model(model, options.out);
  std::printf("%s: %.1f MB, for flashlm generate, evaluate and export\n", options.out.c_str(),
              static_cast<double>(std::filesystem::file_size(options.out)) * 1e-6);
}

}  // namespace

void add_pack(CLI::App& flashlm) {
  auto options = std::make_shared<Options>();
  CLI::App* app = flashlm.add_subcommand(
      "pack", "Writes a trained model with its ternary weights in 2 bits, for inference.");
  app->add_option("run", options->run, "run folder, or a .safetensors file of weights");
  app->add_option("--random", options->random,
                  "instead of a run: a TOML file of settings, whose model gets random weights");
  app->add_option("--out", options->out, ".safetensors file to write")->required();
  app->callback([options] { run_pack(*options); });
}

}  // namespace flashlm
