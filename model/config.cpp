// SPDX-License-Identifier: Apache-2.0
#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

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
  require(block == "v3" || block == "matmulfree" || block == "hgrn-bit",
          "block must be 'v3', 'matmulfree' or 'hgrn-bit'", "'" + block + "'");
  require(!mixers.empty(), "mixers must name at least one", "none");
  for (const std::string& mixer : mixers) {
    require(mixer == "conv" || mixer == "mlgru", "each of mixers must be 'conv' or 'mlgru'",
            "'" + mixer + "'");
  }
  require(static_cast<int64_t>(mixers.size()) <= layers,
          "mixers must name at most one for each of layers = " + std::to_string(layers),
          std::to_string(mixers.size()));
  if (has_mixer("conv")) {
    at_least_1("kernel-size", kernel_size);
    at_least_1("groups", groups);
    for (int64_t dilation : dilations) at_least_1("each of dilations", dilation);
    require(!dilations.empty(), "dilations must name at least one convolution", "none");
    require(d_model % groups == 0, "groups must divide d-model = " + std::to_string(d_model),
            std::to_string(groups));
  }
  require(quantizer == "absmean" || quantizer == "threshold", "quantizer must be 'absmean' or 'threshold'",
          "'" + quantizer + "'");
  require(activation == "int8" || activation == "none", "activation must be 'int8' or 'none'",
          "'" + activation + "'");
  require(gradient == "float32" || gradient == "bfloat16" || gradient == "int8",
          "gradient must be 'float32', 'bfloat16' or 'int8'", "'" + gradient + "'");
  require(gradient != "int8" || activation == "int8", "gradient 'int8' needs activation 'int8'",
          "'" + activation + "'");
  require(conv_precision == "float32" || conv_precision == "bfloat16",
          "conv-precision must be 'float32' or 'bfloat16'", "'" + conv_precision + "'");
  require(recompute == "none" || recompute == "float32" || recompute == "bfloat16",
          "recompute must be 'none', 'float32' or 'bfloat16'", "'" + recompute + "'");
  require(head == "full" || head == "hierarchical" || head == "adaptive",
          "head must be 'full', 'hierarchical' or 'adaptive'", "'" + head + "'");
  require(classes >= 0 && classes <= vocab_size,
          "classes must be in [0, V] = [0, " + std::to_string(vocab_size) + "]", std::to_string(classes));
  if (head == "adaptive") {
    require(!cutoffs.empty(), "cutoffs must name at least one tail", "none");
    for (size_t i = 0; i < cutoffs.size(); ++i) {
      require(cutoffs[i] > (i == 0 ? 0 : cutoffs[i - 1]) && cutoffs[i] < vocab_size,
              "cutoffs must rise within (0, V) = (0, " + std::to_string(vocab_size) + ")",
              std::to_string(cutoffs[i]));
    }
    at_least_1("tail-divisor", tail_divisor);
  }
  require(head_precision == "float32" || head_precision == "bfloat16",
          "head-precision must be 'float32' or 'bfloat16'", "'" + head_precision + "'");
  require(head_quantizer == "none" || head_quantizer == "absmean",
          "head-quantizer must be 'none' or 'absmean'", "'" + head_quantizer + "'");
  require(head_quantizer == "none" || (head == "full" && !tied),
          "head-quantizer 'absmean' needs head 'full' and tied false",
          "'" + head + "' and " + (tied ? "true" : "false"));
  require(norm_eps >= 0, "norm-eps must be >= 0", std::to_string(norm_eps));
  require(embedding_std >= 0, "embedding-std must be >= 0", std::to_string(embedding_std));
}

bool ModelConfig::has_mixer(const std::string& name) const {
  return std::find(mixers.begin(), mixers.end(), name) != mixers.end();
}

int64_t ModelConfig::class_count() const {
  if (classes > 0) return classes;
  return std::llround(std::sqrt(static_cast<double>(vocab_size)));
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
    // Younger than the oldest files, whose weights mean what these settings are by default.
    static const std::set<std::string> young = {
        "gradient",       "head",  "tied",   "head-bias", "classes", "cutoffs",        "tail-divisor",
        "head-precision", "block", "mixers", "recompute", "packed",  "head-quantizer", "conv-precision"};
    config.visit([&](const char* name, auto& field, const char*) {
      if (young.contains(name) && !json.contains(name)) return;
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
