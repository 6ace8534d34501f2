// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "ops/adamw.h"
#include "tests/ops/check.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

/// A parameter with what AdamW and lazy_adamw_ remember of it.
struct State {
  at::Tensor param, exp_avg, exp_avg_sq, last_step, owed;

  explicit State(const at::Tensor& start)
      : param(start.clone()),
        exp_avg(at::zeros_like(start)),
        exp_avg_sq(at::zeros_like(start)),
        last_step(at::zeros({start.dim() == 0 ? 1 : start.size(0)}, at::kInt)),
        owed(at::stack({at::ones({kLazyPeriod}, at::kDouble), at::zeros({kLazyPeriod}, at::kDouble)})) {}

  void step(const at::Tensor& grad, const AdamWSettings& settings) {
    adamw_(param, grad, exp_avg, exp_avg_sq, settings);
  }
  void lazy_step(const at::Tensor& grad, const AdamWSettings& settings) {
    lazy_adamw_(param, grad, exp_avg, exp_avg_sq, last_step, owed, settings);
  }
  void catch_up(const AdamWSettings& settings) {
    lazy_adamw_catch_up_(param, exp_avg, exp_avg_sq, last_step, owed, settings);
  }
};

void require_same(const State& got, const State& want, double tolerance) {
  require_close(got.param, want.param, tolerance);
  require_close(got.exp_avg, want.exp_avg, tolerance);
  require_close(got.exp_avg_sq, want.exp_avg_sq, tolerance);
}

/// Settings that change from step to step, as under a schedule.
AdamWSettings settings_at(int64_t step, double eps = 1e-8) {
  return {0.01 / static_cast<double>(1 + step % 7),   0.9, 0.95, eps,
          0.1 + 0.01 * static_cast<double>(step % 3), step};
}

/// Rows that have a gradient at every step, at every other, seldom, at the first one only, and never.
at::Tensor sparse_grad(int64_t rows, int64_t width, at::ScalarType dtype, int64_t step) {
  at::Tensor grad = randn({rows, width}, dtype, step);
  const int64_t period[] = {1, 2, 11, 37, 1000, 0};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t every = period[r % 6];
    if (every == 0 || (step - 1) % every != 0) grad[r].zero_();
  }
  return grad;
}

}  // namespace

TEST_CASE("adamw_ follows its formula", "[adamw]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble);
  for (const std::vector<int64_t>& shape :
       std::vector<std::vector<int64_t>>{{33, 7}, {5}, {2, 3, 4}, {}, {0, 4}, {40000}}) {
    State state(randn(shape, dtype));
    at::Tensor w = state.param.to(at::kDouble).clone(), m = at::zeros_like(w), v = at::zeros_like(w);
    for (int64_t step = 1; step <= 4; ++step) {
      const auto s = settings_at(step);
      const at::Tensor grad = randn(shape, dtype, step);
      const auto version = state.param._version();
      state.step(grad, s);
      REQUIRE(state.param._version() > version);
      const at::Tensor g = grad.to(at::kDouble);
      m = s.beta1 * m + (1 - s.beta1) * g;
      v = s.beta2 * v + (1 - s.beta2) * g * g;
      const at::Tensor m_hat = m / (1 - std::pow(s.beta1, step)), v_hat = v / (1 - std::pow(s.beta2, step));
      w = (1 - s.lr * s.weight_decay) * w - s.lr * m_hat / (v_hat.sqrt() + s.eps);
    }
    require_close(state.param.to(at::kDouble), w, dtype == at::kFloat ? 1e-6 : 1e-14);
  }
}

TEST_CASE("AdamW does not depend on the number of threads", "[adamw]") {
  require_same_for_any_threads([] {
    State dense(randn({3000, 33})), lazy(dense.param);
    for (int64_t step = 1; step <= 3; ++step) {
      const at::Tensor grad = sparse_grad(3000, 33, at::kFloat, step);
      dense.step(grad, settings_at(step));
      lazy.lazy_step(grad, settings_at(step));
    }
    lazy.catch_up(settings_at(3));
    return Tensors{dense.param, dense.exp_avg, dense.exp_avg_sq, lazy.param, lazy.exp_avg, lazy.exp_avg_sq};
  });
}

TEST_CASE("lazy_adamw_ gives rows with a gradient adamw_'s bits and leaves the others alone", "[adamw]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble);
  State dense(randn({130, 5}, dtype)), lazy(dense.param);
  for (int64_t step = 1; step <= 20; ++step) {
    const at::Tensor grad = randn({130, 5}, dtype, step);
    dense.step(grad, settings_at(step));
    lazy.lazy_step(grad, settings_at(step));
    require_same(lazy, dense, 0);
  }
  lazy.catch_up(settings_at(20));
  require_same(lazy, dense, 0);

  // Rows are put off for less than a period, and those whose turn it is are few.
  State rest(randn({640, 5}, dtype));
  const at::Tensor start = rest.param.clone(), zero = at::zeros({640, 5}, rest.param.options());
  for (int64_t step = 1; step <= kLazyPeriod; ++step) {
    rest.lazy_step(zero, settings_at(step));
    const int64_t moved = rest.param.ne(start).any(1).sum().item<int64_t>();
    REQUIRE(moved <= 64 * step);
  }
  REQUIRE(rest.last_step.min().item<int>() >= 1);
  REQUIRE(rest.last_step.max().item<int>() == kLazyPeriod);
}

TEST_CASE("a lazy table that has caught up is where AdamW puts it", "[adamw]") {
  // In double and with a tiny eps the closed form is exact, whatever the schedule does.
  State dense(randn({203, 3}, at::kDouble)), lazy(dense.param);
  const double eps = 1e-100;
  for (int64_t step = 1; step <= 120; ++step) {
    const at::Tensor grad = sparse_grad(203, 3, at::kDouble, step);
    dense.step(grad, settings_at(step, eps));
    lazy.lazy_step(grad, settings_at(step, eps));
    if (step % 50 == 0 || step == 120) {
      lazy.catch_up(settings_at(step, eps));
      require_same(lazy, dense, 1e-12);
    }
  }
}

TEST_CASE("eps beside the root moves what a row is owed by less than 1.5 eps / sqrt(v) of it", "[adamw]") {
  for (const double size : {1e-6, 1e-4, 1.0}) {
    State dense(at::zeros({64, 3}, at::kDouble)), lazy(dense.param);
    for (int64_t step = 1; step <= 15; ++step) {
      const at::Tensor grad =
          size * (step == 1 ? at::ones({64, 3}, at::kDouble) : at::zeros({64, 3}, at::kDouble));
      AdamWSettings s = settings_at(step);
      s.weight_decay = 0;
      dense.step(grad, s);
      lazy.lazy_step(grad, s);
      if (step == 15) lazy.catch_up(s);
    }
    const double bound = 1.5 * 1e-8 / (size * std::sqrt(0.05)) + 1e-12;
    require_close(lazy.param, dense.param, bound);
  }
}

TEST_CASE("a NaN in a gradient reaches its row", "[adamw]") {
  State state(randn({3, 4}));
  at::Tensor grad = at::zeros({3, 4});
  grad[1][2] = std::nan("");
  state.lazy_step(grad, settings_at(1));
  REQUIRE(state.param.isnan().sum().item<int64_t>() == 1);
  REQUIRE(state.param[1][2].isnan().item<bool>());
}

TEST_CASE("adamw_ refuses what does not fit", "[adamw]") {
  State s(randn({4, 3}));
  const at::Tensor grad = randn({4, 3});
  require_error(
      [&] {
        s.step(randn({3, 4}), settings_at(1));
      },
      "adamw_: grad must be contiguous Float [4, 3] as param, got Float [3, 4]");
  require_error([&] { s.step(randn({3, 4}).t(), settings_at(1)); }, "with strides [1, 4]");
  require_error([&] { s.step(grad.to(at::kDouble), settings_at(1)); }, "got Double [4, 3]");
  require_error([&] { State(at::zeros({2}, at::kInt)).step(at::zeros({2}, at::kInt), settings_at(1)); },
                "adamw_: param must be float32 or float64, got Int");
  s.last_step = at::zeros({3}, at::kInt);
  require_error([&] { s.lazy_step(grad, settings_at(1)); },
                "lazy_adamw_: last_step must be contiguous Int [4], got Int [3]");
  s = State(s.param);
  s.owed = at::zeros({16, 2}, at::kDouble);
  require_error([&] { s.lazy_step(grad, settings_at(1)); },
                "lazy_adamw_: owed must be contiguous Double [2, 16], got Double [16, 2]");
}
