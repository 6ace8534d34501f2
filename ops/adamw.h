// SPDX-License-Identifier: Apache-2.0
// AdamW in place, one pass over memory: plain functions, for no graph contains them.
#pragma once

#include <ATen/core/Tensor.h>

namespace flashlm {

/// Of one step. `step` counts from 1, for the bias corrections.
struct AdamWSettings {
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  int64_t step = 1;
};

/// One step of AdamW (Loshchilov and Hutter 2019), in place. Bound by memory: it reads four values and writes
/// three for each parameter.
///
///   m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g²
///   W <- (1 - lr weight_decay) W - lr / (1 - beta1^step) · m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
///
///   param, grad, exp_avg (m), exp_avg_sq (v)   float32 or float64, one shape and dtype, contiguous
///
/// The same bits for any number of threads and on every kernel level. Errors: dtypes, shapes, strides.
void adamw_(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
            const at::Tensor& exp_avg_sq, const AdamWSettings& settings);

/// The longest that lazy_adamw_ puts a row off, in steps.
constexpr int64_t kLazyPeriod = 16;

/// The same for a table (rows, ...) whose rows mostly have no gradient: four neighbours, from a multiple of
/// four on, whose gradients are all zero are left alone, but for every kLazyPeriod-th step, when they have
/// their turn. What a row was owed for the n steps it missed, the decay of W, m and v and the tail of its
/// momentum, it then gets at once, in closed form, before its step:
///
///   W <- keep(n) W - tail(n) · m / (sqrt(v) + eps),   m <- beta1^n m,   v <- beta2^n v
///   keep(n) = product of the missed steps' (1 - lr weight_decay)
///   tail(n) = sum over them of lr sqrt(1 - beta2^step) / (1 - beta1^step) · (beta1 / sqrt(beta2))^k, k = 1
///   ... n,
///             each times the (1 - lr weight_decay) of the steps after it
///
/// The tail matters: after one gradient alone, AdamW moves a row by 1 / (1 - beta1 / sqrt(beta2)) times its
/// first step in all, 13 times for 0.9 and 0.95, and nearly all of it in steps without a gradient.
///
/// A row that has caught up is where adamw_ would have put it, but for eps, which the closed form holds
/// beside sqrt(v) where it stood before the missed steps: a change of the tail by less than 1.5 eps / sqrt(v)
/// of itself for beta2 = 0.95. What remains is delay: until then whoever reads the row sees it up to 15 steps
/// behind. A row with a gradient at each step gets adamw_'s bits. Time for (50257, 256) float32 on one Zen 4
/// core: 3 ms without any gradient, 6 with 5 % of the rows scattered, 9 with half of them or all; adamw_: 8.
///
///   last_step  (rows) int32       the step that each row stands at; zeros at first
///   owed       (2, 16) float64    keep and tail by n; ones and zeros at first. Both are updated.
void lazy_adamw_(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
                 const at::Tensor& exp_avg_sq, const at::Tensor& last_step, const at::Tensor& owed,
                 const AdamWSettings& settings);

/// Gives every row what it is owed up to and including settings.step, the last step taken.
void lazy_adamw_catch_up_(const at::Tensor& param, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                          const at::Tensor& last_step, const at::Tensor& owed, const AdamWSettings& settings);

}  // namespace flashlm
