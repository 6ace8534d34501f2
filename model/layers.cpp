// SPDX-License-Identifier: Apache-2.0
#include "model/layers.h"

#include <ATen/record_function.h>

#include "ops/ops.h"

namespace flashlm {

namespace {

at::Tensor normal(at::IntArrayRef shape, double std) { return torch::randn(shape) * std; }

/// Standard deviations of a block's matrices at the start: of those that begin a branch, and of those that
/// end one.
struct InitialStd {
  double in, out;
};

/// v3 ends branches at 0.01. Ternarising is scale-free under 'threshold', where that only makes weights flip
/// sooner; under 'absmean' it makes each branch start small. The released code of the MatMul-free LM has
/// 0.02, divided by sqrt(2 L) where a branch ends.
InitialStd initial_std(const ModelConfig& config) {
  if (config.block == "v3") return {1 / std::sqrt(static_cast<double>(config.d_model)), 0.01};
  return {0.02, 0.02 / std::sqrt(2.0 * static_cast<double>(config.layers * config.recursions))};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> empty_packed(int64_t out, int64_t in) {
  const auto [packed, scale] = pack_ternary(at::empty({out, in}, at::device(at::kMeta)));
  return {at::empty(packed.sizes(), at::kByte), at::empty({}, at::kFloat)};
}

RMSNormImpl::RMSNormImpl(int64_t width, double eps) : eps_(eps) {
  scale = register_parameter("scale", torch::ones({width}));
}

at::Tensor RMSNormImpl::forward(const at::Tensor& x) { return rms_norm(x, scale, eps_); }

BitLinearImpl::BitLinearImpl(int64_t in, int64_t out, double std, const ModelConfig& config, bool with_bias)
    : out_(out), quantizer_(config.quantizer), activation_(config.activation), gradient_(config.gradient) {
  if (config.packed) {
    std::tie(packed, scale) = empty_packed(out, in);
    register_buffer("packed", packed);
    register_buffer("scale", scale);
  } else {
    weight = register_parameter("weight", normal({out, in}, std));
  }
  if (config.block != "v3") norm_scale = register_parameter("norm_scale", torch::ones({in}));
  if (with_bias) bias = register_parameter("bias", torch::zeros({out}));
}

at::Tensor BitLinearImpl::forward(const at::Tensor& x) {
  const auto norm = optional(norm_scale);
  const at::Tensor y = packed.defined()
                           ? packed_linear(x, packed, scale, out_, norm, activation_, kLinearNormEps)
                           : bit_linear(x, weight, norm, quantizer_, activation_, kLinearNormEps, gradient_);
  return bias.defined() ? y + bias : y;
}

CausalConv1dImpl::CausalConv1dImpl(const ModelConfig& config) {
  const int64_t in = config.d_model / config.groups, taps = config.kernel_size;
  conv_ = register_module("conv", std::make_shared<ConvImpl>());
  const double std = 1 / std::sqrt(static_cast<double>(in * taps));
  conv_->weight = conv_->register_parameter("weight", normal({config.d_model, in, taps}, std));
}

ConvMixer::ConvMixer(const ModelConfig& config, double out_std)
    : dilations_(config.dilations),
      kernel_size_(config.kernel_size),
      groups_(config.groups),
      eps_(config.norm_eps),
      gradient_(config.gradient == "float32" ? "float32" : "bfloat16"),
      precision_(config.conv_precision) {
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
  out_proj_ = register_module("out_proj", BitLinear(config.d_model, config.d_model, out_std, config));
}

at::Tensor ConvMixer::forward(at::Tensor x, at::Tensor* state, const at::Tensor& /*lower_bound*/) {
  RECORD_USER_SCOPE("mixer");
  for (size_t i = 0; i < layers_.size(); ++i) {
    std::optional<at::Tensor> before;
    const at::Tensor input = x;
    if (state != nullptr) before = state[i];
    x = gated_conv(x, norms_[i]->scale, layers_[i]->conv_gate->weight(), layers_[i]->conv_value->weight(),
                   before, dilations_[i], groups_, eps_, gradient_, precision_);
    if (state != nullptr) {
      const int64_t kept = state[i].size(1);
      state[i] = torch::cat({state[i], input}, 1).slice(1, input.size(1), input.size(1) + kept);
    }
  }
  return out_proj_(x);
}

std::vector<int64_t> ConvMixer::state_lengths() const {
  std::vector<int64_t> lengths;
  for (const int64_t dilation : dilations_) lengths.push_back((kernel_size_ - 1) * dilation);
  return lengths;
}

MlgruMixer::MlgruMixer(const ModelConfig& config, double in_std, double out_std) {
  const int64_t d = config.d_model;
  const bool with_bias = config.block == "matmulfree";
  f_proj_ = register_module("f_proj", BitLinear(d, d, in_std, config, with_bias));
  c_proj_ = register_module("c_proj", BitLinear(d, d, in_std, config, with_bias));
  g_proj_ = register_module("g_proj", BitLinear(d, d, in_std, config, with_bias));
  o_proj_ = register_module("o_proj", BitLinear(d, d, out_std, config, with_bias));
  if (config.block == "hgrn-bit") g_norm_ = register_module("g_norm", RMSNorm(d, config.norm_eps));
}

at::Tensor MlgruMixer::forward(at::Tensor x, at::Tensor* state, const at::Tensor& lower_bound) {
  at::Tensor f, c, h, last;
  {
    RECORD_USER_SCOPE("mixer");
    f = f_proj_(x);
    c = c_proj_(x);
  }
  {
    RECORD_USER_SCOPE("mlgru");
    std::optional<at::Tensor> before;
    if (state != nullptr) before = state->squeeze(1);
    std::tie(h, last) = mlgru(f, c, before, optional(lower_bound), "silu");
  }
  if (state != nullptr) *state = last.unsqueeze(1);
  RECORD_USER_SCOPE("mixer");
  const at::Tensor g = g_proj_(x);
  return o_proj_(g_norm_ ? silu_glu(h, g_norm_(g)) : sigmoid_glu(g, h));
}

TernaryGLUImpl::TernaryGLUImpl(const ModelConfig& config, double in_std, double out_std) : config_(config) {
  const int64_t d = config.d_model, inner = config.d_inner;
  if (config.block == "hgrn-bit") {
    gate_up_proj_ = register_module("gate_up_proj", BitLinear(d, 2 * inner, in_std, config));
  } else {
    gate_proj_ = register_module("gate_proj", BitLinear(d, inner, in_std, config));
    up_proj_ = register_module("up_proj", BitLinear(d, inner, in_std, config));
  }
  down_proj_ = register_module("down_proj", BitLinear(inner, d, out_std, config));
}

at::Tensor TernaryGLUImpl::forward(const at::Tensor& x, RMSNorm norm) {
  RECORD_USER_SCOPE("glu");
  const bool is_v3 = config_.block == "v3";
  if (gate_proj_ && !config_.packed) {
    return ternary_glu(x, gate_proj_->weight, up_proj_->weight, down_proj_->weight,
                       is_v3 ? norm->scale : gate_proj_->norm_scale, optional(up_proj_->norm_scale),
                       optional(down_proj_->norm_scale), is_v3 ? "relu2" : "silu", config_.quantizer,
                       config_.activation, is_v3 ? config_.norm_eps : kLinearNormEps, config_.gradient);
  }
  const at::Tensor n = norm ? norm(x) : x;
  if (gate_up_proj_) {
    const auto halves = gate_up_proj_(n).chunk(2, -1);
    return x + down_proj_(silu_glu(halves[0], halves[1]));
  }
  const at::Tensor gate = gate_proj_(n), up = up_proj_(n);
  return x + down_proj_(is_v3 ? relu2_glu(gate, up) : silu_glu(gate, up));
}

BlockImpl::BlockImpl(const ModelConfig& config, int64_t layer) {
  const InitialStd std = initial_std(config);
  const bool has_norms = config.block != "matmulfree";
  if (has_norms) norm1_ = register_module("norm1", RMSNorm(config.d_model, config.norm_eps));
  if (config.mixer(layer) == "mlgru") {
    token_mixer_ = std::make_shared<MlgruMixer>(config, std.in, std.out);
  } else {
    token_mixer_ = std::make_shared<ConvMixer>(config, std.out);
  }
  register_module("token_mixer", token_mixer_);
  if (has_norms) norm2_ = register_module("norm2", RMSNorm(config.d_model, config.norm_eps));
  glu_ = register_module("glu", TernaryGLU(config, std.in, std.out));
  if (config.block == "v3" && config.router) {
    auto linear = torch::nn::Linear(config.d_model, 1);
    torch::nn::init::zeros_(linear->weight);
    torch::nn::init::ones_(linear->bias);
    struct RouterImpl : torch::nn::Module {};
    register_module("router", std::make_shared<RouterImpl>())->register_module("linear", linear);
  }
}

at::Tensor BlockImpl::forward(at::Tensor x, at::Tensor* state, const at::Tensor& lower_bound) {
  x = x + token_mixer_->forward(norm1_ ? norm1_(x) : x, state, lower_bound);
  return glu_(x, norm2_);
}

}  // namespace flashlm
