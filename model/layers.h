// SPDX-License-Identifier: Apache-2.0
// The modules a FlashLM block is built of, in three kinds (config.block): FlashLM v3's, whose member names
// equal the keys of its state dict; 'matmulfree', the equations of "Scalable MatMul-free Language Modeling"
// (Zhu et al. 2024, arXiv 2406.02528); 'hgrn-bit', the code released with that paper, which differs from it.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "model/config.h"

namespace flashlm {

/// A parameter that not every model has, as the operators take it.
inline std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional(t) : std::nullopt;
}

/// RMSNorm with a learnt scale (D), see ops/rms_norm.h.
class RMSNormImpl : public torch::nn::Module {
 public:
  RMSNormImpl(int64_t width, double eps);
  at::Tensor forward(const at::Tensor& x);

  at::Tensor scale;

 private:
  double eps_;
};
TORCH_MODULE(RMSNorm);

/// Linear layer with ternary weights and straight-through gradients, see ops/bit_linear.h. `weight` (out, in)
/// holds the latent float values, drawn from N(0, std²). With config.packed there are in its place the
/// buffers `packed` and `scale` of ops/pack_ternary.h, without values until some are loaded. In blocks other
/// than v3's an RMSNorm with the learnt `norm_scale` (in) comes first, as part of the operator.
class BitLinearImpl : public torch::nn::Module {
 public:
  BitLinearImpl(int64_t in, int64_t out, double std, const ModelConfig& config, bool with_bias = false);
  at::Tensor forward(const at::Tensor& x);

  at::Tensor weight, norm_scale, bias;
  at::Tensor packed, scale;

 private:
  int64_t out_;
  std::string quantizer_, activation_, gradient_;
};
TORCH_MODULE(BitLinear);

/// Memory for the packed form of an (out, in) weight and its scale, without values.
std::tuple<at::Tensor, at::Tensor> empty_packed(int64_t out, int64_t in);

/// The epsilon of the norm inside a BitLinear and a ternary head: that of FusedBitLinear in the code released
/// with the MatMul-free LM (a default of its layer_norm_linear_quant_fn). Its later BitLinear has 1e-8.
constexpr double kLinearNormEps = 1e-6;

/// Weight (D, D/G, K) of a grouped causal convolution. v3's key for it is "conv.weight".
class CausalConv1dImpl : public torch::nn::Module {
 public:
  explicit CausalConv1dImpl(const ModelConfig& config);
  const at::Tensor& weight() const { return conv_->weight; }

 private:
  struct ConvImpl : torch::nn::Module {
    at::Tensor weight;
  };
  std::shared_ptr<ConvImpl> conv_;
};
TORCH_MODULE(CausalConv1d);

/// What mixes over time. It keeps of the tokens that it has seen state_lengths().size() tensors, the i-th
/// (B, state_lengths()[i], D); zeros mean that nothing came before.
class TokenMixer : public torch::nn::Module {
 public:
  /// x (B, T, D). `state`, if given, holds what precedes x, replaced by what precedes that which follows x.
  /// `lower_bound` (D) is undefined where there is none.
  virtual at::Tensor forward(at::Tensor x, at::Tensor* state, const at::Tensor& lower_bound) = 0;
  virtual std::vector<int64_t> state_lengths() const = 0;
};

/// 'conv': for each dilation, x = x + sigmoid(gate ⊛ norm(x)) · (value ⊛ norm(x)), then out_proj(x). Its
/// state is the last (K-1)·dilation inputs of every convolution.
class ConvMixer : public TokenMixer {
 public:
  ConvMixer(const ModelConfig& config, double out_std);
  at::Tensor forward(at::Tensor x, at::Tensor* state, const at::Tensor& lower_bound) override;
  std::vector<int64_t> state_lengths() const override;

 private:
  struct GatesImpl : torch::nn::Module {
    CausalConv1d conv_gate{nullptr}, conv_value{nullptr};
  };
  std::vector<std::shared_ptr<GatesImpl>> layers_;
  std::vector<RMSNorm> norms_;
  BitLinear out_proj_{nullptr};
  std::vector<int64_t> dilations_;
  int64_t kernel_size_, groups_;
  double eps_;
  std::string gradient_, precision_;
};

/// 'mlgru', the MatMul-free gated recurrent unit (see ops/mlgru.h), all projections ternary:
///   h = mlgru(sigmoid(f_proj(x)), SiLU(c_proj(x)));   o_proj(sigmoid(g_proj(x)) · h).
/// f, c, g and o have biases in 'matmulfree' blocks. In 'hgrn-bit' blocks f has a lower bound, and the end is
///   o_proj(g_norm(g_proj(x)) · SiLU(h)).
/// Its state is h.
class MlgruMixer : public TokenMixer {
 public:
  MlgruMixer(const ModelConfig& config, double in_std, double out_std);
  at::Tensor forward(at::Tensor x, at::Tensor* state, const at::Tensor& lower_bound) override;
  std::vector<int64_t> state_lengths() const override { return {1}; }

 private:
  BitLinear f_proj_{nullptr}, c_proj_{nullptr}, g_proj_{nullptr}, o_proj_{nullptr};
  RMSNorm g_norm_{nullptr};  // 'hgrn-bit' only
};

/// Mixes over channels: x + down(a(gate(n)) · up(n)), n = norm(x) if there is a norm, all three matrices
/// ternary, with a(g) = max(g, 0)² in 'v3' blocks, else SiLU. In 'hgrn-bit' blocks gate and up are one
/// matrix, gate_up_proj (2 H, D), with one scale.
class TernaryGLUImpl : public torch::nn::Module {
 public:
  TernaryGLUImpl(const ModelConfig& config, double in_std, double out_std);
  at::Tensor forward(const at::Tensor& x, RMSNorm norm);

 private:
  BitLinear gate_proj_{nullptr}, up_proj_{nullptr}, gate_up_proj_{nullptr}, down_proj_{nullptr};
  ModelConfig config_;
};
TORCH_MODULE(TernaryGLU);

/// x = x + token_mixer(norm1(x));  x = x + glu(norm2(x)). In 'matmulfree' blocks every BitLinear has its norm
/// and the block none.
class BlockImpl : public torch::nn::Module {
 public:
  BlockImpl(const ModelConfig& config, int64_t layer);
  at::Tensor forward(at::Tensor x, at::Tensor* state, const at::Tensor& lower_bound);

  std::vector<int64_t> state_lengths() const { return token_mixer_->state_lengths(); }

 private:
  RMSNorm norm1_{nullptr}, norm2_{nullptr};
  std::shared_ptr<TokenMixer> token_mixer_;
  TernaryGLU glu_{nullptr};
};
TORCH_MODULE(Block);

}  // namespace flashlm
