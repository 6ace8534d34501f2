// SPDX-License-Identifier: Apache-2.0
#include "train/checkpoint.h"

#include <nlohmann/json.hpp>

#include "data/error.h"
#include "model/safetensors.h"

namespace flashlm {

namespace {

constexpr const char* kFormat = "flashlm-checkpoint-1";
const std::string kModelPrefix = "model.";

SafeTensors load(const std::filesystem::path& path) {
  SafeTensors file = load_safetensors(path);
  if (file.metadata["format"] != kFormat) {
    throw Error(path.string() + " is not a checkpoint of this version (" + kFormat + "), got '" +
                file.metadata["format"] + "'");
  }
  return file;
}

TensorMap model_weights(const SafeTensors& file) {
  TensorMap weights;
  for (const auto& [name, tensor] : file.tensors) {
    if (name.rfind(kModelPrefix, 0) == 0) weights[name.substr(kModelPrefix.size())] = tensor;
  }
  return weights;
}

}  // namespace

void save_checkpoint(const std::filesystem::path& path, const Checkpointed& state) {
  TensorMap tensors = state.optimizers.state();
  for (const auto& [name, tensor] : state.model->named_weights()) tensors[kModelPrefix + name] = tensor;
  if (state.ema != nullptr) tensors.merge(state.ema->state());
  tensors["generator"] = state.generator.get_state();
  const nlohmann::json progress = {{"step", state.progressed.step},
                                   {"tokens", state.progressed.tokens},
                                   {"train_seconds", state.progressed.train_seconds},
                                   {"nll_sum", state.progressed.nll_sum},
                                   {"nll_steps", state.progressed.nll_steps},
                                   {"sampler", state.sampler.state()}};
  save_safetensors(
      path, tensors,
      {{"format", kFormat}, {"config", to_json(state.model->config())}, {"progress", progress.dump()}});
}

void load_checkpoint(const std::filesystem::path& path, const Checkpointed& state) {
  const SafeTensors file = load(path);
  // Read and written again: an older file names fewer settings.
  if (to_json(model_config_from_json(file.metadata.at("config"))) != to_json(state.model->config())) {
    throw Error(path.string() +
                " is of a model with other settings; resume with the run's own config.toml (leave out " +
                "--config and model flags)");
  }
  load_weights(state.model, model_weights(file), path.string());
  state.optimizers.load_state(file.tensors);
  if (state.ema != nullptr) state.ema->load_state(file.tensors);
  state.generator.set_state(file.tensors.at("generator"));
  const auto progress = nlohmann::json::parse(file.metadata.at("progress"));
  state.sampler.set_state(progress.at("sampler"));
  state.progressed = {progress.at("step"), progress.at("tokens"), progress.at("train_seconds"),
                      progress.at("nll_sum"), progress.at("nll_steps")};
}

FlashLM load_any_model(const std::filesystem::path& path) {
  const auto metadata = map_safetensors(path, [](const std::string&) { return false; }).metadata;
  const auto format = metadata.find("format");
  if (format == metadata.end() || format->second != kFormat) return load_model(path);
  const SafeTensors file = load_safetensors(path);
  FlashLM model(model_config_from_json(file.metadata.at("config")));
  load_weights(model, model_weights(file), path.string());
  return model;
}

}  // namespace flashlm
