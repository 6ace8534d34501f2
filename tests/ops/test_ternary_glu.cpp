// SPDX-License-Identifier: Apache-2.0
// ternary_glu against the operators that it is made of, which have tests of their own.
#include "ops/bit_linear.h"
#include "ops/glu.h"
#include "ops/rms_norm.h"
#include "ops/ternary_glu.h"
#include "tests/ops/check.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

/// What is normed: a sum of these.
constexpr int kNorm = 1, kUpNorm = 2, kDownNorm = 4;

struct Mode {
  std::string quantizer, activation, gradient, nonlinearity;
  int norms;
};

std::ostream& operator<<(std::ostream& out, const Mode& mode) {
  return out << mode.quantizer << ", " << mode.activation << ", gradient " << mode.gradient << ", "
             << mode.nonlinearity << ", norms " << mode.norms;
}

std::vector<Mode> modes(const std::string& gradient) {
  const std::pair<const char*, int> units[] = {{"relu2", kNorm},
                                               {"silu", kNorm | kUpNorm | kDownNorm},
                                               {"sigmoid", 0},
                                               {"relu2", kUpNorm},
                                               {"silu", kNorm | kDownNorm}};
  std::vector<Mode> out;
  for (const char* quantizer : {"absmean", "threshold"}) {
    for (const char* activation : {"int8", "none"}) {
      if (gradient == "int8" && activation == std::string("none")) continue;
      for (const auto& [nonlinearity, norms] : units) {
        out.push_back({quantizer, activation, gradient, nonlinearity, norms});
      }
    }
  }
  return out;
}

/// x, gate_weight, up_weight, down_weight and the scales of the mode's norms.
Tensors inputs_for(const Mode& mode, int64_t rows, int64_t width, int64_t inner, at::ScalarType dtype) {
  Tensors out = {randn({rows, width}, dtype), randn({inner, width}, dtype, 1) * 0.2,
                 randn({inner, width}, dtype, 2) * 0.2, randn({width, inner}, dtype, 3) * 0.2};
  if (mode.norms & kNorm) out.push_back(randn({width}, dtype, 4));
  if (mode.norms & kUpNorm) out.push_back(randn({width}, dtype, 5));
  if (mode.norms & kDownNorm) out.push_back(randn({inner}, dtype, 6));
  return out;
}

struct NormScales {
  NormScales(const Mode& mode, const Tensors& t) {
    size_t i = 4;
    if (mode.norms & kNorm) gate = up = t[i++];
    if (mode.norms & kUpNorm) own_up = up = t[i++];
    if (mode.norms & kDownNorm) down = t[i++];
  }

  std::optional<at::Tensor> gate, up, own_up, down;
};

constexpr double kEps = 1e-5;

at::Tensor run(const Mode& mode, const Tensors& t) {
  const NormScales scales(mode, t);
  return ternary_glu(t[0], t[1], t[2], t[3], scales.gate, scales.own_up, scales.down, mode.nonlinearity,
                     mode.quantizer, mode.activation, kEps, mode.gradient);
}

at::Tensor run_parts(const Mode& mode, const Tensors& t) {
  const NormScales scales(mode, t);
  const auto linear = [&](const at::Tensor& x, const at::Tensor& weight,
                          const std::optional<at::Tensor>& norm_scale) {
    return bit_linear(x, weight, norm_scale, mode.quantizer, mode.activation, kEps, mode.gradient);
  };
  const auto glu = mode.nonlinearity == "relu2"  ? relu2_glu
                   : mode.nonlinearity == "silu" ? silu_glu
                                                 : sigmoid_glu;
  return t[0] +
         linear(glu(linear(t[0], t[1], scales.gate), linear(t[0], t[2], scales.up)), t[3], scales.down);
}

// Rows around a block of 48 and around the 1,536 that a backward pass holds.
constexpr int64_t kRows[] = {1, 2, 47, 48, 49, 97, 1535, 1537, 3100};

}  // namespace

TEST_CASE("ternary_glu has the bits of its parts", "[ternary_glu]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble);
  for (const Mode& mode : modes("float32")) {
    for (const int64_t rows : kRows) {
      INFO(mode << " rows " << rows << " " << dtype);
      const Tensors inputs = inputs_for(mode, rows, 19, 37, dtype);
      const at::Tensor want = run_parts(mode, inputs);
      require_equal(run(mode, inputs), want);
      Tensors sliced;
      for (const at::Tensor& t : inputs) sliced.push_back(strided(t));
      require_equal(run(mode, sliced), want);
      Tensors batched = inputs;
      batched[0] = inputs[0].view({1, rows, 19});
      require_equal(run(mode, batched), want.view({1, rows, 19}));
    }
  }
}

TEST_CASE("ternary_glu's gradients are those of its parts", "[ternary_glu]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble);
  for (const Mode& mode : modes("float32")) {
    for (const int64_t rows : kRows) {
      INFO(mode << " rows " << rows << " " << dtype);
      Tensors inputs = inputs_for(mode, rows, 19, 37, dtype);
      for (at::Tensor& t : inputs) t.requires_grad_();
      const Tensors got = gradients([&](const Tensors& t) { return run(mode, t); }, inputs);
      const Tensors want = gradients([&](const Tensors& t) { return run_parts(mode, t); }, inputs);
      const double eps = dtype == at::kDouble ? 1e-14 : 5e-6;
      // x's gradient is one sum of three here, and of pairs there; a norm's is summed by other blocks.
      for (size_t i = 0; i < inputs.size(); ++i) require_close(got[i], want[i], eps);
    }
  }
}

TEST_CASE("ternary_glu's rounded gradients are near those of float32", "[ternary_glu]") {
  const std::string gradient = GENERATE("bfloat16", "int8");
  for (const Mode& mode : modes(gradient)) {
    for (const int64_t rows : {1, 49, 1537}) {
      INFO(mode << " rows " << rows);
      Tensors inputs = inputs_for(mode, rows, 34, 75, at::kFloat);
      require_equal(run(mode, inputs), run_parts(mode, inputs));
      for (at::Tensor& t : inputs) t.requires_grad_();
      Mode exact = mode;
      exact.gradient = "float32";
      const Tensors got = gradients([&](const Tensors& t) { return run(mode, t); }, inputs);
      const Tensors want = gradients([&](const Tensors& t) { return run_parts(exact, t); }, inputs);
      for (size_t i = 0; i < inputs.size(); ++i) {
        INFO("of input " << i);
        require_close_in_norm(got[i], want[i], gradient == "int8" ? 6e-2 : 2e-2);
      }
    }
  }
}

TEST_CASE("ternary_glu in bfloat16 is computed in float32 from x to y", "[ternary_glu]") {
  for (const Mode& mode : modes("bfloat16")) {
    INFO(mode);
    Tensors inputs = inputs_for(mode, 50, 19, 37, at::kBFloat16), wide;
    for (const at::Tensor& t : inputs) wide.push_back(t.to(at::kFloat));
    require_equal(run(mode, inputs), run(mode, wide).to(at::kBFloat16));
    for (at::Tensor& t : inputs) t.requires_grad_();
    for (at::Tensor& t : wide) t.requires_grad_();
    const auto of = [&](const Tensors& t) { return run(mode, t); };
    const Tensors got = gradients(of, inputs), want = gradients(of, wide);
    for (size_t i = 0; i < got.size(); ++i) require_close_in_norm(got[i].to(at::kFloat), want[i], 2e-2);
  }
}

TEST_CASE("ternary_glu is the same for any number of threads", "[ternary_glu]") {
  for (const char* gradient : {"float32", "bfloat16", "int8"}) {
    for (const Mode& mode : modes(gradient)) {
      INFO(mode);
      Tensors inputs = inputs_for(mode, 3100, 19, 37, at::kFloat);
      for (at::Tensor& t : inputs) t.requires_grad_();
      require_same_for_any_threads([&] {
        Tensors out = gradients([&](const Tensors& t) { return run(mode, t); }, inputs);
        out.push_back(run(mode, inputs).detach());
        return out;
      });
    }
  }
}

TEST_CASE("ternary_glu of no rows is nothing, with zero gradients", "[ternary_glu]") {
  for (const char* gradient : {"float32", "bfloat16"}) {
    const Mode mode = {"absmean", "int8", gradient, "silu", kNorm | kUpNorm | kDownNorm};
    Tensors inputs = inputs_for(mode, 0, 19, 37, at::kFloat);
    for (at::Tensor& t : inputs) t.requires_grad_();
    REQUIRE(run(mode, inputs).sizes() == inputs[0].sizes());
    const Tensors got = gradients([&](const Tensors& t) { return run(mode, t); }, inputs);
    for (size_t i = 0; i < got.size(); ++i) require_equal(got[i], torch::zeros_like(inputs[i]));
  }
}

TEST_CASE("ternary_glu keeps gate and up for a gradient, rounded where gradients are", "[ternary_glu]") {
  const auto forward = c10::Dispatcher::singleton().findSchemaOrThrow("flashlm::_ternary_glu_forward", "");
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    for (const std::string gradient : {"float32", "bfloat16", "int8"}) {
      const Tensors inputs = inputs_for({"absmean", "int8", gradient, "relu2", kNorm}, 5, 19, 37, dtype);
      const auto exact = dtype == at::kDouble ? at::kDouble : at::kFloat;
      const auto want = gradient == "float32" || dtype == at::kDouble ? exact : at::kBFloat16;
      for (const bool with_gates : {false, true}) {
        torch::jit::Stack stack = {
            inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], torch::IValue(), torch::IValue(),
            "relu2",   "absmean", "int8",    kEps,      gradient,  with_gates};
        forward.callBoxed(stack);
        for (size_t i : {1, 2}) {
          REQUIRE(stack[i].toTensor().sizes() == at::IntArrayRef{with_gates ? 5 : 0, 37});
          REQUIRE(stack[i].toTensor().scalar_type() == want);
        }
      }
    }
  }
}

TEST_CASE("ternary_glu shows what is not finite", "[ternary_glu]") {
  const double bad = GENERATE(std::numeric_limits<double>::infinity(), std::nan(""));
  for (const Mode& mode : modes("bfloat16")) {
    INFO(mode << " " << bad);
    Tensors inputs = inputs_for(mode, 50, 19, 37, at::kFloat);
    inputs[0][49][3] = bad;
    const at::Tensor y = run(mode, inputs), parts = run_parts(mode, inputs);
    REQUIRE(at::equal(y.isnan(), parts.isnan()));
    REQUIRE(y[49].isnan().any().item<bool>());
    REQUIRE(y.slice(0, 0, 49).isfinite().all().item<bool>());
    inputs[0][49][3] = 1;
    inputs[3][2][5] = bad;
    for (at::Tensor& t : inputs) t.requires_grad_();
    REQUIRE(run(mode, inputs).isnan().all().item<bool>());
    const Tensors got = gradients([&](const Tensors& t) { return run(mode, t); }, inputs);
    REQUIRE(got[1].isnan().any().item<bool>());
  }
}
