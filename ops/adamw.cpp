// SPDX-License-Identifier: Apache-2.0
#include "ops/adamw.h"

#include <cmath>

#include "ops/common.h"

namespace flashlm {
namespace {

/// Rows that wait together, and groups of them that have their turn together: neighbours, since memory is
/// fast only in runs of kilobytes. With single rows a table of which half has a gradient took longer lazily
/// (12 ms) than whole (9 ms).
constexpr int64_t kGroupRows = 4, kTurnGroups = 16;

void check_like(const char* name, const at::Tensor& t, const at::Tensor& param) {
  TORCH_CHECK(t.sizes() == param.sizes() && t.scalar_type() == param.scalar_type() && t.is_contiguous(),
              "adamw_: ", name, " must be contiguous ", param.scalar_type(), " ", param.sizes(),
              " as param, got ", t.scalar_type(), " ", t.sizes(), " with strides ", t.strides());
}

void check_tensors(const at::Tensor& param, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq) {
  TORCH_CHECK(param.scalar_type() == at::kFloat || param.scalar_type() == at::kDouble,
              "adamw_: param must be float32 or float64, got ", param.scalar_type());
  check_like("param", param, param);
  check_like("exp_avg", exp_avg, param);
  check_like("exp_avg_sq", exp_avg_sq, param);
}

void check_lazy(const at::Tensor& param, const at::Tensor& last_step, const at::Tensor& owed) {
  TORCH_CHECK(param.dim() >= 1, "lazy_adamw_: param must have rows, got a scalar");
  TORCH_CHECK(last_step.scalar_type() == at::kInt && last_step.is_contiguous() &&
                  last_step.sizes() == at::IntArrayRef{param.size(0)},
              "lazy_adamw_: last_step must be contiguous Int [", param.size(0), "], got ",
              last_step.scalar_type(), " ", last_step.sizes());
  TORCH_CHECK(owed.scalar_type() == at::kDouble && owed.is_contiguous() &&
                  owed.sizes() == at::IntArrayRef({2, kLazyPeriod}),
              "lazy_adamw_: owed must be contiguous Double [2, ", kLazyPeriod, "], got ", owed.scalar_type(),
              " ", owed.sizes());
}

template <class T>
kernels::AdamWStep<T> step_of(const AdamWSettings& s) {
  const double step = static_cast<double>(s.step);
  return {static_cast<T>(1 - s.lr * s.weight_decay),
          static_cast<T>(s.beta1),
          static_cast<T>(s.beta2),
          static_cast<T>(s.lr / (1 - std::pow(s.beta1, step))),
          static_cast<T>(1 / std::sqrt(1 - std::pow(s.beta2, step))),
          static_cast<T>(s.eps)};
}

/// What rows are owed, by the number of steps they missed.
template <class T>
std::vector<kernels::AdamWOwed<T>> owed_by_steps(const at::Tensor& owed, const AdamWSettings& s) {
  const double* keep = owed.const_data_ptr<double>();
  const double* tail = keep + kLazyPeriod;
  std::vector<kernels::AdamWOwed<T>> out;
  for (int64_t n = 0; n < kLazyPeriod; ++n) {
    out.push_back({static_cast<T>(keep[n]), static_cast<T>(tail[n]),
                   static_cast<T>(std::pow(s.beta1, static_cast<double>(n))),
                   static_cast<T>(std::pow(s.beta2, static_cast<double>(n))), static_cast<T>(s.eps)});
  }
  return out;
}

/// Whoever missed n - 1 steps so far and this one too has missed n.
void add_missed_step(const at::Tensor& owed, const AdamWSettings& s) {
  const double step = static_cast<double>(s.step), keep_now = 1 - s.lr * s.weight_decay;
  const double rate = s.lr * std::sqrt(1 - std::pow(s.beta2, step)) / (1 - std::pow(s.beta1, step));
  double* keep = owed.mutable_data_ptr<double>();
  double* tail = keep + kLazyPeriod;
  for (int64_t n = kLazyPeriod - 1; n > 0; --n) {
    keep[n] = keep[n - 1] * keep_now;
    tail[n] = tail[n - 1] * keep_now + rate * std::pow(s.beta1 / std::sqrt(s.beta2), static_cast<double>(n));
  }
}

/// For each row in turn: what it is owed for the steps before `step`; then, if grad is defined, this step.
/// Without grad every row is visited, else those that have a gradient or their turn.
void visit_rows(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
                const at::Tensor& exp_avg_sq, const at::Tensor& last_step, const at::Tensor& owed,
                const AdamWSettings& settings) {
  const int64_t rows = param.size(0), width = rows == 0 ? 0 : param.numel() / rows;
  int32_t* last = last_step.mutable_data_ptr<int32_t>();
  // Without a gradient there is no step to take, and the one before counts as missed too.
  const int64_t before = grad.defined() ? settings.step - 1 : settings.step;
  dispatch(param, [&](auto t) {
    using T = decltype(t);
    const kernels::Table<T>& table = kernels::table<T>();
    const auto step = step_of<T>(settings);
    const auto owed_for = owed_by_steps<T>(owed, settings);
    T *w = param.mutable_data_ptr<T>(), *m = exp_avg.mutable_data_ptr<T>(),
      *v = exp_avg_sq.mutable_data_ptr<T>();
    const T* g = grad.defined() ? grad.const_data_ptr<T>() : nullptr;
    const int64_t groups = (rows + kGroupRows - 1) / kGroupRows;
    at::parallel_for(0, groups, row_grain(kGroupRows * width), [&](int64_t first, int64_t end) {
      for (int64_t group = first; group < end; ++group) {
        const int64_t begin = group * kGroupRows, count = std::min(kGroupRows, rows - begin);
        const bool turn = (group / kTurnGroups + settings.step) % kLazyPeriod == 0;
        if (g != nullptr && !turn && table.all_zero(count * width, g + begin * width)) continue;
        for (int64_t r = begin; r < begin + count; ++r) {
          const int64_t at = r * width, missed = before - last[r];
          TORCH_INTERNAL_ASSERT(missed >= 0 && missed < kLazyPeriod);
          if (missed > 0) table.adamw_owed(width, owed_for[missed], w + at, m + at, v + at);
          if (g != nullptr) table.adamw(width, step, g + at, w + at, m + at, v + at);
          last[r] = static_cast<int32_t>(settings.step);
        }
      }
    });
  });
  param.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

void adamw_(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
            const at::Tensor& exp_avg_sq, const AdamWSettings& settings) {
  check_tensors(param, exp_avg, exp_avg_sq);
  check_like("grad", grad, param);
  dispatch(param, [&](auto t) {
    using T = decltype(t);
    const auto step = step_of<T>(settings);
    T *w = param.mutable_data_ptr<T>(), *m = exp_avg.mutable_data_ptr<T>(),
      *v = exp_avg_sq.mutable_data_ptr<T>();
    const T* g = grad.const_data_ptr<T>();
    at::parallel_for(0, param.numel(), row_grain(1), [&](int64_t first, int64_t last) {
      kernels::table<T>().adamw(last - first, step, g + first, w + first, m + first, v + first);
    });
  });
  // Whoever keeps something computed from a weight must see that it changed.
  param.unsafeGetTensorImpl()->bump_version();
}

void lazy_adamw_(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
                 const at::Tensor& exp_avg_sq, const at::Tensor& last_step, const at::Tensor& owed,
                 const AdamWSettings& settings) {
  check_tensors(param, exp_avg, exp_avg_sq);
  check_like("grad", grad, param);
  check_lazy(param, last_step, owed);
  visit_rows(param, grad, exp_avg, exp_avg_sq, last_step, owed, settings);
  add_missed_step(owed, settings);
}

void lazy_adamw_catch_up_(const at::Tensor& param, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                          const at::Tensor& last_step, const at::Tensor& owed,
                          const AdamWSettings& settings) {
  check_tensors(param, exp_avg, exp_avg_sq);
  check_lazy(param, last_step, owed);
  visit_rows(param, /*grad=*/{}, exp_avg, exp_avg_sq, last_step, owed, settings);
}

}  // namespace flashlm
