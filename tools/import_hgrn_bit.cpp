// SPDX-License-Identifier: Apache-2.0
// flashlm import-hgrn-bit: a checkpoint released with the MatMul-free LM as a FlashLM model.
#include <CLI/App.hpp>
#include <cstdio>

#include "data/error.h"
#include "data/file.h"
#include "model/hgrn_bit.h"
#include "tools/commands.h"
#include "tools/open_tokenizer.h"
#include "train/run_folder.h"

namespace flashlm {

namespace {

struct Options {
  std::vector<std::string> files;
  std::string tokenizer, out;
};

void run_import(const Options& options) {
  const RunFolder folder(options.out);
  if (std::filesystem::exists(options.out)) throw Error(options.out + " exists; choose another --out");
  std::map<std::string, at::Tensor> tensors;
  for (const std::string& file : options.files) {
    for (auto& [name, tensor] : map_safetensors(file).tensors) {
      if (!tensors.emplace(name, tensor).second)
        throw Error(file + ": tensor '" + name + "' is in two files");
    }
  }
  const FlashLM model = from_hgrn_bit(tensors, options.files.front());
  const ModelConfig& config = model->config();
  std::string tokenizer;
  if (!options.tokenizer.empty()) {
    const auto opened = open_tokenizer(options.tokenizer);
    if (opened->vocab_size() != config.vocab_size) {
      throw Error(options.tokenizer + " must have the model's " + std::to_string(config.vocab_size) +
                  " entries, got " + std::to_string(opened->vocab_size()));
    }
    tokenizer = opened->serialized();
  }
  std::filesystem::create_directories(options.out);
  if (!tokenizer.empty()) write_file(folder.tokenizer(), tokenizer);
  save_model(model, folder.model());
  std::printf("%s: MatMul-free LM of %lld layers, %lld x %lld, %.0fM parameters, %s tokenizer\n",
              options.out.c_str(), static_cast<long long>(config.layers),
              static_cast<long long>(config.vocab_size), static_cast<long long>(config.d_model),
              static_cast<double>(model->parameter_count()) * 1e-6,
              tokenizer.empty() ? "without a" : "with its");
}

}  // namespace

void add_import_hgrn_bit(CLI::App& flashlm) {
  auto options = std::make_shared<Options>();
  CLI::App* app = flashlm.add_subcommand(
      "import-hgrn-bit", "Makes a run folder of a checkpoint released with the MatMul-free LM (HGRNBit).");
  app->add_option("files", options->files, "its .safetensors file, or all the parts")->required();
  app->add_option("--tokenizer", options->tokenizer, "gpt2:FOLDER, a tokenizer file, or a folder with one");
  app->add_option("--out", options->out, "run folder to make")->required();
  app->callback([options] { run_import(*options); });
}

}  // namespace flashlm
