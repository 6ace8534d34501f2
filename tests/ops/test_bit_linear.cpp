// SPDX-License-Identifier: Apache-2.0
#include "ops/bit_linear.h"
#include "ops/ternary_weights.h"
#include "tests/ops/check.h"
#include "tests/ops/reference.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Shape = std::vector<int64_t>;

struct Mode {
  std::string quantizer, activation;
  bool norm;
};

std::ostream& operator<<(std::ostream& out, const Mode& mode) {
  return out << mode.quantizer << ", " << mode.activation << (mode.norm ? ", with" : ", without") << " norm";
}

std::vector<Mode> modes() {
  std::vector<Mode> out;
  for (const char* quantizer : {"absmean", "threshold"}) {
    for (const char* activation : {"int8", "none"}) {
      for (bool norm : {false, true}) out.push_back({quantizer, activation, norm});
    }
  }
  return out;
}

/// {x, weight} or {x, weight, norm_scale} of the mode.
Tensors inputs_for(const Mode& mode, Shape x_shape, int64_t n, at::ScalarType dtype) {
  const int64_t k = x_shape.back();
  Tensors out = {randn(x_shape, dtype), randn({n, k}, dtype, 1)};
  if (mode.norm) out.push_back(randn({k}, dtype, 2));
  return out;
}

OptionalTensor norm_of(const Tensors& t) { return t.size() > 2 ? OptionalTensor(t[2]) : std::nullopt; }

at::Tensor run(const Mode& mode, const Tensors& t) {
  return bit_linear(t[0], t[1], norm_of(t), mode.quantizer, mode.activation, 1e-6);
}

at::Tensor run_reference(const Mode& mode, const Tensors& t) {
  return reference::bit_linear(t[0], t[1], norm_of(t), mode.quantizer, mode.activation, 1e-6);
}

/// Where an activation lies on a tie between two integers, the last bit of the norm decides: one step of
/// 1 / s, times gamma. Without a norm the same bits are quantized, and there is nothing to decide.
double one_step(const Mode& mode, const Tensors& t) {
  if (mode.activation == "none" || !mode.norm || t[0].scalar_type() == at::kDouble || t[0].numel() == 0)
    return 0;
  const double largest = reference::rms_norm(t[0], t[2], 1e-6).abs().max().item<double>();
  const double gamma = mode.quantizer == "absmean" ? t[1].abs().mean().item<double>() : 1;
  return 1.01 * gamma * largest / 127;
}

Tensors requiring_grad(Tensors t) {
  for (auto& each : t) each.requires_grad_();
  return t;
}

}  // namespace

TEST_CASE("bit_linear equals its reference for any shape, stride and dtype", "[bit_linear]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble, at::kBFloat16);
  const auto mode = GENERATE(from_range(modes()));
  const auto [shape, n] = GENERATE(table<Shape, int64_t>({{{5}, 3},
                                                          {{1, 1}, 1},
                                                          {{3, 17}, 65},
                                                          {{2, 5, 256}, 33},
                                                          {{0, 8}, 4},
                                                          {{4, 8}, 0},
                                                          {{150, 683}, 70},
                                                          {{67, 64}, 683}}));
  INFO(mode << ", " << dtype << ", x " << at::IntArrayRef(shape) << ", out " << n);
  const Tensors t = inputs_for(mode, shape, n, dtype);
  // bfloat16 is computed in float32 and rounded once; the reference does the same.
  Tensors up = t;
  for (auto& each : up) each = each.to(dtype == at::kDouble ? at::kDouble : at::kFloat);
  const at::Tensor want = run_reference(mode, up).to(dtype);
  const double tolerance = dtype == at::kDouble ? 1e-14 : dtype == at::kFloat ? 1e-6 : 8e-3;
  require_close(run(mode, t), want, tolerance, one_step(mode, up));
  Tensors slices = t;
  for (auto& each : slices) each = strided(each);
  require_equal(run(mode, slices), run(mode, t));
}

TEST_CASE("bit_linear passes on that there is no gradient", "[bit_linear]") {
  for (const Mode& mode : modes()) {
    Tensors inputs = inputs_for(mode, {3, 8}, 5, at::kFloat);
    for (at::Tensor& t : inputs) t.requires_grad_();
    const at::Tensor y = without_gradient(run(mode, inputs));
    const Tensors grads = torch::autograd::grad({y.sum() + inputs[0].sum()}, inputs, {}, std::nullopt,
                                                /*create_graph=*/false, /*allow_unused=*/true);
    INFO(mode);
    require_equal(grads[0], at::ones_like(inputs[0]));
    for (size_t i = 1; i < grads.size(); ++i) REQUIRE_FALSE(grads[i].defined());
  }
}

TEST_CASE("bit_linear is exact where its arithmetic is", "[bit_linear]") {
  // Multiples of 1/8 below 2, weights whose threshold is no weight: float sums are exact in any order.
  const auto dtype = GENERATE(at::kFloat, at::kDouble);
  const at::Tensor x = dyadic({70, 683}, dtype), weight = dyadic({45, 683}, dtype, 1);
  require_equal(bit_linear(x, weight, std::nullopt, "threshold", "none"),
                reference::bit_linear(x, weight, std::nullopt, "threshold", "none", 0));
  // Rows of integers with a largest of 127 have scale 1; gamma of weights +-1 and +-3 in equal parts is 2.
  const at::Tensor q = dyadic({70, 8}, dtype).mul(63.5).round().index_put_({at::indexing::Slice(), 0}, 127);
  const at::Tensor w = torch::tensor({1, -3, 3, -1, 3, 1, -1, 3}, dtype).repeat({3, 1});
  require_equal(bit_linear(q, w),
                q.matmul(torch::tensor({0, -2, 2, 0, 2, 0, 0, 2}, dtype).repeat({3, 1}).t()));
}

TEST_CASE("bit_linear: weights on the threshold are 0, as are ties of absmean", "[bit_linear]") {
  const at::Tensor eye = torch::eye(4);
  const at::Tensor w = torch::tensor({{1.0, -1.0, 0.5, 1.5}});  // mean 1
  require_equal(bit_linear(eye, w, std::nullopt, "threshold", "none").t(),
                torch::tensor({{0., 0., 0., 1.}}).to(at::kFloat));
  require_equal(bit_linear(eye, w, std::nullopt, "absmean", "none").t(),
                torch::tensor({{1., -1., 0., 1.}}).to(at::kFloat));
  // All weights zero: gamma has a floor, the result is zero.
  for (const auto& mode : modes()) {
    if (!mode.norm) require_equal(run(mode, {eye, torch::zeros({2, 4})}), torch::zeros({4, 2}));
  }
}

TEST_CASE("bit_linear's infinities and NaNs are not quantized away", "[bit_linear]") {
  const double bad = GENERATE(INFINITY, -INFINITY, NAN);
  for (const auto& mode : modes()) {
    INFO(mode);
    Tensors t = inputs_for(mode, {3, 20}, 5, at::kFloat);
    const Tensors good = t;
    t[0] = t[0].clone();
    t[0][1][7] = bad;
    const at::Tensor y = run(mode, t);
    REQUIRE(at::equal(y[0], run(mode, good)[0]));
    REQUIRE(at::equal(y[2], run(mode, good)[2]));
    if (mode.activation == "int8") REQUIRE(y[1].isnan().all().item<bool>());
    t = good;
    t[1] = t[1].clone();
    t[1][1][7] = bad;
    REQUIRE(run(mode, t).isnan().all().item<bool>());
  }
}

TEST_CASE("bit_linear gradients in x and norm_scale by finite differences", "[bit_linear]") {
  // Float activations: y is smooth in both. The weight is a step function, see below.
  const std::string quantizer = GENERATE("threshold", "absmean");
  const at::Tensor weight = randn({5, 7}, at::kDouble, 1);
  const at::Tensor x = randn({2, 3, 7}, at::kDouble).requires_grad_();
  const at::Tensor scale = randn({7}, at::kDouble, 2).requires_grad_();
  require_gradients_match(
      [&](const Tensors& t) { return bit_linear(t[0], weight, std::nullopt, quantizer, "none"); }, {x});
  require_gradients_match(
      [&](const Tensors& t) { return bit_linear(t[0], weight, t[1], quantizer, "none", 1e-3); }, {x, scale});
}

TEST_CASE("bit_linear gradients equal autograd's, straight through the quantizers", "[bit_linear]") {
  const auto mode = GENERATE(from_range(modes()));
  // 300 and 683 rows are more than one block of every kind.
  const auto [shape, n] =
      GENERATE(table<Shape, int64_t>({{{6}, 3}, {{3, 17}, 65}, {{2, 150, 65}, 30}, {{683, 8}, 40}}));
  INFO(mode << ", x " << at::IntArrayRef(shape) << ", out " << n);
  for (auto [dtype, tolerance] : {std::pair(at::kDouble, 1e-12), std::pair(at::kFloat, 3e-6)}) {
    // In float32 a tie in the normed activations may fall either way: double covers that mode.
    if (dtype == at::kFloat && mode.norm && mode.activation == "int8") continue;
    const Tensors inputs = requiring_grad(inputs_for(mode, shape, n, dtype));
    const Tensors got = gradients(
        [&](Tensors t) {
          for (auto& each : t) each = strided(each);
          return run(mode, t);
        },
        inputs);
    const Tensors want = gradients([&](const Tensors& t) { return run_reference(mode, t); }, inputs);
    REQUIRE(got.size() == want.size());
    for (size_t i = 0; i < got.size(); ++i) {
      INFO("gradient " << i << " in " << dtype);
      require_close(got[i], want[i], tolerance);
    }
  }
}

TEST_CASE("bit_linear's other gradients are float32's where they lose nothing", "[bit_linear]") {
  const std::string gradient = GENERATE("bfloat16", "int8"), activation = GENERATE("int8", "none");
  if (gradient == "int8" && activation == "none") return;
  const auto [m, k, n] = GENERATE(table<int64_t, int64_t, int64_t>(
      {{1, 1, 1}, {3, 17, 65}, {97, 256, 33}, {259, 65, 30}, {683, 8, 49}, {4200, 20, 10}}));
  INFO(gradient << " with " << activation << ", M " << m << ", K " << k << ", N " << n);
  // Rows of integers with a largest of 127 have scale 1. So have grad_y's rows and columns where 127 is the
  // largest of all: in the first column, and in the first row of each block of 256.
  using at::indexing::Slice;
  const at::Tensor x = dyadic({m, k}).mul(63.5).round().index_put_({Slice(), 0}, 127);
  const at::Tensor weight = randn({n, k}, at::kFloat, 1);
  at::Tensor grad_y = dyadic({m, n}, at::kFloat, 2).mul(8).index_put_({Slice(), 0}, 127);
  grad_y.index_put_({Slice(0, m, 256)}, 127);
  for (const bool norm : {false, true}) {
    OptionalTensor norm_scale;
    if (norm) norm_scale = randn({k}, at::kFloat, 3);
    const auto grads = [&](std::string_view arithmetic) {
      Tensors in = {x.clone().requires_grad_(), weight.clone().requires_grad_()};
      if (norm) in.push_back(norm_scale->clone().requires_grad_());
      const at::Tensor y = bit_linear(in[0], in[1], norm_of(in), "absmean", activation, 1e-6, arithmetic);
      return torch::autograd::grad({y}, in, {grad_y});
    };
    const Tensors got = grads(gradient), want = grads("float32");
    // The normed rows are no bfloat16 numbers, and 1 / s is no power of two: grad_weight is rounded.
    for (size_t i = 0; i < got.size(); ++i) require_close(got[i], want[i], i == 1 && norm ? 1e-2 : 3e-6);
  }
}

TEST_CASE("bit_linear's other gradients are near float32's", "[bit_linear]") {
  const auto [gradient, rms_error] =
      GENERATE(table<std::string, double>({{"bfloat16", 3e-3}, {"int8", 3e-2}}));
  const at::Tensor grad_y =
      randn({1000, 70}, at::kFloat, 2).mul_(randn({1000, 1}, at::kFloat, 3).exp()).mul_(1e-9);
  const auto grads = [&](std::string_view arithmetic) {
    const Tensors in = {randn({1000, 90}).requires_grad_(), randn({70, 90}, at::kFloat, 1).requires_grad_()};
    return torch::autograd::grad(
        {bit_linear(in[0], in[1], std::nullopt, "absmean", "int8", 1e-6, arithmetic)}, in, {grad_y});
  };
  const Tensors got = grads(gradient), want = grads("float32");
  for (size_t i = 0; i < got.size(); ++i) {
    INFO(gradient << ", gradient " << i);
    REQUIRE((got[i] - want[i]).norm().item<double>() < rms_error * want[i].norm().item<double>());
  }
  // In float64 there is nothing to gain: it is exact whatever is asked for.
  const at::Tensor a = randn({9, 5}, at::kDouble).requires_grad_(), w = randn({4, 5}, at::kDouble, 1);
  const auto exact = [&](std::string_view arithmetic) {
    return torch::autograd::grad(
        {bit_linear(a, w, std::nullopt, "absmean", "int8", 1e-6, arithmetic).square().sum()}, {a})[0];
  };
  require_equal(exact(gradient), exact("float32"));
}

TEST_CASE("bit_linear's broken gradients stay broken, and zero ones zero", "[bit_linear]") {
  const std::string gradient = GENERATE("float32", "bfloat16", "int8");
  const double bad = GENERATE(0.0, INFINITY, NAN);
  const at::Tensor x = randn({40, 20}).requires_grad_(), w = randn({30, 20}, at::kFloat, 1).requires_grad_();
  at::Tensor grad_y = torch::zeros({40, 30});
  grad_y[3][7] = bad;
  const auto grads = torch::autograd::grad(
      {bit_linear(x, w, std::nullopt, "absmean", "int8", 1e-6, gradient)}, {x, w}, {grad_y});
  if (bad == 0) {
    for (const at::Tensor& g : grads) require_equal(g, torch::zeros_like(g));
  } else {
    REQUIRE(!grads[0][3].isfinite().all().item<bool>());
    REQUIRE(!grads[1][7].isfinite().all().item<bool>());
  }
}

TEST_CASE("bit_linear computes only the gradients that are asked for", "[bit_linear]") {
  for (const auto& mode : modes()) {
    INFO(mode);
    const Tensors all = requiring_grad(inputs_for(mode, {40, 33}, 20, at::kFloat));
    const Tensors want = gradients([&](const Tensors& t) { return run(mode, t); }, all);
    for (size_t i = 0; i < all.size(); ++i) {
      Tensors one;
      for (size_t j = 0; j < all.size(); ++j) one.push_back(j == i ? all[j] : all[j].detach());
      require_equal(gradients([&](const Tensors& t) { return run(mode, t); }, one)[0], want[i]);
    }
  }
}

TEST_CASE("bit_linear keeps int8 rows for its backward, not x", "[bit_linear]") {
  const at::Tensor weight = randn({4, 8}).requires_grad_();
  for (const auto& [activation, owners] : {std::pair("int8", size_t{1}), std::pair("none", size_t{2})}) {
    const at::Tensor x = randn({3, 8});
    const at::Tensor y = bit_linear(x, weight, std::nullopt, "absmean", activation);
    REQUIRE(x.use_count() == owners);
  }
}

TEST_CASE("_bit_linear_forward without rows has the gradients that it has with them", "[bit_linear]") {
  const auto forward = c10::Dispatcher::singleton()
                           .findSchemaOrThrow("flashlm::_bit_linear_forward", "")
                           .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
                               const at::Tensor&, const at::Tensor&, const OptionalTensor&, std::string_view,
                               std::string_view, double, std::string_view, bool)>();
  const auto run = [&](const Tensors& t, std::string_view activation, bool with_rows) {
    return forward.call(t[0], t[1], std::nullopt, "absmean", activation, 1e-6, "float32", with_rows);
  };
  const Tensors inputs = requiring_grad({randn({5, 33}), randn({7, 33}, at::kFloat, 1)});
  const auto [y, q, inverse_scale] = run(inputs, "int8", false);
  REQUIRE(q.size(0) == 0);
  REQUIRE(inverse_scale.size(0) == 0);
  REQUIRE(std::get<1>(run(inputs, "int8", true)).sizes() == at::IntArrayRef({5, 64}));
  const auto gradients_of = [&](bool with_rows) {
    return gradients([&](const Tensors& t) { return std::get<0>(run(t, "int8", with_rows)); }, inputs);
  };
  const Tensors got = gradients_of(false), want = gradients_of(true);
  for (size_t i = 0; i < want.size(); ++i) require_equal(got[i], want[i]);
  require_error([&] { run(inputs, "none", true); },
                "_bit_linear_forward: with_rows needs activation 'int8' and no norm_scale");
}

TEST_CASE("bit_linear never multiplies by weights of the past", "[bit_linear]") {
  const at::Tensor x = randn({5, 40});
  for (const auto& mode : modes()) {
    if (mode.norm) continue;
    INFO(mode);
    at::Tensor weight = randn({6, 40}, at::kFloat, 1).requires_grad_();
    const auto require_fresh = [&](const char* how) {
      INFO("weight changed by " << how);
      const at::Tensor copy = weight.detach().clone();
      require_equal(run(mode, {x, weight}).detach(), run(mode, {x, copy}));
      // The backward's layouts too.
      for (const char* gradient : {"float32", "bfloat16", "int8"}) {
        if (std::string(gradient) == "int8" && mode.activation == "none") continue;
        const auto grad = [&](const at::Tensor& w) {
          const at::Tensor a = x.clone().requires_grad_();
          const at::Tensor y =
              bit_linear(a, w, std::nullopt, mode.quantizer, mode.activation, 1e-6, gradient);
          return torch::autograd::grad({y.sum()}, {a})[0];
        };
        require_equal(grad(weight), grad(copy));
      }
    };
    require_fresh("nothing");
    weight.detach().neg_();
    require_fresh("an in-place operator");
    weight.detach()[3][7] = 5;
    require_fresh("one element");
    // These three leave weight's version counter as it is.
    weight.variable_data().neg_();
    require_fresh("its data");
    weight.mutable_data_ptr<float>()[39] *= -1;
    require_fresh("a pointer");
    const at::Tensor grad = torch::ones_like(weight), zero = torch::zeros_like(weight);
    const at::Tensor steps = torch::ones({});
    at::_fused_adamw_({weight.detach()}, {grad}, {zero.clone()}, {zero.clone()}, {}, {steps}, /*lr=*/0.5, 0.9,
                      0.95, 0.1, 1e-8, /*amsgrad=*/false, /*maximize=*/false);
    require_fresh("a fused optimizer");
    weight.set_data(randn({6, 40}, at::kFloat, 9));
    require_fresh("other data");
    // Another matrix over the same memory: other strides, other place.
    const at::Tensor base = randn({40, 40}, at::kFloat, 3);
    for (const at::Tensor& view : {base.narrow(0, 0, 6), base.t().narrow(0, 0, 6), base.narrow(0, 6, 6)}) {
      weight = view;
      require_fresh("a view");
    }
    // Memory given back and taken again.
    for (uint64_t seed = 0; seed < 8; ++seed) {
      weight = randn({6, 40}, at::kFloat, seed);
      require_fresh("a new tensor");
    }
  }
}

TEST_CASE("ternary_weights are made once while the weights stay the same", "[bit_linear]") {
  using kernels::Quantizer;
  const at::Tensor weight = randn({6, 40});
  const auto first = ternary_weights<float>(weight, Quantizer::kAbsmean);
  REQUIRE(ternary_weights<float>(weight, Quantizer::kAbsmean) == first);
  REQUIRE(ternary_weights<float>(weight.detach(), Quantizer::kAbsmean) == first);
  REQUIRE(ternary_weights<float>(weight, Quantizer::kThreshold) != first);
  weight.neg_();
  const auto second = ternary_weights<float>(weight, Quantizer::kAbsmean);
  REQUIRE(second != first);
  REQUIRE(ternary_weights<float>(weight, Quantizer::kAbsmean) == second);
}

TEST_CASE("bit_linear gradients in bfloat16 are float32's, rounded", "[bit_linear]") {
  const auto mode = GENERATE(from_range(modes()));
  const Tensors t = requiring_grad(inputs_for(mode, {40, 33}, 20, at::kBFloat16));
  Tensors up;
  for (const auto& each : t) up.push_back(each.detach().to(at::kFloat).requires_grad_());
  const Tensors got = gradients([&](const Tensors& in) { return run(mode, in); }, t);
  const Tensors want = gradients([&](const Tensors& in) { return run(mode, in); }, up);
  for (size_t i = 0; i < got.size(); ++i) require_close(got[i], want[i].to(at::kBFloat16), 1e-2);
}

TEST_CASE("bit_linear gradients of empty batches and no outputs are zeros", "[bit_linear]") {
  for (const auto& mode : modes()) {
    INFO(mode);
    for (auto [m, n] : {std::pair(0, 3), std::pair(3, 0)}) {
      const Tensors inputs = requiring_grad(inputs_for(mode, {m, 5}, n, at::kFloat));
      const Tensors got = gradients([&](const Tensors& t) { return run(mode, t); }, inputs);
      for (size_t i = 0; i < got.size(); ++i) require_equal(got[i], at::zeros_like(inputs[i]).detach());
    }
  }
}

TEST_CASE("bit_linear does not depend on the number of threads", "[bit_linear]") {
  const std::string gradient = GENERATE("float32", "bfloat16", "int8");
  for (const auto& mode : modes()) {
    if (gradient == "int8" && mode.activation == "none") continue;
    INFO(mode << ", gradient " << gradient);
    const Tensors inputs = requiring_grad(inputs_for(mode, {600, 96}, 250, at::kFloat));
    require_same_for_any_threads([&] {
      Tensors out = gradients(
          [&](const Tensors& t) {
            return bit_linear(t[0], t[1], norm_of(t), mode.quantizer, mode.activation, 1e-6, gradient);
          },
          inputs);
      torch::NoGradGuard no_grad;
      out.push_back(run(mode, inputs));
      return out;
    });
  }
}

TEST_CASE("bit_linear refuses wrong arguments in words", "[bit_linear]") {
  const at::Tensor x = randn({3, 5}), w = randn({4, 5}), scale = randn({5});
  require_error(
      [&] {
        bit_linear(randn({2, 3}), w);
      },
      "bit_linear: x's last dimension must be weight's in = 5, got 3");
  require_error([&] { bit_linear(x.to(at::kInt), w); },
                "bit_linear: x must be float32, bfloat16 or float64, got Int");
  require_error([&] { bit_linear(x, w.to(at::kDouble)); },
                "bit_linear: weight must have x's dtype Float, got Double");
  require_error([&] { bit_linear(at::scalar_tensor(1.0), w); },
                "bit_linear: x must have at least 1 dimension, got 0");
  require_error([&] { bit_linear(x, randn({5})); }, "bit_linear: weight must have 2 dimensions, got 1");
  require_error(
      [&] {
        bit_linear(randn({3, 0}), randn({4, 0}));
      },
      "bit_linear: weight's in must be at least 1, got 0");
  require_error([&] { bit_linear(x, w, randn({4})); }, "bit_linear: norm_scale's size must be 5, got 4");
  require_error(
      [&] {
        bit_linear(x, w, randn({5, 1}));
      },
      "bit_linear: norm_scale must have 1 dimension, got 2");
  require_error([&] { bit_linear(x, w, scale.to(at::kBFloat16)); },
                "bit_linear: norm_scale must have x's dtype Float, got BFloat16");
  require_error([&] { bit_linear(x, w, scale, "foo"); },
                "bit_linear: quantizer must be 'absmean' or 'threshold', got 'foo'");
  require_error([&] { bit_linear(x, w, scale, "absmean", "int4"); },
                "bit_linear: activation must be 'int8' or 'none', got 'int4'");
  require_error([&] { bit_linear(x, w, scale, "absmean", "int8", -1); },
                "bit_linear: eps must be >= 0, got -1");
  require_error([&] { bit_linear(x, w, scale, "absmean", "int8", 1e-6, "fp8"); },
                "bit_linear: gradient must be 'float32', 'bfloat16' or 'int8', got 'fp8'");
  require_error([&] { bit_linear(x, w, scale, "absmean", "none", 1e-6, "int8"); },
                "bit_linear: gradient 'int8' needs activation 'int8', got 'none'");
}

TEST_CASE("bit_linear refuses sums that int32 does not hold", "[bit_linear]") {
  // Tensors without data, expanded from one value where there must be some.
  const auto row = [](int64_t k) { return torch::zeros({1, 1}, at::kMeta).expand({1, k}); };
  REQUIRE(bit_linear(row(16777215), row(16777215)).size(1) == 1);
  REQUIRE(bit_linear(row(16777216), row(16777216), std::nullopt, "absmean", "none").size(1) == 1);
  require_error([&] { bit_linear(row(16777216), row(16777216)); },
                "bit_linear: weight's in must be at most 16777215 in activation mode 'int8', where sums are "
                "int32, got 16777216; use activation 'none'");
}

TEST_CASE("bit_linear refuses double backward in words", "[bit_linear]") {
  const at::Tensor x = randn({3, 4}).requires_grad_();
  const at::Tensor g =
      torch::autograd::grad({bit_linear(x, randn({2, 4})).square().sum()}, {x}, {}, true, true)[0];
  require_error([&] { g.sum().backward(); },
                "derivative for flashlm::_bit_linear_backward is not implemented");
}
