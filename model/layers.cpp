// SPDX-License-Identifier: Apache-2.0
#include "model/layers.h"

#include <ATen/record_function.h>

#include "ops/ops.h"

namespace flashlm {

namespace {

// v3 starts the two projections that end a branch at this size. Ternarising is scale-free under 'threshold',
// where it only makes them flip sooner; under 'absmean' it makes each branch start small.
constexpr double kBranchEndStd = 0.01;

at::Tensor normal(at::IntArrayRef shape, double std) { return torch::randn(shape) * std; }

}  // namespace

RMSNormImpl::RMSNormImpl(int64_t width, double eps) : eps_(eps) {
  scale = register_parameter("scale", torch::ones({width}));
}

at::Tensor RMSNormImpl::forward(const at::Tensor& x) { return rms_norm(x, scale, eps_); }

BitLinearImpl::BitLinearImpl(int64_t in, int64_t out, double std, const ModelConfig& config)
    : quantizer_(config.quantizer), activation_(config.activation), gradient_(config.gradient) {
  weight = register_parameter("weight", normal({out, in}, std));
}

at::Tensor BitLinearImpl::forward(const at::Tensor& x) {
  return bit_linear(x, weight, /*norm_scale=*/std::nullopt, quantizer_, activation_, /*eps=*/0, gradient_);
}

CausalConv1dImpl::CausalConv1dImpl(const ModelConfig& config) {
  const int64_t in = config.d_model / config.groups, taps = config.kernel_size;
  conv_ = register_module("conv", std::make_shared<ConvImpl>());
  const double std = 1 / std::sqrt(static_cast<double>(in * taps));
  conv_->weight = conv_->register_parameter("weight", normal({config.d_model, in, taps}, std));
}

ConvMixerImpl::ConvMixerImpl(const ModelConfig& config)
    : dilations_(config.dilations), groups_(config.groups), eps_(config.norm_eps) {
  torch::nn::ModuleList layers, norms;
  register_module("layers", layers);
  register_module("norms", norms);
  for (size_t i = 0; i < dilations_.size(); ++i) {
    auto gates = std::make_shared<GatesImpl>();
    gates->conv_gate = gates->register_module("conv_gate", CausalConv1d(config));
    gates->conv_value = gates->register_module("conv_value", CausalConv1d(config));
    layers->push_back(gates);
    layers_.push_back(gates);
    norms_.push_back(RMSNorm(config.d_model, config.norm_eps));
    norms->push_back(norms_.back());
  }
  out_proj_ = register_module("out_proj", BitLinear(config.d_model, config.d_model, kBranchEndStd, config));
}

at::Tensor ConvMixerImpl::forward(at::Tensor x, at::Tensor* history) {
  RECORD_USER_SCOPE("mixer");
  for (size_t i = 0; i < layers_.size(); ++i) {
    std::optional<at::Tensor> before;
    const at::Tensor input = x;
    if (history != nullptr) before = history[i];
    x = gated_conv(x, norms_[i]->scale, layers_[i]->conv_gate->weight(), layers_[i]->conv_value->weight(),
                   before, dilations_[i], groups_, eps_);
    if (history != nullptr) {
      const int64_t kept = history[i].size(1);
      history[i] = torch::cat({history[i], input}, 1).slice(1, input.size(1), input.size(1) + kept);
    }
  }
  return out_proj_(x);
}

TernaryGLUImpl::TernaryGLUImpl(const ModelConfig& config) {
  const int64_t d = config.d_model, inner = config.d_inner;
  const double std = 1 / std::sqrt(static_cast<double>(d));
  gate_proj_ = register_module("gate_proj", BitLinear(d, inner, std, config));
  up_proj_ = register_module("up_proj", BitLinear(d, inner, std, config));
  down_proj_ = register_module("down_proj", BitLinear(inner, d, kBranchEndStd, config));
}

at::Tensor TernaryGLUImpl::forward(const at::Tensor& x) {
  RECORD_USER_SCOPE("glu");
  return down_proj_(relu2_glu(gate_proj_(x), up_proj_(x)));
}

BlockImpl::BlockImpl(const ModelConfig& config) {
  norm1_ = register_module("norm1", RMSNorm(config.d_model, config.norm_eps));
  token_mixer_ = register_module("token_mixer", ConvMixer(config));
  norm2_ = register_module("norm2", RMSNorm(config.d_model, config.norm_eps));
  glu_ = register_module("glu", TernaryGLU(config));
  if (config.router) {
    auto linear = torch::nn::Linear(config.d_model, 1);
    torch::nn::init::zeros_(linear->weight);
    torch::nn::init::ones_(linear->bias);
    struct RouterImpl : torch::nn::Module {};
    register_module("router", std::make_shared<RouterImpl>())->register_module("linear", linear);
  }
}

at::Tensor BlockImpl::forward(at::Tensor x, at::Tensor* history) {
  x = x + token_mixer_(norm1_(x), history);
  return x + glu_(norm2_(x));
}

}  // namespace flashlm
