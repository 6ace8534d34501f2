// SPDX-License-Identifier: Apache-2.0
// What a FlashLM is made of: one struct, in which each setting is declared once with its name and its
// meaning.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flashlm {

/// Symbols: D d_model, H d_inner, V vocab_size, K kernel_size, G groups.
struct ModelConfig {
  int64_t vocab_size = 50257;
  int64_t d_model = 256;
  int64_t d_inner = 683;
  int64_t layers = 1;
  int64_t recursions = 2;
  int64_t kernel_size = 4;
  int64_t groups = 16;
  std::vector<int64_t> dilations = {1, 4, 64};
  std::string block = "v3";
  std::vector<std::string> mixers = {"conv"};
  std::string quantizer = "threshold";
  std::string activation = "none";
  std::string gradient = "float32";
  std::string conv_precision = "float32";
  std::string recompute = "none";
  bool packed = false;
  double norm_eps = 1e-8;
  double embedding_std = 0.02;
  double embedding_scale = 1.0;
  bool router = true;
  std::string head = "full";
  bool tied = true;
  bool head_bias = false;
  int64_t classes = 0;
  std::vector<int64_t> cutoffs = {2000, 10000};
  int64_t tail_divisor = 4;
  std::string head_precision = "float32";
  std::string head_quantizer = "none";

  /// Calls visitor(name, field, help) for every setting: the one list behind flags, TOML keys and saved
  /// files.
  template <class Visitor>
  void visit(Visitor&& visitor) {
    visitor("vocab-size", vocab_size, "V, entries of the vocabulary; prepared data brings its own");
    visitor("d-model", d_model, "D, width of the residual stream");
    visitor("d-inner", d_inner, "H, width inside the gated linear unit");
    visitor("layers", layers, "blocks with weights of their own");
    visitor("recursions", recursions, "times that the stack of blocks is run over, with the same weights");
    visitor("kernel-size", kernel_size, "K, taps of each causal convolution");
    visitor("groups", groups, "G, groups of each causal convolution");
    visitor("dilations", dilations, "dilation of each gated convolution of a mixer, in order");
    visitor(
        "block", block,
        "'v3', 'matmulfree' (arXiv 2406.02528) or 'hgrn-bit' (the code released with it): model/layers.h");
    visitor("mixers", mixers, "'conv' or 'mlgru', of each layer in turn: conv,mlgru alternates");
    visitor("quantizer", quantizer,
            "ternary weights: 'absmean' (scaled, BitNet b1.58) or 'threshold' (unscaled, v3)");
    visitor("activation", activation, "input of ternary layers: 'int8' (per row) or 'none' (float, v3)");
    visitor(
        "gradient", gradient,
        "products of the backward pass of ternary layers: 'float32', 'bfloat16' or 'int8' (with activation "
        "'int8'); and of gated convolutions: 'float32', else in bfloat16");
    visitor("conv-precision", conv_precision,
            "products of gated convolutions, but for those of `gradient`: 'float32' or 'bfloat16' where the "
            "CPU has it");
    visitor("recompute", recompute,
            "a block's activations are made again for its gradients, from its input, kept as 'float32' or "
            "'bfloat16'; 'none': kept");
    visitor("packed", packed, "ternary weights in 2 bits, for inference; made by `flashlm pack`");
    visitor("norm-eps", norm_eps, "epsilon of the RMSNorms, but for those inside ternary layers: 1e-6");
    visitor("embedding-std", embedding_std, "standard deviation of the embedding table at the start");
    visitor("embedding-scale", embedding_scale,
            "factor on looked-up embeddings (not on the tied output layer)");
    visitor("router", router,
            "v3's router, which nothing reads: only to count and load parameters as v3 does");
    visitor(
        "head", head,
        "output layer: 'full' softmax, 'hierarchical' (class, then word) or 'adaptive' (Grave et al. 2017)");
    visitor("tied", tied, "the embedding is also the table of output words (never of an adaptive head)");
    visitor("head-bias", head_bias, "biases in the head, which start at the logarithms of the frequencies");
    visitor("classes", classes,
            "C, classes of a hierarchical head; 0: sqrt(V), or as many as --class-file has");
    visitor("cutoffs", cutoffs, "first ranks by frequency of an adaptive head's tails");
    visitor("tail-divisor", tail_divisor, "an adaptive head's tail i works in D / divisor^i dimensions");
    visitor("head-precision", head_precision,
            "products of the head in training and evaluation: 'float32' or 'bfloat16' where the CPU has it");
    visitor("head-quantizer", head_quantizer,
            "'absmean': a full head of its own weights is ternary as well; 'none'");
  }

  /// 'conv' or 'mlgru': mixers in turn.
  const std::string& mixer(int64_t layer) const { return mixers[layer % mixers.size()]; }
  bool has_mixer(const std::string& name) const;

  /// C: `classes`, or if that is 0 the square root of V, which costs least.
  int64_t class_count() const;

  /// Throws Error naming the first setting that cannot be.
  void validate() const;
};

/// As a JSON object, the form stored with the weights.
std::string to_json(const ModelConfig& config);
ModelConfig model_config_from_json(const std::string& json);

}  // namespace flashlm
