// SPDX-License-Identifier: Apache-2.0
#include "ops/causal_conv1d.h"
#include "tests/ops/check.h"
#include "tests/ops/conv_cases.h"
#include "tests/ops/reference.h"

using namespace flashlm;
using namespace flashlm::testing;

TEST_CASE("causal_conv1d equals its reference exactly for any length, group, stride and dtype",
          "[causal_conv1d]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble, at::kBFloat16);
  const auto conv = GENERATE(from_range(kConvs));
  for (int64_t time : {1, 2, 3, 63, 64, 65, 200}) {
    const int64_t batch = 1 + time % 3;
    INFO(conv << " T " << time << " B " << batch << " dtype " << dtype);
    // Multiples of 1/8: sums of products are exact in float32, and round once to bfloat16.
    const at::Tensor x = dyadic({batch, time, conv.width}, dtype);
    const at::Tensor weight = dyadic(conv.weight_shape(), dtype, 1);
    const at::Tensor history = dyadic({batch, conv.reach(), conv.width}, dtype, 2);
    const auto wide = dtype == at::kBFloat16 ? at::kFloat : dtype;
    const auto want = [&](const std::optional<at::Tensor>& before) {
      return reference::causal_conv1d(x.to(wide), weight.to(wide), before, conv.dilation, conv.groups)
          .to(dtype);
    };
    require_equal(causal_conv1d(x, weight, {}, conv.dilation, conv.groups), want({}));
    require_equal(causal_conv1d(x, weight, history, conv.dilation, conv.groups), want(history.to(wide)));
    require_equal(causal_conv1d(strided(x), strided(weight), strided(history), conv.dilation, conv.groups),
                  want(history.to(wide)));
    require_equal(causal_conv1d(x, weight, torch::zeros_like(history), conv.dilation, conv.groups), want({}));
  }
}

TEST_CASE("causal_conv1d of nothing is nothing, with zero gradients", "[causal_conv1d]") {
  for (const auto& [batch, time] : {std::pair<int64_t, int64_t>{0, 5}, {2, 0}}) {
    const Tensors inputs = {randn({batch, time, 6}).requires_grad_(),
                            randn({6, 3, 3}, at::kFloat, 1).requires_grad_(),
                            randn({batch, 4, 6}, at::kFloat, 2).requires_grad_()};
    const auto f = [](const Tensors& t) { return causal_conv1d(t[0], t[1], t[2], 2, 2); };
    REQUIRE(f(inputs).sizes() == inputs[0].sizes());
    const Tensors grads = gradients(f, inputs);
    for (size_t i = 0; i < 3; ++i) require_equal(grads[i], torch::zeros_like(inputs[i]));
  }
}

TEST_CASE("causal_conv1d with a dilation beyond the start is its last tap", "[causal_conv1d]") {
  const at::Tensor x = dyadic({2, 5, 6}), weight = dyadic({6, 3, 4}, at::kFloat, 1);
  require_equal(causal_conv1d(x, weight, {}, 2147483647, 2),
                causal_conv1d(x, weight.narrow(2, 3, 1), {}, 1, 2));
}

TEST_CASE("causal_conv1d in pieces equals the whole bit for bit", "[causal_conv1d]") {
  const auto conv = GENERATE(from_range(kConvs));
  INFO(conv);
  const at::Tensor all = randn({2, conv.reach() + 150, conv.width});
  const at::Tensor weight = randn(conv.weight_shape(), at::kFloat, 1);
  const auto run = [&](int64_t begin, int64_t end) {
    return causal_conv1d(all.slice(1, begin, end), weight, all.slice(1, begin - conv.reach(), begin),
                         conv.dilation, conv.groups);
  };
  const at::Tensor whole = run(conv.reach(), all.size(1));
  for (int64_t longest : {1, 7, 40, 149}) {
    const std::vector<int64_t> cuts = random_cuts(150, longest);
    Tensors pieces;
    for (size_t i = 1; i < cuts.size(); ++i) {
      pieces.push_back(run(conv.reach() + cuts[i - 1], conv.reach() + cuts[i]));
    }
    INFO("longest piece " << longest);
    REQUIRE(at::equal(torch::cat(pieces, 1), whole));
  }
}

TEST_CASE("causal_conv1d does not see what comes later", "[causal_conv1d]") {
  const auto conv = GENERATE(from_range(kConvs));
  INFO(conv);
  const at::Tensor x = randn({2, 130, conv.width}), weight = randn(conv.weight_shape(), at::kFloat, 1);
  const at::Tensor y = causal_conv1d(x, weight, {}, conv.dilation, conv.groups);
  for (int64_t t : {0, 5, 63, 64, 128}) {
    at::Tensor changed = x.clone();
    changed.slice(1, t + 1).fill_(NAN);
    const at::Tensor z = causal_conv1d(changed, weight, {}, conv.dilation, conv.groups);
    REQUIRE(at::equal(y.slice(1, 0, t + 1), z.slice(1, 0, t + 1)));
    REQUIRE(z.slice(1, t + 1, t + 2).isnan().all().item<bool>());
  }
}

TEST_CASE("causal_conv1d gradients", "[causal_conv1d]") {
  for (const Conv& conv : {Conv{6, 2, 3, 2}, Conv{4, 4, 2, 7}, Conv{5, 1, 1, 1}}) {
    INFO(conv);
    const Tensors inputs = {randn({2, 5, conv.width}, at::kDouble).requires_grad_(),
                            randn(conv.weight_shape(), at::kDouble, 1).requires_grad_(),
                            randn({2, conv.reach(), conv.width}, at::kDouble, 2).requires_grad_()};
    require_gradients_match(
        [&](const Tensors& t) { return causal_conv1d(t[0], t[1], t[2], conv.dilation, conv.groups); },
        inputs);
    require_gradients_match(
        [&](const Tensors& t) { return causal_conv1d(t[0], t[1], {}, conv.dilation, conv.groups); },
        {inputs[0], inputs[1]});
  }
}

TEST_CASE("causal_conv1d gradients equal autograd's in float32", "[causal_conv1d]") {
  const auto conv = GENERATE(from_range(kConvs));
  const bool with_history = GENERATE(false, true);
  INFO(conv << " history " << with_history);
  Tensors inputs = {randn({3, 150, conv.width}).requires_grad_(),
                    randn(conv.weight_shape(), at::kFloat, 1).requires_grad_()};
  if (with_history) inputs.push_back(randn({3, conv.reach(), conv.width}, at::kFloat, 2).requires_grad_());
  const auto before = [&](const Tensors& t) {
    return with_history ? std::optional<at::Tensor>(t[2]) : std::nullopt;
  };
  const Tensors got = gradients(
      [&](const Tensors& t) {
        return causal_conv1d(strided(t[0]), t[1], before(t), conv.dilation, conv.groups);
      },
      inputs);
  const Tensors want = gradients(
      [&](const Tensors& t) {
        return reference::causal_conv1d(t[0], t[1], before(t), conv.dilation, conv.groups);
      },
      inputs);
  for (size_t i = 0; i < got.size(); ++i) require_close(got[i], want[i], 2e-6);
}

TEST_CASE("causal_conv1d does not depend on the number of threads", "[causal_conv1d]") {
  const int64_t batch = GENERATE(1, 3, 9);
  require_same_for_any_threads([&] {
    const Tensors inputs = {randn({batch, 300, 64}).requires_grad_(),
                            randn({64, 16, 4}, at::kFloat, 1).requires_grad_(),
                            randn({batch, 48, 64}, at::kFloat, 2).requires_grad_()};
    const auto f = [](const Tensors& t) { return causal_conv1d(t[0], t[1], t[2], 16, 4); };
    Tensors out = gradients(f, inputs);
    out.push_back(f(inputs).detach());
    return out;
  });
}

TEST_CASE("causal_conv1d refuses wrong arguments in words", "[causal_conv1d]") {
  const at::Tensor x = randn({2, 5, 8}), weight = randn({8, 2, 3});
  require_error([&] { causal_conv1d(x[0], weight); }, "causal_conv1d: x must have 3 dimensions, got 2");
  require_error([&] { causal_conv1d(x.to(at::kInt), weight); },
                "causal_conv1d: x must be float32, bfloat16 or float64, got Int");
  require_error([&] { causal_conv1d(x, weight.to(at::kDouble), {}, 1, 4); },
                "causal_conv1d: weight must have x's dtype Float, got Double");
  require_error(
      [&] {
        causal_conv1d(x, randn({8, 4, 3}), {}, 1, 4);
      },
      "causal_conv1d: weight must be (D, D/groups, K) = (8, 2, any), got (8, 4, 3)");
  require_error(
      [&] {
        causal_conv1d(x, randn({4, 2, 3}), {}, 1, 4);
      },
      "causal_conv1d: weight must be (D, D/groups, K) = (8, 2, any), got (4, 2, 3)");
  require_error(
      [&] {
        causal_conv1d(x, randn({8, 2}), {}, 1, 4);
      },
      "causal_conv1d: weight must be (D, D/groups, K) = (8, 2, any), got (8, 2)");
  require_error(
      [&] {
        causal_conv1d(x, randn({8, 2, 0}), {}, 1, 4);
      },
      "causal_conv1d: weight must have K >= 1 taps, got 0");
  require_error([&] { causal_conv1d(x, weight, {}, 1, 3); },
                "causal_conv1d: groups must divide D = 8, got 3");
  require_error([&] { causal_conv1d(x, weight, {}, 1, 0); }, "causal_conv1d: groups must be >= 1, got 0");
  require_error([&] { causal_conv1d(x, weight, {}, 0, 4); },
                "causal_conv1d: dilation must be in 1..2147483647, got 0");
  require_error([&] { causal_conv1d(x, weight, {}, 2147483648, 4); },
                "causal_conv1d: dilation must be in 1..2147483647, got 2147483648");
  require_error(
      [&] {
        causal_conv1d(x, weight, randn({2, 5, 8}), 3, 4);
      },
      "causal_conv1d: history must be (B, (K-1)*dilation, D) = (2, 6, 8), got (2, 5, 8)");
  require_error(
      [&] {
        causal_conv1d(x, weight, randn({6, 8}), 3, 4);
      },
      "causal_conv1d: history must be (B, (K-1)*dilation, D) = (2, 6, 8), got (6, 8)");
  require_error(
      [&] {
        causal_conv1d(x, weight, randn({2, 6, 8}, at::kDouble), 3, 4);
      },
      "causal_conv1d: history must have x's dtype Float, got Double");
}

TEST_CASE("causal_conv1d refuses double backward in words", "[causal_conv1d]") {
  const at::Tensor x = randn({2, 5, 8}).requires_grad_();
  const at::Tensor y = causal_conv1d(x, randn({8, 8, 3}));
  const at::Tensor g = torch::autograd::grad({y.square().sum()}, {x}, {}, true, true)[0];
  require_error([&] { g.sum().backward(); },
                "derivative for flashlm::_causal_conv1d_backward is not implemented");
}
