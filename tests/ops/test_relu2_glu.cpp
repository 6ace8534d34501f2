// SPDX-License-Identifier: Apache-2.0
#include "ops/relu2_glu.h"
#include "tests/ops/check.h"
#include "tests/ops/reference.h"

using namespace flashlm;
using namespace flashlm::testing;

TEST_CASE("relu2_glu equals its reference for any shape, stride and dtype", "[relu2_glu]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble, at::kBFloat16);
  const auto shape =
      GENERATE(std::vector<int64_t>{5}, std::vector<int64_t>{3, 17}, std::vector<int64_t>{2, 5, 683},
               std::vector<int64_t>{0, 8}, std::vector<int64_t>{});
  // Multiples of 1/8: squares and products are exact in float32, and round once to bfloat16.
  const at::Tensor gate = dyadic(shape, dtype), up = dyadic(shape, dtype, 1);
  const auto wide = dtype == at::kBFloat16 ? at::kFloat : dtype;
  const at::Tensor want = reference::relu2_glu(gate.to(wide), up.to(wide)).to(dtype);
  require_equal(relu2_glu(gate, up), want);
  require_equal(relu2_glu(strided(gate), strided(up)), want);
}

TEST_CASE("relu2_glu gradients", "[relu2_glu]") {
  const Tensors inputs = {randn({4, 7}, at::kDouble).requires_grad_(),
                          randn({4, 7}, at::kDouble, 1).requires_grad_()};
  require_gradients_match([](const Tensors& t) { return relu2_glu(t[0], t[1]); }, inputs);
}

TEST_CASE("relu2_glu refuses wrong arguments in words", "[relu2_glu]") {
  const at::Tensor gate = randn({3, 4});
  require_error(
      [&] {
        relu2_glu(gate, randn({3, 5}));
      },
      "relu2_glu: up's shape must be gate's [3, 4], got [3, 5]");
  require_error([&] { relu2_glu(gate, randn({4})); }, "relu2_glu: up must have gate's 2 dimensions, got 1");
  require_error([&] { relu2_glu(gate, gate.to(at::kDouble)); },
                "relu2_glu: up must have gate's dtype Float, got Double");
  require_error([&] { relu2_glu(gate.to(at::kInt), gate.to(at::kInt)); },
                "relu2_glu: gate must be float32, bfloat16 or float64, got Int");
}
