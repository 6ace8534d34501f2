// SPDX-License-Identifier: Apache-2.0
#include "ops/rms_norm.h"
#include "tests/ops/check.h"
#include "tests/ops/reference.h"

using namespace flashlm;
using namespace flashlm::testing;

TEST_CASE("rms_norm equals its reference for any shape, stride and dtype", "[rms_norm]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble, at::kBFloat16);
  const auto shape =
      GENERATE(std::vector<int64_t>{5}, std::vector<int64_t>{3, 17}, std::vector<int64_t>{2, 5, 256},
               std::vector<int64_t>{1, 1}, std::vector<int64_t>{0, 8}, std::vector<int64_t>{200, 683});
  const at::Tensor x = randn(shape, dtype), scale = randn({shape.back()}, dtype, 1);
  // bfloat16 is computed in float32 and rounded once; the reference does the same.
  const auto up = dtype == at::kBFloat16 ? at::kFloat : dtype;
  const at::Tensor want = reference::rms_norm(x.to(up), scale.to(up), 1e-6).to(dtype);
  const double tolerance = dtype == at::kDouble ? 1e-14 : dtype == at::kFloat ? 1e-6 : 8e-3;
  require_close(rms_norm(x, scale, 1e-6), want, tolerance);
  require_close(rms_norm(strided(x), strided(scale), 1e-6), want, tolerance);
}

TEST_CASE("rms_norm gradients", "[rms_norm]") {
  const Tensors inputs = {randn({4, 7}, at::kDouble).requires_grad_(),
                          randn({7}, at::kDouble, 1).requires_grad_()};
  require_gradients_match([](const Tensors& t) { return rms_norm(t[0], t[1], 1e-3); }, inputs);
}

TEST_CASE("rms_norm gradients equal autograd's in float32", "[rms_norm]") {
  const Tensors inputs = {randn({300, 65}).requires_grad_(), randn({65}, at::kFloat, 1).requires_grad_()};
  const Tensors got = gradients([](const Tensors& t) { return rms_norm(strided(t[0]), t[1], 1e-6); }, inputs);
  const Tensors want =
      gradients([](const Tensors& t) { return reference::rms_norm(t[0], t[1], 1e-6); }, inputs);
  for (size_t i = 0; i < got.size(); ++i) require_close(got[i], want[i], 2e-6);
}

TEST_CASE("rms_norm does not depend on the number of threads", "[rms_norm]") {
  require_same_for_any_threads([] {
    const Tensors inputs = {randn({1000, 96}).requires_grad_(), randn({96}, at::kFloat, 1).requires_grad_()};
    Tensors out = gradients([](const Tensors& t) { return rms_norm(t[0], t[1]); }, inputs);
    out.push_back(rms_norm(inputs[0].detach(), inputs[1].detach()));
    return out;
  });
}

TEST_CASE("rms_norm refuses wrong arguments in words", "[rms_norm]") {
  const at::Tensor x = randn({3, 4}), scale = randn({4});
  require_error([&] { rms_norm(x, randn({5})); }, "rms_norm: scale's size must be 4, got 5");
  require_error([&] { rms_norm(x, randn({4, 1})); }, "rms_norm: scale must have 1 dimension, got 2");
  require_error([&] { rms_norm(x, scale.to(at::kDouble)); },
                "rms_norm: scale must have x's dtype Float, got Double");
  require_error([&] { rms_norm(x.to(at::kInt), scale); },
                "rms_norm: x must be float32, bfloat16 or float64, got Int");
  require_error([&] { rms_norm(at::scalar_tensor(1.0), scale); },
                "rms_norm: x must have at least 1 dimension, got 0");
  require_error([&] { rms_norm(x, scale, -1); }, "rms_norm: eps must be >= 0, got -1");
}

TEST_CASE("rms_norm refuses double backward in words", "[rms_norm]") {
  const at::Tensor x = randn({3, 4}).requires_grad_();
  const at::Tensor g =
      torch::autograd::grad({rms_norm(x, randn({4})).square().sum()}, {x}, {}, true, true)[0];
  require_error([&] { g.sum().backward(); }, "derivative for flashlm::_rms_norm_backward is not implemented");
}
