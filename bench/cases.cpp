// SPDX-License-Identifier: Apache-2.0
#include "bench/cases.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string_view>
#include <tuple>

#include "ops/kernels/kernels.h"
#include "ops/ops.h"
#include "train/adamw.h"
#include "train/normuon.h"

namespace flashlm::bench {
namespace {

using Tensors = std::vector<at::Tensor>;

constexpr double kEps = 1e-6;

enum class Pass { kForward, kForwardBackward };

const char* pass_name(Pass pass) { return pass == Pass::kForward ? "forward" : "forward + backward"; }

/// "8x256", and so on.
template <class... Sizes>
std::string by(int64_t first, Sizes... rest) {
  std::ostringstream text;
  text << first;
  ((text << "x" << rest), ...);
  return text.str();
}

// ---- the same expression, by FlashLM and by torch ----

using Expression = std::function<at::Tensor(const Tensors&)>;

Tensors map(const Tensors& tensors, const std::function<at::Tensor(const at::Tensor&)>& f) {
  Tensors mapped;
  for (const at::Tensor& t : tensors) mapped.push_back(f(t));
  return mapped;
}

at::Tensor to_bfloat16(const at::Tensor& t) { return t.to(at::kBFloat16); }

/// body(inputs) alone, or with the gradients of all inputs for grad_y, as a user would write either. Returns
/// the output, or the first input's gradient.
Contestant evaluate(const Contest& contest, const std::string& name, const Tensors& inputs,
                    const at::Tensor& grad_y, const Expression& body) {
  if (!contest.backward) return {name, [=] { return body(inputs); }};
  const Tensors leaves = map(inputs, [](const at::Tensor& t) { return t.detach().clone().requires_grad_(); });
  return {name, [=] { return torch::autograd::grad({body(leaves)}, leaves, {grad_y})[0]; }};
}

/// FlashLM in float32 against torch in float32 and in bfloat16.
void add_expressions(Contest& contest, const Tensors& inputs, const Expression& flashlm,
                     const Expression& torch) {
  const at::Tensor grad_y = at::randn_like(flashlm(inputs));
  contest.contestants.push_back(evaluate(contest, "FlashLM", inputs, grad_y, flashlm));
  contest.contestants.push_back(evaluate(contest, "torch float32", inputs, grad_y, torch));
  contest.contestants.push_back(
      evaluate(contest, "torch bfloat16", map(inputs, to_bfloat16), to_bfloat16(grad_y), torch));
}

/// The ceiling of products with many rows, by the type of their factors: tiles where the CPU has them.
const char* tiles_of(const std::string& precision) {
  if (precision == "int8") return "int8 tiles";
  return precision == "bfloat16" ? "bfloat16 tiles" : "float32";
}

Contest products(double macs, Pass pass, const char* peak) {
  Contest contest;
  contest.work = macs;
  contest.unit = "GMAC/s";
  contest.peak = peak;
  contest.backward = pass == Pass::kForwardBackward;
  return contest;
}

/// `moved`: float32 values that must be read or written at least; `live`: values that are there at once.
Contest passes_over_memory(double moved, double live, Pass pass) {
  Contest contest;
  contest.work = moved * sizeof(float);
  contest.unit = "GB/s";
  contest.peak = "read";
  contest.bytes = live * sizeof(float);
  contest.backward = pass == Pass::kForwardBackward;
  return contest;
}

// ---- bit_linear ----

/// The matrix that bit_linear multiplies by; see ops/bit_linear.h.
at::Tensor effective_weight(const at::Tensor& weight, std::string_view quantizer) {
  const at::Tensor mean = weight.abs().mean();
  if (quantizer == "threshold") return weight.sign() * (weight.abs() > mean);
  return mean * (weight / mean).round().clamp(-1, 1);
}

/// x weightᵀ by oneDNN in float32, with the weight in the layout that it likes best: what torch.compile's
/// freezing would run. torch's own linear goes through MKL.
Contestant onednn_linear(const at::Tensor& x, const at::Tensor& weight) {
  const auto find = [](const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); };
  torch::jit::Stack reorder = {weight, x.size(0)};
  find("mkldnn::_reorder_linear_weight").callBoxed(reorder);
  const at::Tensor packed = reorder[0].toTensor();
  using Linear =
      at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, c10::string_view,
                 c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
  const auto linear = find("mkldnn::_linear_pointwise").typed<Linear>();
  return {"oneDNN float32", [=] {
            return linear.call(x, packed, std::nullopt, "none", c10::List<std::optional<at::Scalar>>(), "");
          }};
}

/// The integer product that int8 x int8 models run on; without quantizing x and without scaling.
Contestant int_mm(const at::Tensor& x, const at::Tensor& weight) {
  const at::Tensor q = at::randint(-127, 128, x.sizes(), at::kChar);
  const at::Tensor codes = weight.sign().to(at::kChar).t();
  at::_int_mm(q, codes);  // throws here, not in the race, where torch has none
  return {"torch _int_mm", [=] {
            at::_int_mm(q, codes);
            return at::Tensor();
          }};
}

/// `gradient` of the backward's products, if there is a backward.
Case bit_linear_case(int64_t m, int64_t k, int64_t n, const std::string& activation,
                     const std::string& quantizer, Pass pass, const std::string& gradient = "float32") {
  const auto make = [=] {
    const bool forward = pass == Pass::kForward;
    const double macs = static_cast<double>(m * k * n) * (forward ? 1 : 3);
    Contest contest = products(macs, pass, tiles_of(forward ? activation : gradient));
    const at::Tensor x = at::randn({m, k}), weight = at::randn({n, k}),
                     dense = effective_weight(weight, quantizer);
    const at::Tensor grad_y = at::randn({m, n});
    const Expression linear = [](const Tensors& t) { return at::linear(t[0], t[1]); };
    const Expression ours = [=](const Tensors& t) {
      return bit_linear(t[0], t[1], std::nullopt, quantizer, activation, /*eps=*/1e-6, gradient);
    };
    const Expression after_a_step = [=](const Tensors& t) {
      t[1].unsafeGetTensorImpl()->bump_version();
      return ours(t);
    };
    contest.contestants = {evaluate(contest, "FlashLM", {x, weight}, grad_y, ours),
                           evaluate(contest, "torch float32", {x, dense}, grad_y, linear),
                           evaluate(contest, "torch bfloat16", {to_bfloat16(x), to_bfloat16(dense)},
                                    to_bfloat16(grad_y), linear)};
    contest.notes = {
        "FlashLM checks in every call that the float32 weights are those it has packed; its peers get dense "
        "ones."};
    if (!forward) return contest;
    contest.contestants.push_back(
        evaluate(contest, "itself after a step", {x, weight}, grad_y, after_a_step));
    contest.notes.push_back("\"After a step\" the weights have changed, and are packed again.");
    contest.contestants.push_back(onednn_linear(x, dense));
    if (activation == "int8") {
      contest.contestants.push_back(int_mm(x, dense));
      contest.notes.push_back(
          "torch _int_mm gets int8 inputs and does not scale its result; FlashLM does both.");
    }
    return contest;
  };
  const std::string in = pass == Pass::kForward || activation == "none" ? "" : " in " + gradient;
  return {"bit_linear " + activation + ", " + pass_name(pass) + in, quantizer + " " + by(m, k, n), make};
}

// ---- packed weights ----

void add_ggml(Contest& contest, const Ggml* ggml, int64_t k,
              const std::function<Contestant(const std::string& format)>& contestant) {
  if (ggml == nullptr) {
    contest.notes.push_back("ggml is left out: --ggml DIR says where a build of it is.");
    return;
  }
  for (const std::string& format : Ggml::formats()) {
    contest.contestants.push_back(contestant(format));
    const int64_t padded = ggml->padded(format, k);
    if (padded != k) {
      contest.notes.push_back("K = " + std::to_string(k) + " is padded to " + std::to_string(padded) +
                              " for ggml " + format + "; the rate counts " + std::to_string(k) + ".");
    }
  }
}

Case packed_linear_case(const Ggml* ggml, int threads, int64_t m, int64_t k, int64_t n) {
  const auto make = [=] {
    Contest contest = products(static_cast<double>(m * k * n), Pass::kForward, "int8");
    const at::Tensor x = at::randn({m, k}), weight = at::randn({n, k}),
                     dense = effective_weight(weight, "absmean");
    const auto [packed, scale] = pack_ternary(weight);
    contest.contestants = {
        {"FlashLM", [=, packed = packed, scale = scale] { return packed_linear(x, packed, scale, n); }},
        {"torch float32", [=] { return at::linear(x, dense); }},
        {"torch bfloat16",
         [x = to_bfloat16(x), dense = to_bfloat16(dense)] { return at::linear(x, dense); }}};
    add_ggml(contest, ggml, k,
             [&](const std::string& format) { return ggml->product(format, x, dense, threads); });
    return contest;
  };
  return {"packed_linear int8, forward", by(m, k, n), make};
}

/// A pair of kernels on weights that are packed already.
struct TernaryKernels {
  const char* name;
  decltype(kernels::Table<float>::ternary_pack) pack;
  decltype(kernels::Table<float>::ternary_gemm) gemm;
};

TernaryKernels byte_kernels() {
  const kernels::Table<float>& table = kernels::table<float>();
  return {"ternary_gemm", table.ternary_pack, table.ternary_gemm};
}

TernaryKernels two_bit_kernels() {
  const kernels::Table<float>& table = kernels::table<float>();
  return {"packed_gemm", table.packed_pack, table.packed_gemm};
}

/// Kernels alone, quantizing x included: no operator's overhead, no threads.
Case kernel_case(const Ggml* ggml, const TernaryKernels& ternary, int64_t m, int64_t k, int64_t n) {
  const auto make = [=] {
    // Of outputs: 2-bit weights have panels of 64 on every level.
    const int64_t largest_panel = std::max<int64_t>(64, kernels::table<float>().ternary_panel);
    const auto round_up = [](int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; };
    Contest contest = products(static_cast<double>(m * k * n), Pass::kForward, "int8");
    const at::Tensor x = at::randn({m, k}), dense = effective_weight(at::randn({n, k}), "absmean");
    const float gamma = dense.abs().max().item<float>();
    const at::Tensor codes = dense.sign().to(at::kChar);
    const at::Tensor packed = at::empty({round_up(n, largest_panel) * round_up(k, 4)}, at::kByte);
    ternary.pack(n, k, codes.const_data_ptr<int8_t>(), packed.mutable_data_ptr<uint8_t>());
    const at::Tensor q = at::empty({m, kernels::quantized_width(k)}, at::kChar),
                     inverse_scale = at::empty({m});
    const at::Tensor row_sum = at::empty({m}, at::kInt), y = at::empty({m, n});
    // Taken once: getting at a tensor's memory is no part of a kernel, and not nothing beside a microsecond.
    const kernels::Table<float>& table = kernels::table<float>();
    contest.contestants = {
        {"FlashLM",
         [=, &table, gemm = ternary.gemm, x_data = x.const_data_ptr<float>(),
          q_data = q.mutable_data_ptr<int8_t>(), scales = inverse_scale.mutable_data_ptr<float>(),
          sums = row_sum.mutable_data_ptr<int32_t>(), w = packed.const_data_ptr<uint8_t>(),
          y_data = y.mutable_data_ptr<float>(), tensors = std::vector{x, q, inverse_scale, row_sum, packed}] {
           table.quantize_rows(m, k, x_data, /*smallest=*/1e-5f, q_data, scales, sums);
           gemm(m, n, k, q_data, sums, scales, w, gamma, y_data, n);
           return y;
         }}};
    contest.notes = {"ggml: from_float and, for each output, vec_dot."};
    add_ggml(contest, ggml, k, [&](const std::string& format) { return ggml->kernel(format, x, dense); });
    return contest;
  };
  return {std::string(ternary.name) + " kernel with quantize_rows", by(m, k, n), make,
          /*single_thread=*/true};
}

// ---- mixers ----

constexpr int64_t kTaps = 4;

/// Channels-last rows through torch's Conv1d, padded on the left.
at::Tensor eager_causal_conv1d(const at::Tensor& x, const at::Tensor& weight, int64_t dilation,
                               int64_t groups) {
  const at::Tensor rows = at::constant_pad_nd(x.transpose(1, 2), {(weight.size(2) - 1) * dilation, 0});
  return at::conv1d(rows, weight, {}, 1, at::IntArrayRef{0}, dilation, groups).transpose(1, 2);
}

at::Tensor eager_gated_conv(const Tensors& t, int64_t dilation, int64_t groups) {
  const at::Tensor h = at::rms_norm(t[0], {t[0].size(2)}, t[1], kEps);
  return t[0] + eager_causal_conv1d(h, t[2], dilation, groups).sigmoid() *
                    eager_causal_conv1d(h, t[3], dilation, groups);
}

at::Tensor conv_weight(int64_t width, int64_t groups) {
  return at::randn({width, width / groups, kTaps}) * 0.2;
}

double conv_macs(int64_t batch, int64_t time, int64_t width, int64_t groups, Pass pass) {
  return static_cast<double>(batch * time * width * (width / groups) * kTaps) *
         (pass == Pass::kForward ? 1 : 3);
}

Case causal_conv1d_case(int64_t batch, int64_t time, int64_t width, int64_t groups, int64_t dilation,
                        Pass pass) {
  const auto make = [=] {
    Contest contest = products(conv_macs(batch, time, width, groups, pass), pass, "float32");
    add_expressions(
        contest, {at::randn({batch, time, width}), conv_weight(width, groups)},
        [=](const Tensors& t) { return causal_conv1d(t[0], t[1], std::nullopt, dilation, groups); },
        [=](const Tensors& t) { return eager_causal_conv1d(t[0], t[1], dilation, groups); });
    return contest;
  };
  return {std::string("causal_conv1d, ") + pass_name(pass),
          by(batch, time, width) + " dilation " + std::to_string(dilation), make};
}

Case gated_conv_case(int64_t batch, int64_t time, int64_t width, int64_t groups, int64_t dilation, Pass pass,
                     const char* gradient, const char* precision) {
  const auto make = [=] {
    // Where the passes differ, the backward pass has two thirds of the products.
    Contest contest = products(2 * conv_macs(batch, time, width, groups, pass), pass,
                               tiles_of(pass == Pass::kForward ? precision : gradient));
    add_expressions(
        contest,
        {at::randn({batch, time, width}), at::ones({width}), conv_weight(width, groups),
         conv_weight(width, groups)},
        [=](const Tensors& t) {
          return gated_conv(t[0], t[1], t[2], t[3], std::nullopt, dilation, groups, kEps, gradient,
                            precision);
        },
        [=](const Tensors& t) { return eager_gated_conv(t, dilation, groups); });
    return contest;
  };
  const std::string in = precision;
  const std::string mixed = in == gradient ? "" : std::string(", gradients in ") + gradient;
  return {std::string("gated_conv, ") + pass_name(pass) + " in " + in + mixed,
          by(batch, time, width) + " dilation " + std::to_string(dilation), make};
}

/// h_t = f_t h_{t-1} + x_t over dimension `dim`, one call of torch for each step, on slices taken all at
/// once: indexing f in the loop would make autograd fill a tensor of f's size for every step.
Tensors eager_recurrence(const at::Tensor& f, const at::Tensor& x, int64_t dim) {
  const Tensors gates = f.unbind(dim), inputs = x.unbind(dim);
  Tensors states = {inputs[0]};
  for (size_t t = 1; t < gates.size(); ++t) states.push_back(at::addcmul(inputs[t], gates[t], states.back()));
  return states;
}

/// The same in two levels: all chunks of time at once, then from chunk to chunk. Without divisions or
/// logarithms of products of gates, which leave the range of floats. The fastest of the exact scans that were
/// tried in eager torch: Hillis and Steele's and Blelloch's take longer.
at::Tensor eager_scan(const at::Tensor& f, const at::Tensor& x) {
  constexpr int64_t kSteps = 64;
  const int64_t batch = f.size(0), chunks = f.size(1) / kSteps, width = f.size(2);
  const at::Tensor gates = f.view({batch, chunks, kSteps, width});
  const Tensors states = eager_recurrence(gates, x.view(gates.sizes()), 2);
  Tensors products = gates.unbind(2);
  for (size_t t = 1; t < products.size(); ++t) products[t] = products[t] * products[t - 1];
  Tensors ends = eager_recurrence(products.back(), states.back(), 1);
  ends.pop_back();
  ends.insert(ends.begin(), at::zeros_like(ends[0]));  // what enters the first chunk
  return at::addcmul(at::stack(states, 2), at::stack(products, 2), at::stack(ends, 1).unsqueeze(2))
      .view(f.sizes());
}

Case mlgru_case(int64_t batch, int64_t time, int64_t width, const std::string& activation, Pass pass) {
  const auto make = [=] {
    // Forward: f and c in, h out; backward: f, c, h and its gradient in, two gradients out.
    const double n = static_cast<double>(batch * time * width);
    const bool forward = pass == Pass::kForward, silu = activation == "silu";
    Contest contest = passes_over_memory(n * (forward ? 3 : 9), n * (forward ? 3 : 6), pass);
    const at::Tensor f = at::randn({batch, time, width});
    const Tensors inputs = {silu ? f : f.sigmoid(), at::randn_like(f)};
    const at::Tensor grad_h = at::randn_like(f);
    const auto add = [&](const char* name, const std::function<at::Tensor(at::Tensor, at::Tensor)>& body) {
      contest.contestants.push_back(evaluate(contest, name, inputs, grad_h, [=](const Tensors& t) {
        const at::Tensor gate = silu ? t[0].sigmoid() : t[0];
        return body(gate, (1 - gate) * (silu ? at::silu(t[1]) : t[1]));
      }));
    };
    contest.contestants = {evaluate(contest, "FlashLM", inputs, grad_h, [=](const Tensors& t) {
      return std::get<0>(mlgru(t[0], t[1], std::nullopt, std::nullopt, activation));
    })};
    add("torch loop",
        [](const auto& gate, const auto& x) { return at::stack(eager_recurrence(gate, x, 1), 1); });
    add("torch scan", eager_scan);
    return contest;
  };
  return {"mlgru " + activation + ", " + pass_name(pass), by(batch, time, width), make};
}

// ---- elementwise ----

Case rms_norm_case(int64_t rows, int64_t width, Pass pass) {
  const auto make = [=] {
    // Forward: x in, y out; backward: grad_y and x in, grad_x out.
    const double n = static_cast<double>(rows * width);
    const bool forward = pass == Pass::kForward;
    Contest contest = passes_over_memory(n * (forward ? 2 : 5), n * (forward ? 2 : 4), pass);
    add_expressions(
        contest, {at::randn({rows, width}), at::ones({width})},
        [](const Tensors& t) { return rms_norm(t[0], t[1], kEps); },
        [=](const Tensors& t) { return at::rms_norm(t[0], {width}, t[1], kEps); });
    return contest;
  };
  return {std::string("rms_norm, ") + pass_name(pass), by(rows, width), make};
}

using Glu = at::Tensor (*)(const at::Tensor& gate, const at::Tensor& up);

Case glu_case(const std::string& name, Glu ours, Glu eager, int64_t rows, int64_t width, Pass pass) {
  const auto make = [=] {
    // Forward: gate and up in, y out; backward: grad_y, gate and up in, two gradients out.
    const double n = static_cast<double>(rows * width);
    const bool forward = pass == Pass::kForward;
    Contest contest = passes_over_memory(n * (forward ? 3 : 8), n * (forward ? 3 : 6), pass);
    add_expressions(
        contest, {at::randn({rows, width}), at::randn({rows, width})},
        [=](const Tensors& t) { return ours(t[0], t[1]); },
        [=](const Tensors& t) { return eager(t[0], t[1]); });
    return contest;
  };
  return {name + ", " + pass_name(pass), by(rows, width), make};
}

at::Tensor eager_relu2_glu(const at::Tensor& gate, const at::Tensor& up) { return gate.relu().square() * up; }
at::Tensor eager_silu_glu(const at::Tensor& gate, const at::Tensor& up) { return at::silu(gate) * up; }
at::Tensor eager_sigmoid_glu(const at::Tensor& gate, const at::Tensor& up) { return gate.sigmoid() * up; }

/// Of the dense weights that take part in the products.
at::Tensor eager_ternary_glu(const Tensors& t) {
  const at::Tensor n = at::rms_norm(t[0], {t[0].size(-1)}, t[4], kEps);
  return t[0] + at::linear(eager_relu2_glu(at::linear(n, t[1]), at::linear(n, t[2])), t[3]);
}

Case ternary_glu_case(int64_t rows, int64_t width, int64_t inner, const std::string& activation,
                      const std::string& gradient, Pass pass) {
  const auto make = [=] {
    const bool forward = pass == Pass::kForward;
    Contest contest = products(3.0 * static_cast<double>(rows * width * inner) * (forward ? 1 : 3), pass,
                               tiles_of(forward ? activation : gradient));
    const std::string quantizer = "absmean";
    const Tensors floats = {at::randn({rows, width}), at::randn({inner, width}) / 16,
                            at::randn({inner, width}) / 16, at::randn({width, inner}) / 16,
                            at::ones({width})};
    Tensors dense = floats, rounded;
    for (size_t i : {1, 2, 3}) dense[i] = effective_weight(floats[i], quantizer);
    for (const at::Tensor& t : dense) rounded.push_back(to_bfloat16(t));
    const at::Tensor grad_y = at::randn({rows, width});
    const auto linear = [=](const at::Tensor& x, const at::Tensor& weight) {
      return bit_linear(x, weight, std::nullopt, quantizer, activation, kEps, gradient);
    };
    contest.contestants = {
        evaluate(contest, "FlashLM", floats, grad_y,
                 [=](const Tensors& t) {
                   return ternary_glu(t[0], t[1], t[2], t[3], t[4], {}, {}, "relu2", quantizer, activation,
                                      kEps, gradient);
                 }),
        evaluate(contest, "torch float32", dense, grad_y, eager_ternary_glu),
        evaluate(contest, "torch bfloat16", rounded, to_bfloat16(grad_y), eager_ternary_glu),
        evaluate(contest, "its parts", floats, grad_y, [=](const Tensors& t) {
          const at::Tensor n = rms_norm(t[0], t[4], kEps);
          return t[0] + linear(relu2_glu(linear(n, t[1]), linear(n, t[2])), t[3]);
        })};
    contest.notes = {"\"Its parts\" are FlashLM's rms_norm, bit_linear and relu2_glu, one after the other."};
    return contest;
  };
  const std::string gradients = pass == Pass::kForward ? "" : ", gradients in " + gradient;
  return {std::string("ternary_glu, ") + pass_name(pass) + " in " + activation + gradients,
          by(rows, width, inner), make};
}

// ---- head ----

Case linear_cross_entropy_case(int64_t positions, int64_t width, int64_t vocabulary, const char* precision) {
  const auto make = [=] {
    // Three products: logits, and the gradients of h and of weight. What FlashLM computes twice counts once.
    Contest contest = products(3.0 * static_cast<double>(positions * width * vocabulary),
                               Pass::kForwardBackward, tiles_of(precision));
    const at::Tensor target = at::randint(vocabulary, {positions}, at::kLong);
    add_expressions(
        contest, {at::randn({positions, width}), at::randn({vocabulary, width}) * 0.02},
        [=](const Tensors& t) {
          return std::get<0>(linear_cross_entropy(t[0], t[1], std::nullopt, target, /*label_smoothing=*/0,
                                                  /*z_loss=*/0, /*ignore_index=*/-100, "mean", precision));
        },
        [=](const Tensors& t) { return at::cross_entropy_loss(at::linear(t[0], t[1]), target); });
    return contest;
  };
  return {std::string("linear_cross_entropy, ") + pass_name(Pass::kForwardBackward) + " in " + precision,
          by(positions, width, vocabulary), make};
}

/// Classes as they come from binning words by frequency: of about equal sums of 1 / (rank + 3), at most
/// `largest` words each.
struct Classes {
  Classes(int64_t vocabulary, int64_t count, int64_t largest) : words(at::arange(vocabulary)) {
    const at::Tensor p = 1 / (at::arange(vocabulary, at::kDouble) + 3);
    frequency = p / p.sum();
    const at::Tensor mass = frequency.cumsum(0);
    std::vector<int64_t> ends = {0};
    while (ends.back() < vocabulary) {
      const auto bound = static_cast<double>(ends.size()) / static_cast<double>(count);
      const int64_t next = (mass < bound).sum().item<int64_t>();
      ends.push_back(std::clamp(next, ends.back() + 1, std::min(vocabulary, ends.back() + largest)));
    }
    offsets = at::tensor(ends);
  }
  at::Tensor words, offsets, frequency;
};

/// Two softmaxes as one would write them: the words of each class that is met, by torch.
at::Tensor eager_hierarchical(const Tensors& t, const Classes& classes, const at::Tensor& target) {
  const at::Tensor of_class = at::bucketize(target, classes.offsets, /*out_int32=*/false, /*right=*/true) - 1;
  at::Tensor loss = at::cross_entropy_loss(at::linear(t[0], t[1]), of_class, {}, at::Reduction::Sum);
  const int64_t* offsets = classes.offsets.const_data_ptr<int64_t>();
  for (int64_t c = 0; c < t[1].size(0); ++c) {
    const at::Tensor met = (of_class == c).nonzero().squeeze(1);
    if (met.numel() == 0) continue;
    const at::Tensor weight = t[2].slice(0, offsets[c], offsets[c + 1]);
    loss = loss + at::cross_entropy_loss(at::linear(t[0].index_select(0, met), weight),
                                         target.index_select(0, met) - offsets[c], {}, at::Reduction::Sum);
  }
  return loss / target.numel();
}

Case hierarchical_cross_entropy_case(int64_t positions, int64_t width, int64_t vocabulary,
                                     const char* precision) {
  const auto make = [=] {
    const Classes classes(vocabulary, 224, 2000);
    const at::Tensor target = classes.frequency.multinomial(positions, /*replacement=*/true);
    const int64_t count = classes.offsets.numel() - 1;
    // Three products of each position by the classes and by the words of its target's class.
    const at::Tensor sizes = classes.offsets.diff();
    const at::Tensor of_class = at::bucketize(target, classes.offsets, false, true) - 1;
    const double rows =
        sizes.index_select(0, of_class).sum().item<double>() + static_cast<double>(positions * count);
    Contest contest =
        products(3 * rows * static_cast<double>(width), Pass::kForwardBackward, tiles_of(precision));
    add_expressions(
        contest,
        {at::randn({positions, width}), at::randn({count, width}) * 0.02,
         at::randn({vocabulary, width}) * 0.02},
        [=](const Tensors& t) {
          return std::get<0>(hierarchical_cross_entropy(t[0], t[1], std::nullopt, t[2], std::nullopt,
                                                        classes.words, classes.offsets, target,
                                                        /*label_smoothing=*/0, /*z_loss=*/0,
                                                        /*ignore_index=*/-100, "mean", precision));
        },
        [=](const Tensors& t) { return eager_hierarchical(t, classes, target); });
    return contest;
  };
  return {
      std::string("hierarchical_cross_entropy, ") + pass_name(Pass::kForwardBackward) + " in " + precision,
      by(positions, width, vocabulary), make};
}

Case adaptive_cross_entropy_case(int64_t positions, int64_t width, const std::vector<int64_t>& cutoffs,
                                 int64_t vocabulary) {
  const auto make = [=] {
    const at::Tensor target = Classes(vocabulary, 1, vocabulary).frequency.multinomial(positions, true);
    const auto tails = static_cast<int64_t>(cutoffs.size());
    Tensors inputs = {at::randn({positions, width}), at::randn({cutoffs[0] + tails, width}) * 0.02};
    double macs = static_cast<double>(positions * inputs[1].numel());
    for (int64_t i = 0, narrow = width / 4; i < tails; ++i, narrow /= 4) {
      const int64_t end = i + 1 < tails ? cutoffs[i + 1] : vocabulary;
      inputs.push_back(at::randn({narrow, width}) * 0.06);
      inputs.push_back(at::randn({end - cutoffs[i], narrow}) * 0.1);
      const double inside = target.ge(cutoffs[i]).logical_and(target.lt(end)).sum().item<double>();
      macs += inside * static_cast<double>(inputs[2 * i + 2].numel() + inputs[2 * i + 3].numel());
    }
    Contest contest = products(3 * macs, Pass::kForwardBackward, "float32");
    const auto ours = [=](const Tensors& t) {
      Tensors projections, weights;
      for (int64_t i = 0; i < tails; ++i) {
        projections.push_back(t[2 * i + 2]);
        weights.push_back(t[2 * i + 3]);
      }
      return std::get<0>(adaptive_cross_entropy(t[0], t[1], std::nullopt, projections, weights, target));
    };
    // The arithmetic of torch.nn.AdaptiveLogSoftmaxWithLoss, whose module holds parameters of its own.
    const auto torchs = [=](const Tensors& t) {
      at::Tensor in_head = target.clone(), loss = at::zeros({}, t[0].options());
      for (int64_t i = 0; i < tails; ++i) {
        const int64_t end = i + 1 < tails ? cutoffs[i + 1] : vocabulary;
        const at::Tensor inside = target.ge(cutoffs[i]).logical_and(target.lt(end));
        in_head.masked_fill_(inside, cutoffs[0] + i);
        const at::Tensor met = inside.nonzero().squeeze(1);
        const at::Tensor z = at::linear(at::linear(t[0].index_select(0, met), t[2 * i + 2]), t[2 * i + 3]);
        loss = loss +
               at::cross_entropy_loss(z, target.index_select(0, met) - cutoffs[i], {}, at::Reduction::Sum);
      }
      loss = loss + at::cross_entropy_loss(at::linear(t[0], t[1]), in_head, {}, at::Reduction::Sum);
      return loss / target.numel();
    };
    add_expressions(contest, inputs, ours, torchs);
    return contest;
  };
  return {std::string("adaptive_cross_entropy, ") + pass_name(Pass::kForwardBackward),
          by(positions, width, vocabulary), make};
}

// ---- optimizers ----

constexpr int64_t kNewtonSchulzSteps = 5;

/// The same iteration, one torch call for each product and each sum.
at::Tensor eager_newton_schulz(const at::Tensor& g) {
  at::Tensor x = g / (g.norm() + 1e-7);
  const bool tall = g.size(0) > g.size(1);
  if (tall) x = x.t();
  for (int64_t i = 0; i < kNewtonSchulzSteps; ++i) {
    const at::Tensor gram = x.mm(x.t());
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram.mm(gram)).mm(x);
  }
  return tall ? x.t() : x;
}

Case newton_schulz_case(int64_t m, int64_t n, const char* precision) {
  const auto make = [=] {
    const double small = static_cast<double>(std::min(m, n)), large = static_cast<double>(std::max(m, n));
    Contest contest = products(kNewtonSchulzSteps * (2 * small * small * large + small * small * small),
                               Pass::kForward, tiles_of(precision));
    const bool bfloat16 = std::string_view(precision) == "bfloat16";
    contest.tolerance = 0.3;  // only directions matter, and the iteration makes much of bfloat16's rounding
    add_expressions(
        contest, {at::randn({m, n})},
        [=](const Tensors& t) { return newton_schulz(t[0], kNewtonSchulzSteps, bfloat16); },
        [](const Tensors& t) { return eager_newton_schulz(t[0]); });
    return contest;
  };
  return {std::string("newton_schulz, 5 steps in ") + precision, by(m, n), make};
}

Case adamw_case(int64_t rows, int64_t width) {
  const auto make = [=] {
    // Weight, gradient and two moments in; weight and moments out.
    const double n = static_cast<double>(rows * width);
    Contest contest = passes_over_memory(7 * n, 4 * n, Pass::kForwardBackward);
    const auto parameter = [=] {
      at::Tensor weight = at::randn({rows, width}).requires_grad_();
      weight.mutable_grad() = at::randn({rows, width});
      return weight;
    };
    const auto add = [&](const char* name, auto optimizer) {
      contest.contestants.push_back({name, [optimizer] {
                                       optimizer->step();
                                       return at::Tensor();  // after other numbers of steps, other weights
                                     }});
    };
    const Tensors ours = {parameter()}, theirs = {parameter()};
    add("FlashLM", std::make_shared<FusedAdamW>(ours));
    add("torch float32", std::make_shared<torch::optim::AdamW>(theirs));
    return contest;
  };
  return {"AdamW step", by(rows, width), make};
}

}  // namespace

std::vector<Case> cases(const Ggml* ggml, int threads) {
  constexpr int64_t kBitLinear[][3] = {
      {1024, 256, 683}, {1024, 683, 256}, {4096, 256, 683}, {256, 256, 683}, {1, 256, 683}};  // M, K, N
  constexpr const char* kModes[][2] = {{"int8", "absmean"}, {"none", "absmean"}, {"none", "threshold"}};
  constexpr int64_t kPacked[][2] = {{256, 683}, {683, 256}, {2048, 2048}, {4096, 14336}};  // K, N
  constexpr int64_t kDilations[] = {1, 4, 64};
  constexpr int64_t kHeads[][2] = {{1024, 50257}, {4096, 224}, {8192, 224}};  // N, V
  constexpr std::tuple<const char*, Glu, Glu> kGlus[] = {{"relu2_glu", relu2_glu, eager_relu2_glu},
                                                         {"silu_glu", silu_glu, eager_silu_glu},
                                                         {"sigmoid_glu", sigmoid_glu, eager_sigmoid_glu}};
  constexpr Pass kPasses[] = {Pass::kForward, Pass::kForwardBackward};

  std::vector<Case> all;
  for (const Pass pass : kPasses) {
    for (const auto& [activation, quantizer] : kModes) {
      for (const auto& [m, k, n] : kBitLinear) {
        if (pass == Pass::kForward || std::string(activation) == "none") {
          all.push_back(bit_linear_case(m, k, n, activation, quantizer, pass));
          continue;
        }
        for (const char* gradient : {"int8", "bfloat16", "float32"}) {
          all.push_back(bit_linear_case(m, k, n, activation, quantizer, pass, gradient));
        }
      }
    }
  }
  for (const TernaryKernels& ternary : {byte_kernels(), two_bit_kernels()}) {
    for (const auto& [k, n] : kPacked) all.push_back(kernel_case(ggml, ternary, 1, k, n));
  }
  for (const auto& [k, n] : kPacked) {
    for (const int64_t m : {1, 8, 64}) all.push_back(packed_linear_case(ggml, threads, m, k, n));
  }
  for (const Pass pass : kPasses) {
    all.push_back(ternary_glu_case(8192, 256, 683, "int8", "int8", pass));
    all.push_back(ternary_glu_case(8192, 256, 683, "none", "bfloat16", pass));
  }
  const auto gated_conv_cases = [&](Pass pass, const char* gradient, const char* precision) {
    for (const int64_t dilation : kDilations) {
      all.push_back(gated_conv_case(16, 256, 256, 16, dilation, pass, gradient, precision));
    }
  };
  for (const Pass pass : kPasses) {
    for (const char* precision : {"float32", "bfloat16"}) gated_conv_cases(pass, precision, precision);
  }
  gated_conv_cases(Pass::kForwardBackward, "bfloat16", "float32");
  for (const Pass pass : kPasses) {
    for (const int64_t dilation : kDilations)
      all.push_back(causal_conv1d_case(16, 256, 256, 16, dilation, pass));
  }
  for (const Pass pass : kPasses) {
    for (const char* activation : {"none", "silu"})
      all.push_back(mlgru_case(16, 1024, 512, activation, pass));
  }
  for (const Pass pass : kPasses) all.push_back(rms_norm_case(4096, 256, pass));
  for (const auto& [name, ours, eager] : kGlus) {
    for (const Pass pass : kPasses) all.push_back(glu_case(name, ours, eager, 4096, 683, pass));
  }
  for (const char* precision : {"float32", "bfloat16"}) {
    for (const auto& [positions, vocabulary] : kHeads) {
      all.push_back(linear_cross_entropy_case(positions, 256, vocabulary, precision));
    }
    all.push_back(hierarchical_cross_entropy_case(8192, 256, 50257, precision));
  }
  all.push_back(adaptive_cross_entropy_case(8192, 256, {2000, 10000}, 50257));
  for (const char* precision : {"float32", "bfloat16"}) {
    all.push_back(newton_schulz_case(683, 256, precision));
  }
  all.push_back(adamw_case(50257, 256));
  return all;
}

}  // namespace flashlm::bench
