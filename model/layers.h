// SPDX-License-Identifier: Apache-2.0
// The modules a FlashLM block is built of. Member names equal the keys of FlashLM v3's state dict.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/pimpl.h>

#include "model/config.h"

namespace flashlm {

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
/// holds the latent float values, drawn from N(0, std²).
class BitLinearImpl : public torch::nn::Module {
 public:
  BitLinearImpl(int64_t in, int64_t out, double std, const ModelConfig& config);
  at::Tensor forward(const at::Tensor& x);

  at::Tensor weight;

 private:
  std::string quantizer_, activation_, gradient_;
};
TORCH_MODULE(BitLinear);

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

/// Mixes over time: for each dilation, x = x + sigmoid(gate ⊛ norm(x)) · (value ⊛ norm(x)), then out_proj(x).
class ConvMixerImpl : public torch::nn::Module {
 public:
  explicit ConvMixerImpl(const ModelConfig& config);

  /// x (B, T, D). `history`, if given, holds one (B, (K-1)·dilation, D) tensor per dilation: the inputs that
  /// precede x, replaced by those that precede what follows x.
  at::Tensor forward(at::Tensor x, at::Tensor* history);

 private:
  struct GatesImpl : torch::nn::Module {
    CausalConv1d conv_gate{nullptr}, conv_value{nullptr};
  };
  std::vector<std::shared_ptr<GatesImpl>> layers_;
  std::vector<RMSNorm> norms_;
  BitLinear out_proj_{nullptr};
  std::vector<int64_t> dilations_;
  int64_t groups_;
  double eps_;
};
TORCH_MODULE(ConvMixer);

/// Mixes over channels: down(max(gate(x), 0)² · up(x)), all three ternary.
class TernaryGLUImpl : public torch::nn::Module {
 public:
  explicit TernaryGLUImpl(const ModelConfig& config);
  at::Tensor forward(const at::Tensor& x);

 private:
  BitLinear gate_proj_{nullptr}, up_proj_{nullptr}, down_proj_{nullptr};
};
TORCH_MODULE(TernaryGLU);

/// x = x + token_mixer(norm1(x));  x = x + glu(norm2(x)).
class BlockImpl : public torch::nn::Module {
 public:
  explicit BlockImpl(const ModelConfig& config);
  at::Tensor forward(at::Tensor x, at::Tensor* history);

 private:
  RMSNorm norm1_{nullptr}, norm2_{nullptr};
  ConvMixer token_mixer_{nullptr};
  TernaryGLU glu_{nullptr};
};
TORCH_MODULE(Block);

}  // namespace flashlm
