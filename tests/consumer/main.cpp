// SPDX-License-Identifier: Apache-2.0
// What a user of the installed package does: calls operators as C++ functions, trains through them, and runs
// a TorchScript file that calls them. Exits with 1 when a result is wrong.
#include <torch/script.h>

#include <cmath>
#include <functional>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "ops/glu.h"
#include "ops/rms_norm.h"

namespace {

int failures = 0;

void expect_close(const char* what, const at::Tensor& got, const at::Tensor& want) {
  const bool close = got.sizes() == want.sizes() && at::allclose(got, want, /*rtol=*/1e-5, /*atol=*/1e-6);
  std::cout << (close ? "ok    " : "WRONG ") << what << ": " << got.flatten() << '\n';
  if (!close) ++failures;
}

/// {y, grad_x} of the loss sum(y * weights).
std::vector<at::Tensor> forward_and_backward(const std::function<at::Tensor(const at::Tensor&)>& f,
                                             const at::Tensor& x, const at::Tensor& weights) {
  const at::Tensor leaf = x.clone().requires_grad_();
  const at::Tensor y = f(leaf);
  (y * weights).sum().backward();
  return {y.detach(), leaf.grad()};
}

/// Lets a script say flashlm.rms_norm(...).
struct Operators : torch::jit::Resolver {
  std::shared_ptr<torch::jit::SugaredValue> resolveValue(const std::string& name, torch::jit::GraphFunction&,
                                                         const torch::jit::SourceRange&) override {
    return name == "flashlm" ? std::make_shared<torch::jit::BuiltinModule>("flashlm") : nullptr;
  }
};

/// A module written to a TorchScript file and read back.
torch::jit::Module saved_and_loaded() {
  torch::jit::Module module("Norm");
  module.register_parameter("scale", torch::tensor({1.f, 2.f}), /*is_buffer=*/false);
  module.define("def forward(self, x: Tensor): return flashlm.rms_norm(x, self.scale, 0.)\n",
                std::make_shared<Operators>());
  std::stringstream file;
  module.save(file);
  return torch::jit::load(file);
}

}  // namespace

int main() {
  const at::Tensor x = torch::tensor({{3.f, 4.f}}), scale = torch::tensor({1.f, 2.f});
  const at::Tensor weights = torch::tensor({{1.f, 1.f}});

  // mean x² = 12.5 = r², y = x scale / r, dL/dx = (scale - x (x · scale) / (2 r²)) / r.
  const float r = std::sqrt(12.5f);
  const at::Tensor want_y = torch::tensor({{3 / r, 8 / r}});
  const at::Tensor want_grad = torch::tensor({{(1 - 3 * 11 / 25.f) / r, (2 - 4 * 11 / 25.f) / r}});
  const auto direct = forward_and_backward(
      [&](const at::Tensor& t) { return flashlm::rms_norm(t, scale, /*eps=*/0); }, x, weights);
  expect_close("rms_norm", direct[0], want_y);
  expect_close("rms_norm's gradient", direct[1], want_grad);

  torch::jit::Module module = saved_and_loaded();
  const auto scripted =
      forward_and_backward([&](const at::Tensor& t) { return module.forward({t}).toTensor(); }, x, weights);
  expect_close("rms_norm in TorchScript", scripted[0], want_y);
  expect_close("its gradient", scripted[1], want_grad);

  // y = 3² · 4, dy/dgate = 2 · 3 · 4.
  const auto glu = forward_and_backward(
      [](const at::Tensor& gate) { return flashlm::relu2_glu(gate, torch::tensor({4.f})); },
      torch::tensor({3.f}), torch::tensor({1.f}));
  expect_close("relu2_glu", glu[0], torch::tensor({36.f}));
  expect_close("relu2_glu's gradient", glu[1], torch::tensor({24.f}));
  return failures == 0 ? 0 : 1;
}
