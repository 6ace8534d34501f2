// SPDX-License-Identifier: Apache-2.0
// What the operator tests share: seeded inputs with awkward strides, a comparison that prints the worst
// element, a gradient check by central differences, and "fails with these words".
#pragma once

// clang-format off
#include <torch/torch.h>
#undef CHECK  // torch's and Catch2's clash
#include <catch2/catch.hpp>
// clang-format on

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <functional>
#include <string>
#include <vector>

namespace flashlm::testing {

using Tensors = std::vector<at::Tensor>;

#if defined(__GLIBC__)
// New memory is all ones, a NaN in every floating dtype: what is not written, but read, shows.
inline const int new_memory_is_nan = mallopt(M_PERTURB, 0x100);
#endif

/// Seeded normal values.
inline at::Tensor randn(at::IntArrayRef shape, at::ScalarType dtype = at::kFloat, uint64_t seed = 0) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed + 17);
  return torch::randn(shape, generator, at::TensorOptions(at::kDouble)).to(dtype);
}

/// Multiples of 1/8 in [-2, 2]: sums and products of a few thousand of them are exact in float32, so that
/// results can be compared bit for bit.
inline at::Tensor dyadic(at::IntArrayRef shape, at::ScalarType dtype = at::kFloat, uint64_t seed = 0) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed + 23);
  return torch::randint(-16, 17, shape, generator, at::TensorOptions(at::kDouble)).div(8).to(dtype);
}

/// The same values behind the strides of a slice of a wider tensor.
inline at::Tensor strided(const at::Tensor& t) {
  if (t.dim() == 0) return t;
  auto shape = t.sizes().vec();
  shape.back() = 2 * shape.back() + 3;
  at::Tensor wide = at::zeros(shape, t.options());
  at::Tensor slice = wide.slice(-1, 1, 1 + 2 * t.size(-1), 2);
  slice.copy_(t);
  return slice;
}

/// |got - want| <= atol + rtol * max|want|, with the worst element in the message.
inline void require_close(const at::Tensor& got, const at::Tensor& want, double rtol, double atol = 0) {
  REQUIRE(got.sizes() == want.sizes());
  REQUIRE(got.scalar_type() == want.scalar_type());
  if (got.numel() == 0) return;
  const at::Tensor g = got.detach().to(at::kDouble).flatten(), w = want.detach().to(at::kDouble).flatten();
  const at::Tensor error = (g - w).abs();
  const int64_t worst = error.argmax().item<int64_t>();
  const double bound = atol + rtol * w.abs().max().item<double>();
  INFO("worst element " << worst << ": got " << g[worst].item<double>() << ", want "
                        << w[worst].item<double>() << ", bound " << bound);
  REQUIRE(error[worst].item<double>() <= bound);
}

/// |got - want| <= tolerance |want|, in the 2-norm.
inline void require_close_in_norm(const at::Tensor& got, const at::Tensor& want, double tolerance) {
  REQUIRE(got.sizes() == want.sizes());
  const double error = (got.to(at::kDouble) - want.to(at::kDouble)).norm().item<double>();
  REQUIRE(error <= tolerance * want.to(at::kDouble).norm().item<double>());
}

inline void require_equal(const at::Tensor& got, const at::Tensor& want) { require_close(got, want, 0, 0); }

/// Gradients of sum(f(inputs) * fixed random weights) with respect to every input that requires one.
inline Tensors gradients(const std::function<at::Tensor(const Tensors&)>& f, const Tensors& inputs) {
  Tensors leaves, wanted;
  for (const auto& t : inputs) {
    leaves.push_back(t.defined() && t.requires_grad() ? t.detach().clone().requires_grad_() : t);
    if (leaves.back().defined() && leaves.back().requires_grad()) wanted.push_back(leaves.back());
  }
  const at::Tensor y = f(leaves);
  return torch::autograd::grad({y}, wanted, {randn(y.sizes(), y.scalar_type(), 99)});
}

/// Compares the analytic gradient of f (double inputs) with central differences, element by element.
inline void require_gradients_match(const std::function<at::Tensor(const Tensors&)>& f, const Tensors& inputs,
                                    double tolerance = 1e-7) {
  const Tensors analytic = gradients(f, inputs);
  constexpr double kStep = 1e-5;
  size_t next = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].defined() || !inputs[i].requires_grad()) continue;
    REQUIRE(inputs[i].scalar_type() == at::kDouble);
    torch::NoGradGuard no_grad;
    Tensors moved = inputs;
    const at::Tensor base = inputs[i].detach().clone().contiguous();
    at::Tensor numeric = at::zeros_like(base);
    for (int64_t e = 0; e < base.numel(); ++e) {
      const auto value_at = [&](double delta) {
        moved[i] = base.clone();
        moved[i].view(-1)[e] += delta;
        const at::Tensor y = f(moved);
        return (y * randn(y.sizes(), at::kDouble, 99)).sum().item<double>();
      };
      numeric.view(-1)[e] = (value_at(kStep) - value_at(-kStep)) / (2 * kStep);
    }
    INFO("input " << i);
    require_close(analytic[next++].contiguous(), numeric, tolerance, tolerance);
  }
}

/// f() must throw an error whose text contains `words`.
inline void require_error(const std::function<void()>& f, const std::string& words) {
  std::string text = "no error";
  try {
    f();
  } catch (const std::exception& error) {
    text = error.what();
  }
  REQUIRE_THAT(text, Catch::Contains(words));
}

/// f() gives the same bits on one thread as on several.
inline void require_same_for_any_threads(const std::function<Tensors()>& f) {
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const Tensors one = f();
  for (int n : {2, 3}) {
    at::set_num_threads(n);
    const Tensors many = f();
    for (size_t i = 0; i < one.size(); ++i) REQUIRE(at::equal(one[i], many[i]));
  }
  at::set_num_threads(threads);
}

/// y itself, whose gradient is never defined.
inline at::Tensor without_gradient(const at::Tensor& y) {
  struct WithoutGradient : torch::autograd::Function<WithoutGradient> {
    static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& x) { return x.clone(); }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                   const torch::autograd::variable_list&) {
      return {at::Tensor()};
    }
  };
  return WithoutGradient::apply(y);
}

}  // namespace flashlm::testing
