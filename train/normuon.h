// SPDX-License-Identifier: Apache-2.0
// NorMuon: momentum made orthogonal, each row scaled to its usual size, the whole to a fixed RMS.
#pragma once

#include <torch/torch.h>

#include "train/named_state.h"

namespace flashlm {

/// About U Vᵀ for g = U S Vᵀ: directions are kept, singular values brought near 1.
///
///   X <- g / (||g||_F + 1e-7), transposed if it has more rows than columns: the Gram matrix is the small one
///   steps times:  A = X Xᵀ,  X <- 3.4445 X + (-4.7750 A + 2.0315 A²) X
///
///   g         (m, n)   float or double
///   bfloat16           X, A and A² are rounded to bfloat16, sums are float32. Twice as fast or more on CPUs
///                      with such instructions (has_bfloat16), slower on others
///   returns   (m, n)   g's dtype; zero for zero
///
/// Five steps take singular values from 0.002 ||g||_F on into [0.68, 1.21]; smaller ones stay smaller,
/// growing up to 485-fold. For direction only: the coefficients are chosen for speed and do not converge
/// to 1. Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
///
/// bfloat16 moves the singular values of the result by less than 0.01, and the result by 1 % of its norm, for
/// normal noise of v3's shapes (683 x 256, 256 x 683, 256 x 256); where the spectrum of g falls over four
/// decades, by 0.05 and 8 %: the smallest directions, which rounding fills with noise. Two runs of quick.toml
/// over 150 steps ended at 5.1758 and 5.1908 nats a token, with float32 at 5.1757 and 5.1826. One v3 matrix
/// takes 6 ms in place of 13 on one Zen 4 core (oneDNN's products, at about 100 GMAC/s).
at::Tensor newton_schulz(const at::Tensor& g, int64_t steps, bool bfloat16 = false);

/// Whether this CPU multiplies matrices in bfloat16 faster than in float32: AVX512-BF16.
bool has_bfloat16();

struct NorMuonOptions : public torch::optim::OptimizerCloneableOptions<NorMuonOptions> {
  NorMuonOptions(double lr = 0.02);
  TORCH_ARG(double, lr) = 0.02;
  TORCH_ARG(double, beta1) = 0.95;      // of the momentum
  TORCH_ARG(double, beta2) = 0.999;     // of the rows' mean squares
  TORCH_ARG(double, weight_decay) = 0;  // decoupled: W shrinks by lr * weight_decay a step
  TORCH_ARG(double, eps) = 1e-8;
  TORCH_ARG(int64_t, steps) = 5;      // of Newton-Schulz
  TORCH_ARG(bool, bfloat16) = false;  // its products

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
  double get_lr() const override;
  void set_lr(double lr) override;
};

struct NorMuonUpdate {
  at::Tensor momentum;       // (m, n)
  at::Tensor second_moment;  // (m, 1)
  at::Tensor update;         // (m, n), to be subtracted from the weight
};

/// One step of NorMuon for one matrix, as FlashLM v3 takes it; a pure function.
///
///   M  = beta1 M + (1 - beta1) G
///   O  = newton_schulz(M)
///   v  = beta2 v + (1 - beta2) mean over columns of O²          one value a row
///   Oh = O / (sqrt(v) + eps)
///   update = 0.2 lr sqrt(m n) / (||Oh||_F + eps) * Oh
///
///   grad           (m, n)   G, float or double
///   momentum       (m, n)   M before; zeros at first
///   second_moment  (m, 1)   v before; zeros at first
///
/// Units: the RMS change of an element is 0.2 lr each step, whatever the size of the gradient. Clipping the
/// gradient therefore changes only the momentum's mix. v is not bias-corrected: a factor common to all rows
/// cancels in the norm.
///
/// For matrices that map features to features. Not for embeddings and output tables (their rows are unrelated
/// and mostly have no gradient), convolutions, or vectors.
///
/// Source: Li et al., "NorMuon", arXiv 2510.05491. FlashLM v3 takes the paper's step with other settings: lr
/// 0.02, where the factor 0.2 is meant for the lr of AdamW, beta2 0.999 and no weight decay. The code that
/// the authors published differs from both: Nesterov momentum, and the norm of O is kept instead of set.
NorMuonUpdate normuon_update(const at::Tensor& grad, const at::Tensor& momentum,
                             const at::Tensor& second_moment, const NorMuonOptions& options);

struct NorMuonParamState : public torch::optim::OptimizerCloneableParamState<NorMuonParamState> {
  TORCH_ARG(at::Tensor, momentum);
  TORCH_ARG(at::Tensor, second_moment);

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
};

/// W <- (1 - lr weight_decay) W - update, for every 2-D parameter that has a gradient; others stay as they
/// are, state and decay included.
class NorMuon : public NamedStateOptimizer {
 public:
  explicit NorMuon(const std::vector<torch::optim::OptimizerParamGroup>& param_groups,
                   NorMuonOptions defaults = {});
  explicit NorMuon(std::vector<at::Tensor> params, NorMuonOptions defaults = {});

  /// The closure, if given, recomputes loss and gradients; its loss is returned.
  torch::Tensor step(LossClosure closure = nullptr) override;

  TensorMap state_of(const at::Tensor& param) const override;  // "momentum", "second_moment"
  void set_state(const at::Tensor& param, const TensorMap& saved) override;

  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;
};

}  // namespace flashlm
