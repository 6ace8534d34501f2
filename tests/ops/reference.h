// SPDX-License-Identifier: Apache-2.0
// Each operator again in a few lines of ATen, differentiable by autograd: the specification that the kernels
// meet.
#pragma once

#include <torch/torch.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace flashlm::reference {

inline at::Tensor causal_conv1d(const at::Tensor& x, const at::Tensor& weight,
                                const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups) {
  const int64_t reach = (weight.size(2) - 1) * dilation;
  const at::Tensor before = history ? *history : torch::zeros({x.size(0), reach, x.size(2)}, x.options());
  const at::Tensor rows = torch::cat({before, x}, 1).transpose(1, 2);
  return at::conv1d(rows, weight, {}, 1, at::IntArrayRef{0}, dilation, groups).transpose(1, 2);
}

/// {loss, nll}
inline std::tuple<at::Tensor, at::Tensor> linear_cross_entropy(const at::Tensor& h, const at::Tensor& weight,
                                                               const std::optional<at::Tensor>& bias,
                                                               const at::Tensor& target,
                                                               double label_smoothing, double z_loss,
                                                               int64_t ignore_index,
                                                               const std::string& reduction) {
  const at::Tensor z = at::linear(h, weight, bias), lse = z.logsumexp(-1), kept = target != ignore_index;
  const at::Tensor nll = lse - z.gather(-1, (target * kept).unsqueeze(-1)).squeeze(-1);
  const at::Tensor loss =
      (1 - label_smoothing) * nll + label_smoothing * (lse - z.mean(-1)) + z_loss * lse.square();
  const auto reduce = [&](const at::Tensor& t) {
    if (reduction == "none") return t * kept;
    return reduction == "sum" ? (t * kept).sum() : (t * kept).sum() / kept.sum();
  };
  return {reduce(loss), reduce(nll)};
}

inline at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& scale, double eps) {
  return x * torch::rsqrt(x.square().mean(-1, /*keepdim=*/true) + eps) * scale;
}

inline at::Tensor gated_conv(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                             const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                             int64_t dilation, int64_t groups, double eps) {
  const at::Tensor h = rms_norm(x, norm_scale, eps);
  std::optional<at::Tensor> before;
  if (history) before = rms_norm(*history, norm_scale, eps);
  return x + causal_conv1d(h, gate_weight, before, dilation, groups).sigmoid() *
                 causal_conv1d(h, value_weight, before, dilation, groups);
}

/// `value` with x's gradient: x + (value - x).detach(), without its rounding.
inline at::Tensor straight_through(const at::Tensor& value, const at::Tensor& x) {
  return value.detach() + (x - x.detach());
}

/// mean|weight| is taken in double, as the operator does.
inline at::Tensor bit_linear(const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& norm_scale, std::string_view quantizer,
                             std::string_view activation, double eps) {
  at::Tensor a = norm_scale ? rms_norm(x, *norm_scale, eps) : x;
  if (activation == "int8") {
    const at::Tensor s = 127 / a.abs().amax(-1, /*keepdim=*/true).clamp_min(1e-5);
    a = straight_through((a * s).round().clamp(-128, 127) / s, a);
  }
  const at::Tensor mean = weight.to(at::kDouble).abs().mean().to(weight.scalar_type());
  const at::Tensor gamma = mean.clamp_min(1e-5);
  const at::Tensor q = quantizer == "absmean" ? gamma * (weight / gamma).round().clamp(-1, 1)
                                              : weight.sign() * (weight.abs() > mean);
  return a.matmul(straight_through(q, weight).t());
}

inline at::Tensor relu2_glu(const at::Tensor& gate, const at::Tensor& up) {
  return gate.relu().square() * up;
}

inline at::Tensor silu_glu(const at::Tensor& gate, const at::Tensor& up) { return at::silu(gate) * up; }

inline at::Tensor sigmoid_glu(const at::Tensor& gate, const at::Tensor& up) { return gate.sigmoid() * up; }

/// {h, h_last}
inline std::tuple<at::Tensor, at::Tensor> mlgru(at::Tensor f, at::Tensor c,
                                                const std::optional<at::Tensor>& h0,
                                                const std::optional<at::Tensor>& lower_bound,
                                                std::string_view activation) {
  if (activation == "silu") {
    const at::Tensor bound = lower_bound ? *lower_bound : torch::zeros({f.size(2)}, f.options());
    f = bound + (1 - bound) * f.sigmoid();
    c = at::silu(c);
  }
  at::Tensor h = h0 ? *h0 : torch::zeros({f.size(0), f.size(2)}, f.options());
  std::vector<at::Tensor> states;
  for (int64_t t = 0; t < f.size(1); ++t) {
    h = f.select(1, t) * h + (1 - f.select(1, t)) * c.select(1, t);
    states.push_back(h);
  }
  return {at::stack(states, 1), h};
}

}  // namespace flashlm::reference
