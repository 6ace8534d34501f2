// SPDX-License-Identifier: Apache-2.0
#include "ops/glu.h"
#include "tests/ops/check.h"
#include "tests/ops/reference.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

using Function = at::Tensor (*)(const at::Tensor& gate, const at::Tensor& up);

struct Glu {
  std::string name;
  Function run, reference;
};

const std::vector<Glu> kGlus = {{"relu2_glu", relu2_glu, reference::relu2_glu},
                                {"silu_glu", silu_glu, reference::silu_glu},
                                {"sigmoid_glu", sigmoid_glu, reference::sigmoid_glu}};

std::ostream& operator<<(std::ostream& out, const Glu& glu) { return out << glu.name; }

std::function<at::Tensor(const Tensors&)> of_two(Function f) {
  return [f](const Tensors& t) { return f(t[0], t[1]); };
}

}  // namespace

TEST_CASE("relu2_glu equals its reference bit for bit", "[glu]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble, at::kBFloat16);
  // Multiples of 1/8: squares and products are exact in float32, and round once to bfloat16.
  const at::Tensor gate = dyadic({2, 5, 683}, dtype), up = dyadic({2, 5, 683}, dtype, 1);
  const auto wide = dtype == at::kBFloat16 ? at::kFloat : dtype;
  require_equal(relu2_glu(gate, up), reference::relu2_glu(gate.to(wide), up.to(wide)).to(dtype));
}

TEST_CASE("gated linear units equal their references for any shape, stride and dtype", "[glu]") {
  const auto glu = GENERATE(from_range(kGlus));
  const auto dtype = GENERATE(at::kFloat, at::kDouble, at::kBFloat16);
  const double tolerance = dtype == at::kDouble ? 1e-15 : dtype == at::kFloat ? 5e-7 : 4e-3;
  for (const std::vector<int64_t>& shape :
       std::vector<std::vector<int64_t>>{{}, {1}, {5}, {3, 17}, {2, 5, 683}, {0, 8}}) {
    INFO(glu << " " << shape << " dtype " << dtype);
    const at::Tensor gate = 3 * randn(shape, dtype), up = randn(shape, dtype, 1);
    // bfloat16 is computed in float32 and rounded once; the reference does the same.
    const auto wide = dtype == at::kBFloat16 ? at::kFloat : dtype;
    const auto prepared = [&](const at::Tensor& t) { return t.to(wide).requires_grad_(); };
    const Tensors inputs = {gate.clone().requires_grad_(), up.clone().requires_grad_()};
    const Tensors views = {strided(gate), strided(up)}, exact = {prepared(gate), prepared(up)};
    const at::Tensor want = glu.reference(exact[0], exact[1]).to(dtype);
    require_close(glu.run(gate, up), want, tolerance);
    const at::Tensor y = glu.run(views[0], views[1]);
    require_close(y, want, tolerance);
    REQUIRE(y.is_contiguous());
    const Tensors got = gradients(of_two(glu.run), inputs);
    const Tensors expected =
        gradients([&](const Tensors& t) { return glu.reference(t[0], t[1]).to(dtype); }, exact);
    for (size_t i = 0; i < got.size(); ++i) require_close(got[i], expected[i].to(dtype), 2 * tolerance);
  }
}

TEST_CASE("gated linear units' gradients", "[glu]") {
  const auto glu = GENERATE(from_range(kGlus));
  INFO(glu);
  const Tensors inputs = {(3 * randn({4, 7}, at::kDouble)).requires_grad_(),
                          randn({4, 7}, at::kDouble, 1).requires_grad_()};
  require_gradients_match(of_two(glu.run), inputs);
}

TEST_CASE("gated linear units far from zero have their limits, and a NaN stays one", "[glu]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble, at::kBFloat16);
  INFO("dtype " << dtype);
  const double infinity = std::numeric_limits<double>::infinity();
  const at::Tensor gate =
      at::tensor({-infinity, -3e38, -800., -88., 88., 800., 3e38, infinity, double(NAN)}, at::kDouble)
          .to(dtype)
          .requires_grad_();
  const at::Tensor up = at::full_like(gate, 2).requires_grad_(), ones = at::ones_like(gate);
  const at::Tensor x = gate.detach(), closed = at::zeros_like(x).slice(0, 0, 4);
  // As at::equal, and what is 0 in the limit may be 1e-35.
  const auto require = [](const at::Tensor& got, const at::Tensor& want) {
    INFO("got " << got << "\nwant " << want);
    REQUIRE(at::allclose(got.to(at::kDouble), want.to(at::kDouble), /*rtol=*/0, /*atol=*/1e-35,
                         /*equal_nan=*/true));
  };
  const auto with_tail = [&](const at::Tensor& tail) { return at::cat({closed, tail}); };
  const at::Tensor nan = x.slice(0, 8), open = x.slice(0, 4, 8);
  const auto run = [&](Function f) {
    Tensors out = torch::autograd::grad({f(gate, up)}, {gate, up}, {ones});
    out.push_back(f(gate, up).detach());
    return out;
  };

  const Tensors sigmoid = run(sigmoid_glu);
  require(sigmoid[0], with_tail(at::cat({at::zeros_like(open), nan})));
  require(sigmoid[1], with_tail(at::cat({at::ones_like(open), nan})));
  require(sigmoid[2], with_tail(at::cat({at::ones_like(open), nan}) * 2));

  const Tensors silu = run(silu_glu);
  require(silu[0], with_tail(at::cat({at::ones_like(open), nan}) * 2));
  require(silu[1], with_tail(at::cat({open, nan})));
  require(silu[2], with_tail(at::cat({open, nan}) * 2));

  const Tensors relu2 = run(relu2_glu);  // 3e38 squared is infinite in float32
  require(relu2[0], with_tail(at::cat({open, nan}) * 2 * 2));
  require(relu2[1], with_tail(at::cat({open, nan}).square()));
  require(relu2[2], with_tail(at::cat({open, nan}).square() * 2));

  // A NaN in up, behind a gate that is open, half open and shut.
  const at::Tensor gates = at::tensor({100., 0., -100.}, at::kDouble).to(dtype);
  for (const Glu& glu : kGlus) {
    INFO(glu);
    REQUIRE(glu.run(gates, at::full_like(gates, NAN)).isnan().all().item<bool>());
  }
}

TEST_CASE("gated linear units do not depend on the number of threads", "[glu]") {
  const auto glu = GENERATE(from_range(kGlus));
  INFO(glu);
  const Tensors inputs = {randn({77, 683}).requires_grad_(),
                          randn({77, 683}, at::kFloat, 1).requires_grad_()};
  require_same_for_any_threads([&] {
    Tensors out = gradients(of_two(glu.run), inputs);
    out.push_back(glu.run(inputs[0], inputs[1]).detach());
    return out;
  });
}

TEST_CASE("gated linear units refuse wrong arguments in words", "[glu]") {
  const auto glu = GENERATE(from_range(kGlus));
  const at::Tensor gate = randn({3, 4});
  const auto require_refused = [&](const at::Tensor& g, const at::Tensor& up, const std::string& words) {
    require_error([&] { glu.run(g, up); }, glu.name + ": " + words);
  };
  require_refused(gate, randn({3, 5}), "up's shape must be gate's [3, 4], got [3, 5]");
  require_refused(gate, randn({4}), "up must have gate's 2 dimensions, got 1");
  require_refused(gate, gate.to(at::kDouble), "up must have gate's dtype Float, got Double");
  require_refused(gate.to(at::kInt), gate.to(at::kInt), "gate must be float32, bfloat16 or float64, got Int");
}

TEST_CASE("gated linear units refuse double backward in words", "[glu]") {
  const auto glu = GENERATE(from_range(kGlus));
  const at::Tensor gate = randn({3, 4}).requires_grad_(), up = randn({3, 4}, at::kFloat, 1);
  const at::Tensor g = torch::autograd::grad({glu.run(gate, up).square().sum()}, {gate}, {}, true, true)[0];
  require_error([&] { g.sum().backward(); },
                "derivative for flashlm::_" + glu.name + "_backward is not implemented");
}
