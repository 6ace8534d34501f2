// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace flashlm {

/// The recurrence of the MatMul-free gated recurrent unit (Zhu et al. 2024, arXiv 2406.02528, section 3.3.1;
/// from HGRN, Qin et al. 2023, arXiv 2311.04823), elementwise over the channels:
///   h_t = f_t · h_{t−1} + (1 − f_t) · c_t,   t = 1 .. T.
/// With activation "none" f and c are the gate and the candidate themselves. With "silu" they come before
/// their activations, which are then computed on the way, here and in backward, and never stored:
///   f := lower_bound + (1 − lower_bound) · sigmoid(f),   c := c · sigmoid(c).
/// That is the paper's unit without a lower_bound, and its authors' released code with one: their input
/// SiLU(c) · (1 − f) is (1 − f_t) · c_t here.
///
///   f, c         (B, T, D)  float32, bfloat16 or float64, equal shapes, any strides
///   h0           (B, D)     same dtype; zeros if there is none
///   lower_bound  (D)        same dtype, only with "silu", meant to be in [0, 1); zeros if there is none
///   returns      h (B, T, D) and h_last (B, D), which is h_T, or h0 if T = 0; same dtype, contiguous;
///                differentiable in all four tensors
///
/// A sequence in pieces, each with the h_last before it as h0, gives exactly the result of the whole, with
/// two exceptions: bfloat16, computed in float32, rounds h_last at the cuts; and where B·D ≤ 64 and T ≥ 4096
/// threads share the time steps (a scan in two passes), which rounds otherwise. For backward the arguments
/// and h are kept. Errors: another dtype or activation, shapes or dtypes that do not fit, a lower_bound
/// without "silu".
/// Schema: flashlm::mlgru(Tensor f, Tensor c, Tensor? h0=None, Tensor? lower_bound=None, *,
///         str activation="none") -> (Tensor h, Tensor h_last)
std::tuple<at::Tensor, at::Tensor> mlgru(const at::Tensor& f, const at::Tensor& c,
                                         const std::optional<at::Tensor>& h0 = std::nullopt,
                                         const std::optional<at::Tensor>& lower_bound = std::nullopt,
                                         std::string_view activation = "none");

/// One time step of it: h_t (B, D) from f, c and h = h_{t−1}, all (B, D), with mlgru's bits.
/// Schema: flashlm::mlgru_step(Tensor f, Tensor c, Tensor h, Tensor? lower_bound=None, *,
///         str activation="none") -> Tensor
at::Tensor mlgru_step(const at::Tensor& f, const at::Tensor& c, const at::Tensor& h,
                      const std::optional<at::Tensor>& lower_bound = std::nullopt,
                      std::string_view activation = "none");

}  // namespace flashlm
