// SPDX-License-Identifier: Apache-2.0
// flashlm export: a trained run as one TorchScript file with its tokenizer inside.
#include <CLI/App.hpp>
#include <cstdio>

#include "data/error.h"
#include "data/file.h"
#include "model/torchscript.h"
#include "tools/commands.h"
#include "train/checkpoint.h"
#include "train/run_folder.h"

namespace flashlm {

namespace {

void run_export(const std::string& run, std::filesystem::path out) {
  const auto weights = RunFolder::weights(run);
  const RunFolder folder = RunFolder::of(run);
  if (out.empty()) {
    out = std::filesystem::is_directory(run) ? folder.torchscript()
                                             : std::filesystem::path(weights).replace_extension(".pt");
  }
  std::string tokenizer;
  if (std::filesystem::exists(folder.tokenizer())) tokenizer = read_file(folder.tokenizer());
  export_torchscript(load_any_model(weights), tokenizer, out);
  std::printf("%s: TorchScript, %.1f MB, %s tokenizer, from %s\n", out.c_str(),
              static_cast<double>(std::filesystem::file_size(out)) * 1e-6,
              tokenizer.empty() ? "without a" : "with its", weights.c_str());
}

}  // namespace

void add_export(CLI::App& flashlm) {
  struct Options {
    std::string run, out;
  };
  auto options = std::make_shared<Options>();
  CLI::App* app = flashlm.add_subcommand("export", "Writes a trained model as a TorchScript file.");
  app->add_option("run", options->run, "run folder, or a .safetensors file of weights")->required();
  app->add_option(
      "--out", options->out,
      "file to write; default: model.pt in the run folder, or beside a .safetensors file its name with .pt");
  app->callback([options] { run_export(options->run, options->out); });
}

}  // namespace flashlm
