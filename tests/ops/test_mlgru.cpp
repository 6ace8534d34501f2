// SPDX-License-Identifier: Apache-2.0
#include "ops/mlgru.h"
#include "tests/ops/check.h"
#include "tests/ops/reference.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

struct Options {
  bool h0, lower_bound;
  const char* activation;
};

const std::vector<Options> kOptions = {
    {false, false, "none"}, {true, false, "none"}, {false, false, "silu"}, {true, true, "silu"}};

std::ostream& operator<<(std::ostream& out, const Options& options) {
  return out << options.activation << " h0 " << options.h0 << " lower_bound " << options.lower_bound;
}

struct Shape {
  int64_t batch, time, width;
};

std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  return out << "B " << shape.batch << " T " << shape.time << " D " << shape.width;
}

/// f, c, h0 and lower_bound; undefined where the options have none.
Tensors inputs_of(const Options& options, const Shape& shape, at::ScalarType dtype = at::kFloat) {
  const auto [batch, time, width] = shape;
  const at::Tensor f = randn({batch, time, width}, at::kDouble);
  Tensors inputs = {(options.activation == std::string("silu") ? f : f.sigmoid()).to(dtype),
                    randn({batch, time, width}, dtype, 1), at::Tensor(), at::Tensor()};
  if (options.h0) inputs[2] = randn({batch, width}, dtype, 2);
  if (options.lower_bound) inputs[3] = (0.9 * randn({width}, at::kDouble, 3).sigmoid()).to(dtype);
  return inputs;
}

Tensors with_gradients(Tensors inputs) {
  for (at::Tensor& t : inputs) {
    if (t.defined()) t.requires_grad_();
  }
  return inputs;
}

std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

/// h and h_last side by side, (B, T + 1, D), so that one gradient weighs both.
at::Tensor joined(const std::tuple<at::Tensor, at::Tensor>& out) {
  return at::cat({std::get<0>(out), std::get<1>(out).unsqueeze(1)}, 1);
}

at::Tensor run(const Tensors& t, const Options& options) {
  return joined(mlgru(t[0], t[1], optional(t[2]), optional(t[3]), options.activation));
}

at::Tensor run_reference(const Tensors& t, const Options& options) {
  return joined(reference::mlgru(t[0], t[1], optional(t[2]), optional(t[3]), options.activation));
}

Tensors map(const Tensors& tensors, const std::function<at::Tensor(const at::Tensor&)>& f) {
  Tensors out;
  for (const at::Tensor& t : tensors) out.push_back(t.defined() ? f(t) : t);
  return out;
}

}  // namespace

TEST_CASE("mlgru equals its reference for any shape, stride and dtype", "[mlgru]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble, at::kBFloat16);
  const auto options = GENERATE(from_range(kOptions));
  const double tolerance = dtype == at::kDouble ? 1e-14 : dtype == at::kFloat ? 1e-6 : 8e-3;
  for (const Shape& shape : {Shape{1, 1, 1}, {2, 7, 5}, {3, 130, 33}, {1, 65, 64}, {5, 2, 200}}) {
    INFO(options << " " << shape << " dtype " << dtype);
    const Tensors inputs = inputs_of(options, shape, dtype);
    // bfloat16 is computed in float32 and rounded once; the reference does the same.
    const auto wide = [&](const at::Tensor& t) { return t.to(dtype == at::kBFloat16 ? at::kFloat : dtype); };
    const at::Tensor want = run_reference(map(inputs, wide), options).to(dtype);
    require_close(run(inputs, options), want, tolerance);
    require_close(run(map(inputs, strided), options), want, tolerance);
    const auto transposed = [](const at::Tensor& t) {
      return t.dim() == 3 ? t.transpose(0, 1).contiguous().transpose(0, 1) : t;
    };
    require_close(run(map(inputs, transposed), options), want, tolerance);
  }
}

TEST_CASE("mlgru's float32 state and gradients equal those of a sequential scan in double", "[mlgru]") {
  const auto options = GENERATE(from_range(kOptions));
  // Whole; and long enough on few channels for time to be cut, into unequal parts.
  const auto shape = GENERATE(Shape{3, 300, 40}, Shape{2, 5000, 3});
  INFO(options << " " << shape);
  const Tensors inputs = with_gradients(inputs_of(options, shape));
  const Tensors exact =
      map(inputs, [](const at::Tensor& t) { return t.detach().to(at::kDouble).requires_grad_(); });
  const auto to_double = [](const at::Tensor& t) { return t.to(at::kDouble); };
  require_close(run(inputs, options).to(at::kDouble), run_reference(exact, options), 1e-6);
  const Tensors got = gradients([&](const Tensors& t) { return run(t, options); }, inputs);
  // The weights of the sum are the same values: float32 ones.
  const Tensors want =
      gradients([&](const Tensors& t) { return run_reference(t, options).to(at::kFloat); }, exact);
  REQUIRE(got.size() == want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    INFO("gradient " << i);
    require_close(to_double(got[i]), want[i], 2e-6);
  }
}

TEST_CASE("mlgru in pieces and step by step equals the whole bit for bit", "[mlgru]") {
  const auto options = GENERATE(from_range(kOptions));
  const auto dtype = GENERATE(at::kFloat, at::kDouble);
  INFO(options << " dtype " << dtype);
  const int64_t time = 97;
  const Tensors inputs = inputs_of(options, {2, time, 37}, dtype);
  const at::Tensor whole = run(inputs, options);
  for (int64_t longest : {1, 2, 13, 96}) {
    INFO("pieces of " << longest);
    std::optional<at::Tensor> state = optional(inputs[2]), step_state = state;
    Tensors pieces;
    for (int64_t begin = 0; begin < time; begin += longest) {
      const int64_t end = std::min(time, begin + longest);
      const auto [h, last] = mlgru(inputs[0].slice(1, begin, end), inputs[1].slice(1, begin, end), state,
                                   optional(inputs[3]), options.activation);
      pieces.push_back(h);
      state = last;
    }
    pieces.push_back(state->unsqueeze(1));
    REQUIRE(at::equal(at::cat(pieces, 1), whole));
  }
  at::Tensor state = inputs[2].defined() ? inputs[2] : torch::zeros({2, 37}, inputs[0].options());
  for (int64_t t = 0; t < time; ++t) {
    state = mlgru_step(inputs[0].select(1, t), inputs[1].select(1, t), state, optional(inputs[3]),
                       options.activation);
    REQUIRE(at::equal(state, whole.select(1, t)));
  }
}

TEST_CASE("mlgru does not see what comes later", "[mlgru]") {
  const auto options = GENERATE(from_range(kOptions));
  const auto shape = GENERATE(Shape{1, 50, 40}, Shape{1, 4500, 2});
  INFO(options << " " << shape);
  Tensors inputs = inputs_of(options, shape);
  const at::Tensor h = run(inputs, options), f = inputs[0], c = inputs[1];
  for (int64_t t : {int64_t{0}, shape.time / 2, shape.time - 2}) {
    inputs[0] = f.clone();
    inputs[1] = c.clone();
    for (int64_t i : {0, 1}) inputs[i].slice(1, t + 1).fill_(NAN);
    const at::Tensor changed = run(inputs, options);
    REQUIRE(at::equal(h.slice(1, 0, t + 1), changed.slice(1, 0, t + 1)));
    REQUIRE(changed.slice(1, t + 1).isnan().all().item<bool>());
  }
}

TEST_CASE("a NaN in either input is one in every later state", "[mlgru]") {
  const auto options = GENERATE(from_range(kOptions));
  const auto dtype = GENERATE(at::kFloat, at::kDouble);
  for (int64_t i : {0, 1}) {
    INFO(options << " " << dtype << " input " << i);
    Tensors inputs = inputs_of(options, {1, 9, 20}, dtype);
    inputs[i].select(1, 4).fill_(NAN);
    const at::Tensor h = run(inputs, options);
    REQUIRE(h.slice(1, 0, 4).isfinite().all().item<bool>());
    REQUIRE(h.slice(1, 4).isnan().all().item<bool>());
  }
}

TEST_CASE("mlgru without batch, time or channels has zero gradients and passes the state on", "[mlgru]") {
  const auto options = GENERATE(from_range(kOptions));
  for (const Shape& shape : {Shape{0, 5, 3}, {2, 0, 3}, {2, 5, 0}}) {
    INFO(options << " " << shape);
    const auto [batch, time, width] = shape;
    const Tensors inputs = with_gradients(inputs_of(options, shape));
    const at::Tensor start = options.h0 ? inputs[2] : torch::zeros({batch, width});
    const at::Tensor out = run(inputs, options);
    REQUIRE(out.sizes() == at::IntArrayRef({batch, time + 1, width}));
    if (time == 0) require_equal(out, start.unsqueeze(1));
    const Tensors grads = gradients([&](const Tensors& t) { return run(t, options); }, inputs);
    size_t next = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].defined()) continue;
      const bool state = i == 2 && time == 0;  // h_last is h0
      require_equal(grads[next++], state ? randn({batch, 1, width}, at::kFloat, 99).squeeze(1)
                                         : torch::zeros_like(inputs[i]));
    }
  }
}

TEST_CASE("mlgru gradients", "[mlgru]") {
  for (const Options& options : kOptions) {
    INFO(options);
    const Tensors inputs = with_gradients(inputs_of(options, {2, 5, 3}, at::kDouble));
    require_gradients_match([&](const Tensors& t) { return run(t, options); }, inputs);
    const auto either = [&](auto output) {
      return [&options, output](const Tensors& t) {
        return output(mlgru(t[0], t[1], optional(t[2]), optional(t[3]), options.activation));
      };
    };
    require_gradients_match(either([](const auto& out) { return std::get<0>(out); }), inputs);
    require_gradients_match(either([](const auto& out) { return std::get<1>(out); }), inputs);
  }
}

TEST_CASE("mlgru does not depend on the number of threads", "[mlgru]") {
  const auto options = GENERATE(from_range(kOptions));
  // Threads share sequences, channels, or chunks of time.
  const auto shape = GENERATE(Shape{5, 300, 48}, Shape{1, 700, 100}, Shape{1, 9000, 5}, Shape{3, 4097, 2});
  INFO(options << " " << shape);
  require_same_for_any_threads([&] {
    const Tensors inputs = with_gradients(inputs_of(options, shape));
    const auto f = [&](const Tensors& t) { return run(t, options); };
    Tensors out = gradients(f, inputs);
    out.push_back(f(inputs).detach());
    return out;
  });
}

TEST_CASE("mlgru refuses wrong arguments in words", "[mlgru]") {
  const at::Tensor f = randn({2, 5, 8}), state = randn({2, 8}), bound = randn({8});
  require_error([&] { mlgru(f[0], f[0]); }, "mlgru: f must have 3 dimensions, got 2");
  require_error([&] { mlgru(f.to(at::kInt), f); }, "mlgru: f must be float32, bfloat16 or float64, got Int");
  require_error([&] { mlgru(f, f.to(at::kDouble)); }, "mlgru: c must have f's dtype Float, got Double");
  require_error([&] { mlgru(f, randn({2, 5, 7})); }, "mlgru: c must be (B, T, D) = [2, 5, 8], got [2, 5, 7]");
  require_error([&] { mlgru(f, f, f); }, "mlgru: h0 must be (B, D) = [2, 8], got [2, 5, 8]");
  require_error([&] { mlgru(f, f, randn({8})); }, "mlgru: h0 must be (B, D) = [2, 8], got [8]");
  require_error([&] { mlgru(f, f, state.to(at::kDouble)); },
                "mlgru: h0 must have f's dtype Float, got Double");
  require_error([&] { mlgru(f, f, state, randn({7}), "silu"); },
                "mlgru: lower_bound must be (D) = [8], got [7]");
  require_error(
      [&] { mlgru(f, f, state, bound); },
      "mlgru: lower_bound is for activation silu, got activation none; without it f is used as it is");
  require_error([&] { mlgru(f, f, state, {}, "tanh"); }, "mlgru: activation must be none or silu, got tanh");
  require_error([&] { mlgru_step(f, f, state); }, "mlgru_step: f must have 2 dimensions, got 3");
  require_error([&] { mlgru_step(state, f, state); }, "mlgru_step: c must have 2 dimensions, got 3");
}

TEST_CASE("mlgru refuses double backward in words", "[mlgru]") {
  const Tensors inputs = with_gradients(inputs_of(kOptions[3], {2, 5, 3}));
  const at::Tensor g =
      torch::autograd::grad({run(inputs, kOptions[3]).square().sum()}, {inputs[0]}, {}, true, true)[0];
  require_error([&] { g.sum().backward(); }, "derivative for flashlm::_mlgru_backward is not implemented");
}
