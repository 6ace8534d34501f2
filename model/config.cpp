// SPDX-License-Identifier: Apache-2.0
#include "model/config.h"

#include <nlohmann/json.hpp>

#include "data/error.h"

namespace flashlm {

namespace {

void require(bool holds, const std::string& rule, const std::string& got) {
  if (!holds) throw Error("model settings: " + rule + ", got " + got);
}

}  // namespace

void ModelConfig::validate() const {
  const auto at_least_1 = [](const char* name, int64_t value) {
    require(value >= 1, std::string(name) + " must be at least 1", std::to_string(value));
  };
  at_least_1("vocab-size", vocab_size);
  at_least_1("d-model", d_model);
  at_least_1("d-inner", d_inner);
  at_least_1("layers", layers);
  at_least_1("recursions", recursions);
  at_least_1("kernel-size", kernel_size);
  at_least_1("groups", groups);
  for (int64_t dilation : dilations) at_least_1("each of dilations", dilation);
  require(!dilations.empty(), "dilations must name at least one convolution", "none");
  require(d_model % groups == 0, "groups must divide d-model = " + std::to_string(d_model),
          std::to_string(groups));
  require(quantizer == "absmean" || quantizer == "threshold", "quantizer must be 'absmean' or 'threshold'",
          "'" + quantizer + "'");
  require(activation == "int8" || activation == "none", "activation must be 'int8' or 'none'",
          "'" + activation + "'");
  require(gradient == "float32" || gradient == "bfloat16" || gradient == "int8",
          "gradient must be 'float32', 'bfloat16' or 'int8'", "'" + gradient + "'");
  require(gradient != "int8" || activation == "int8", "gradient 'int8' needs activation 'int8'",
          "'" + activation + "'");
  require(norm_eps >= 0, "norm-eps must be >= 0", std::to_string(norm_eps));
  require(embedding_std >= 0, "embedding-std must be >= 0", std::to_string(embedding_std));
}

std::string to_json(const ModelConfig& config) {
  nlohmann::json json;
  ModelConfig(config).visit([&](const char* name, const auto& field, const char*) { json[name] = field; });
  return json.dump();
}

ModelConfig model_config_from_json(const std::string& text) {
  ModelConfig config;
  try {
    const auto json = nlohmann::json::parse(text);
    size_t known = 0;
    config.visit([&](const char* name, auto& field, const char*) {
      // Younger than the oldest files, and no part of what their weights mean.
      if (std::string_view(name) == "gradient" && !json.contains(name)) return;
      json.at(name).get_to(field);
      ++known;
    });
    // A setting that this version does not know could change what the weights mean.
    if (json.size() != known) throw Error("it holds a setting this version does not know");
  } catch (const std::exception& error) {
    throw Error(std::string("unreadable model settings (written by another version?): ") + error.what());
  }
  config.validate();
  return config;
}

}  // namespace flashlm
