// SPDX-License-Identifier: Apache-2.0
// flashlm convert-head: a trained model with another output layer.
#include "model/convert_head.h"

#include <CLI/App.hpp>
#include <cstdio>

#include "data/error.h"
#include "tools/commands.h"
#include "train/checkpoint.h"
#include "train/run_folder.h"

namespace flashlm {

namespace {

struct Options {
  std::string run, head, class_file, out;
};

void run_convert_head(const Options& options) {
  if (std::filesystem::exists(options.out)) throw Error(options.out + " exists; choose another --out");
  std::optional<WordClasses> classes;
  if (!options.class_file.empty()) classes = WordClasses::load(options.class_file);
  const FlashLM model = load_any_model(RunFolder::weights(options.run));
  save_model(convert_head(model, options.head, classes), options.out);
  std::printf("%s: %s head, from the %s head of %s; train on from it with train_flashlm --init %s\n",
              options.out.c_str(), options.head.c_str(), model->config().head.c_str(), options.run.c_str(),
              options.out.c_str());
}

}  // namespace

void add_convert_head(CLI::App& flashlm) {
  auto options = std::make_shared<Options>();
  CLI::App* app = flashlm.add_subcommand(
      "convert-head", "Gives a trained model a full softmax for a hierarchical one, or the other way round.");
  app->add_option("run", options->run, "run folder, or a .safetensors file of weights")->required();
  app->add_option("--head", options->head, "the new head: 'full' or 'hierarchical'")->required();
  app->add_option("--class-file", options->class_file,
                  "classes of a hierarchical head, from flashlm classes");
  app->add_option("--out", options->out, ".safetensors file to write")->required();
  app->callback([options] { run_convert_head(*options); });
}

}  // namespace flashlm
