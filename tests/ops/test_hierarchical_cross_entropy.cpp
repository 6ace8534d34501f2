// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <numeric>

#include "ops/hierarchical_cross_entropy.h"
#include "ops/kernels/kernels.h"
#include "tests/ops/check.h"
#include "tests/ops/reference.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

using Sizes = std::vector<int64_t>;

struct Options {
  double label_smoothing = 0;
  double z_loss = 0;
  int64_t ignore_index = -100;
  std::string reduction = "mean";
  std::string precision = "float32";
};

/// Classes of these sizes, with words in random order.
struct Classes {
  explicit Classes(const Sizes& class_sizes) : sizes(class_sizes) {
    std::vector<int64_t> ends = {0};
    for (const int64_t n : sizes) ends.push_back(ends.back() + n);
    offsets = at::tensor(ends);
    vocabulary = ends.back();
    words = at::randperm(vocabulary, at::make_generator<at::CPUGeneratorImpl>(3), at::kLong);
  }
  std::vector<at::Tensor> split() const { return words.split_with_sizes(sizes); }

  Sizes sizes;
  at::Tensor words, offsets;
  int64_t vocabulary;
};

/// h, class_weight, class_bias, word_weight, word_bias; biases may be undefined.
Tensors layers(std::vector<int64_t> shape, const Classes& classes, int64_t width, bool bias,
               at::ScalarType dtype, double spread = 1) {
  shape.push_back(width);
  const auto n = static_cast<int64_t>(classes.sizes.size());
  const double scale = spread * 2 / std::sqrt(static_cast<double>(width));
  Tensors out = {randn(shape, at::kDouble), randn({n, width}, at::kDouble, 1) * scale,
                 bias ? randn({n}, at::kDouble, 2) : at::Tensor(),
                 randn({classes.vocabulary, width}, at::kDouble, 3) * scale,
                 bias ? randn({classes.vocabulary}, at::kDouble, 4) : at::Tensor()};
  for (auto& t : out) {
    if (t.defined()) t = t.to(dtype).requires_grad_();
  }
  return out;
}

at::Tensor targets(at::IntArrayRef shape, int64_t vocabulary, const Options& options, bool ignore = true) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(5);
  at::Tensor y = torch::randint(vocabulary, shape, generator, at::TensorOptions(at::kLong));
  if (!ignore) return y;
  const at::Tensor dropped = torch::randint(5, shape, generator, at::TensorOptions(at::kLong)) == 0;
  return at::where(dropped, options.ignore_index, y);
}

std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

std::tuple<at::Tensor, at::Tensor> run(const Tensors& t, const Classes& classes, const at::Tensor& target,
                                       const Options& o) {
  return hierarchical_cross_entropy(t[0], t[1], optional(t[2]), t[3], optional(t[4]), classes.words,
                                    classes.offsets, target, o.label_smoothing, o.z_loss, o.ignore_index,
                                    o.reduction, o.precision);
}

/// Both levels by the reference of linear_cross_entropy, class by class: {loss, nll}.
std::tuple<at::Tensor, at::Tensor> run_reference(const Tensors& t, const Classes& classes,
                                                 const at::Tensor& target, const Options& o) {
  const auto level = [&](const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& y) {
    return reference::linear_cross_entropy(t[0], weight, optional(bias), y, o.label_smoothing, o.z_loss,
                                           /*ignore_index=*/-1, "none");
  };
  const at::Tensor kept = target != o.ignore_index;
  at::Tensor of_class = at::full_like(target, -1), loss = at::zeros({}, at::kDouble), nll = loss;
  const auto split = classes.split();
  for (size_t c = 0; c < split.size(); ++c) {
    const at::Tensor hits = target.unsqueeze(-1) == split[c];
    const at::Tensor inside = kept & hits.any(-1);
    if (!inside.any().item<bool>()) continue;
    of_class.masked_fill_(inside, static_cast<int64_t>(c));
    const at::Tensor y = at::where(inside, hits.to(at::kLong).argmax(-1), -1);
    const auto [word_loss, word_nll] =
        level(t[3].index_select(0, split[c]), t[4].defined() ? t[4].index_select(0, split[c]) : t[4], y);
    loss = loss + word_loss;
    nll = nll + word_nll;
  }
  const auto [class_loss, class_nll] = level(t[1], t[2], of_class);
  loss = loss + class_loss;
  nll = nll + class_nll;
  if (o.reduction == "none") return {loss, nll};
  const at::Tensor count = o.reduction == "mean" ? kept.sum() : at::ones({});
  return {loss.sum() / count, nll.sum() / count};
}

Tensors map(const Tensors& in, const std::function<at::Tensor(const at::Tensor&)>& f) {
  Tensors out;
  for (const auto& t : in) out.push_back(t.defined() ? f(t) : t);
  return out;
}

/// Loss, nll and gradients equal those of the reference in double, behind awkward strides too.
void require_equals_reference(const Tensors& inputs, const Classes& classes, const at::Tensor& target,
                              const Options& options, double loss_tolerance, double grad_tolerance) {
  const auto dtype = inputs[0].scalar_type();
  const auto loss_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const Tensors exact =
      map(inputs, [](const at::Tensor& t) { return t.detach().to(at::kDouble).requires_grad_(); });
  const auto [want_loss, want_nll] = run_reference(exact, classes, target, options);
  for (const Tensors& in : {inputs, map(inputs, strided)}) {
    const auto [loss, nll] = run(in, classes, target, options);
    require_close(loss, want_loss.to(loss_dtype), loss_tolerance);
    require_close(nll, want_nll.to(loss_dtype), loss_tolerance);
    REQUIRE(loss.requires_grad());
    REQUIRE_FALSE(nll.requires_grad());
  }
  const Tensors got = gradients(
      [&](const Tensors& t) {
        return std::get<0>(run(map(t, strided), classes, target, options)).to(at::kDouble);
      },
      inputs);
  const Tensors want = gradients(
      [&](const Tensors& t) { return std::get<0>(run_reference(t, classes, target, options)); }, exact);
  REQUIRE(got.size() == want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    INFO("gradient " << i);
    // A bias's gradient may be what is left of terms of size 1/N.
    require_close(got[i], want[i].to(dtype), grad_tolerance, grad_tolerance / 50);
  }
}

}  // namespace

TEST_CASE("hierarchical_cross_entropy equals its reference", "[hierarchical]") {
  const auto sizes = GENERATE(Sizes{1}, Sizes{1, 1, 1}, Sizes{7}, Sizes{3, 1, 5}, Sizes{40, 300, 1, 17},
                              Sizes{256, 257, 12, 600});
  const int64_t positions = GENERATE(1, 5, 37);
  const Options options{0.1 * static_cast<double>(positions % 2), positions % 3 ? 1e-2 : 0,
                        positions % 5 ? 0 : -100,
                        positions == 1    ? "none"
                        : positions == 37 ? "mean"
                                          : "sum"};
  const int64_t width = positions == 5 ? 33 : 8;
  const Classes classes(sizes);
  const at::Tensor y = targets({positions}, classes.vocabulary, options, positions != 1);
  if ((y == options.ignore_index).all().item<bool>()) return;  // nothing to compare
  for (const bool bias : {false, true}) {
    INFO("V " << classes.vocabulary << " N " << positions << " bias " << bias);
    require_equals_reference(layers({positions}, classes, width, bias, at::kFloat), classes, y, options, 4e-6,
                             1e-5);
    require_equals_reference(layers({positions}, classes, width, bias, at::kDouble), classes, y, options,
                             1e-13, 1e-12);
  }
}

TEST_CASE("hierarchical_cross_entropy: a class of several blocks of positions", "[hierarchical]") {
  const Classes classes({3, 530, 2});
  const Options options{0.1, 1e-3, -100, "mean"};
  const int64_t positions = GENERATE(700, 2400);  // the latter has more logits than are kept
  const at::Tensor y = targets({positions}, classes.vocabulary, options);
  require_equals_reference(layers({positions}, classes, 6, true, at::kDouble), classes, y, options, 1e-13,
                           1e-12);
}

TEST_CASE("hierarchical_cross_entropy in bfloat16, and any leading dimensions", "[hierarchical]") {
  const Classes classes({5, 9, 30});
  const Options options{0.1, 1e-3, -1, "mean"};
  const auto shape = GENERATE(std::vector<int64_t>{}, std::vector<int64_t>{2, 3, 5});
  const at::Tensor y = targets(shape, classes.vocabulary, options, /*ignore=*/!shape.empty());
  require_equals_reference(layers(shape, classes, 7, true, at::kBFloat16), classes, y, options, 2e-6, 8e-3);
}

TEST_CASE("hierarchical_cross_entropy in bfloat16 precision rounds the operands of its products",
          "[hierarchical]") {
  const auto sizes = GENERATE(Sizes{1}, Sizes{7, 1}, Sizes{3, 530, 2, 65});
  const int64_t positions = GENERATE(1, 301, 2400);  // the last has more logits than are kept
  const auto reduction = GENERATE("mean", "none");
  const int64_t width = positions == 301 ? 33 : 64;
  const Classes classes(sizes);
  const Options options{0.1, 1e-3, -100, reduction, "bfloat16"};
  Options exact = options;
  exact.precision = "float32";
  const at::Tensor y = targets({positions}, classes.vocabulary, options, positions > 1);
  const Tensors inputs = layers({positions}, classes, width, true, at::kFloat);
  INFO("V " << classes.vocabulary << " N " << positions << " " << reduction);
  const auto results = [&](const Tensors& in, const auto& operation) {
    const auto [loss, nll] = operation(in);
    Tensors out = {loss.detach(), nll.detach()};
    for (auto& grad : torch::autograd::grad({loss.sum()}, in)) out.push_back(grad);
    return out;
  };
  const auto run_with = [&](const Options& o) {
    return results(inputs, [&](const Tensors& in) { return run(in, classes, y, o); });
  };
  const Tensors got = run_with(options), plain = run_with(exact);
  REQUIRE(got.size() == plain.size());
  if (kernels::table<float>().bf16_panel == 0) {
    for (size_t i = 0; i < got.size(); ++i) require_equal(got[i], plain[i]);
    return;
  }
  Tensors rounded;
  for (const size_t i : {0, 1, 2, 3, 4}) {
    const at::Tensor t = inputs[i].detach();
    const bool is_bias = i == 2 || i == 4;
    rounded.push_back((is_bias ? t : t.to(at::kBFloat16)).to(at::kDouble).requires_grad_());
  }
  const Tensors want =
      results(rounded, [&](const Tensors& in) { return run_reference(in, classes, y, options); });
  for (size_t i = 0; i < got.size(); ++i) {
    INFO("result " << i);
    // Of the gradients the reference rounds nothing: ours rounds those of the logits, by 2^-9 each at most.
    require_close_in_norm(got[i], want[i], i < 2 ? 4e-6 : 8e-3);
  }
}

TEST_CASE("hierarchical_cross_entropy gradients", "[hierarchical]") {
  const auto reduction = GENERATE("mean", "sum", "none");
  const bool bias = GENERATE(true, false);
  const Classes classes({3, 1, 4});
  const Options options{0.1, 0.05, 2, reduction};
  const at::Tensor y = targets({2, 3}, classes.vocabulary, options);
  require_gradients_match([&](const Tensors& t) { return std::get<0>(run(t, classes, y, options)); },
                          layers({2, 3}, classes, 3, bias, at::kDouble));
}

TEST_CASE("hierarchical_cross_entropy: words that no target has beside it", "[hierarchical]") {
  const Classes classes({4, 1, 300});
  const Tensors inputs = layers({6}, classes, 5, true, at::kFloat);
  SECTION("a class of one word costs and moves nothing below its class") {
    const at::Tensor y = classes.words.slice(0, 4, 5).expand({6});
    const Tensors grads = torch::autograd::grad({std::get<0>(run(inputs, classes, y, {}))}, inputs);
    require_equal(grads[3], at::zeros_like(grads[3]));
    require_equal(grads[4], at::zeros_like(grads[4]));
    const auto class_only = reference::linear_cross_entropy(inputs[0], inputs[1], inputs[2],
                                                            at::ones({6}, at::kLong), 0, 0, -100, "none");
    require_close(std::get<0>(run(inputs, classes, y, {0, 0, -100, "none"})), std::get<0>(class_only), 1e-6);
  }
  SECTION("classes without a target get gradients of zero") {
    const at::Tensor y = classes.words.slice(0, 0, 4).slice(0, 0, 1).expand({6});
    const Tensors grads = torch::autograd::grad({std::get<0>(run(inputs, classes, y, {}))}, inputs);
    const at::Tensor others = classes.words.slice(0, 4);
    REQUIRE((grads[3].index_select(0, classes.words.slice(0, 0, 4)) != 0).all().item<bool>());
    require_equal(grads[3].index_select(0, others), at::zeros({301, 5}));
    require_equal(grads[4].index_select(0, others), at::zeros({301}));
  }
}

TEST_CASE("hierarchical_cross_entropy of no positions", "[hierarchical]") {
  const Classes classes({2, 3});
  const Tensors inputs = layers({4}, classes, 3, true, at::kFloat);
  const at::Tensor y = at::full({4}, -100, at::kLong);
  REQUIRE(std::get<0>(run(inputs, classes, y, {})).isnan().item<bool>());
  const auto [sum, nll] = run(inputs, classes, y, {0, 0, -100, "sum"});
  require_equal(sum, at::zeros({}));
  require_equal(nll, at::zeros({}));
  const Tensors grads = torch::autograd::grad({sum}, inputs);
  for (size_t i = 0; i < inputs.size(); ++i) require_equal(grads[i], at::zeros_like(inputs[i]));
}

TEST_CASE("hierarchical_cross_entropy computes only the gradients that are asked for", "[hierarchical]") {
  const Classes classes({10, 300, 5});
  const Tensors inputs = layers({40}, classes, 5, true, at::kFloat);
  const at::Tensor y = targets({40}, classes.vocabulary, {});
  const auto loss = [&](const Tensors& t) { return std::get<0>(run(t, classes, y, {})); };
  const Tensors all = gradients(loss, inputs);
  for (size_t i = 0; i < inputs.size(); ++i) {
    Tensors one = map(inputs, [](const at::Tensor& t) { return t.detach(); });
    one[i].requires_grad_();
    const Tensors got = gradients(loss, one);
    REQUIRE(got.size() == 1);
    require_equal(got[0], all[i]);
  }
}

TEST_CASE("hierarchical_cross_entropy does not depend on the number of threads", "[hierarchical]") {
  Sizes sizes;
  for (int64_t i = 0; i < 30; ++i) sizes.push_back(1 + i * i % 401);
  const Classes classes(sizes);
  const Tensors inputs = layers({500}, classes, 24, true, at::kFloat);
  const Options options{0.1, 1e-3, -100, "mean"};
  const at::Tensor y = targets({500}, classes.vocabulary, options);
  require_same_for_any_threads([&] {
    Tensors out =
        gradients([&](const Tensors& t) { return std::get<0>(run(t, classes, y, options)); }, inputs);
    const auto [loss, nll] = run(inputs, classes, y, options);
    out.push_back(loss.detach());
    out.push_back(nll);
    return out;
  });
}

TEST_CASE("hierarchical_cross_entropy: words masked by -inf, large logits, and NaN that is not hidden",
          "[hierarchical]") {
  const Classes classes({400, 5});
  const Tensors inputs =
      map(layers({4}, classes, 3, true, at::kFloat), [](const at::Tensor& t) { return t.detach(); });
  const at::Tensor y = classes.words.slice(0, 396, 400);
  SECTION("words masked by -inf") {
    inputs[4].index_fill_(0, classes.words.slice(0, 0, 300), -INFINITY);  // more than one whole block
    Classes kept({100, 5});
    kept.words = classes.words.slice(0, 300);
    // The reference takes weights by number, so that there the masked words are merely in no class.
    const auto want =
        run_reference(map(inputs, [](const at::Tensor& t) { return t.to(at::kDouble); }), kept, y, {});
    require_close(std::get<0>(run(inputs, classes, y, {})), std::get<0>(want).to(at::kFloat), 1e-6);
  }
  SECTION("large logits") {
    inputs[3].mul_(1e4);
    inputs[1].mul_(1e4);
    const auto want =
        run_reference(map(inputs, [](const at::Tensor& t) { return t.to(at::kDouble); }), classes, y, {});
    require_close(std::get<0>(run(inputs, classes, y, {})), std::get<0>(want).to(at::kFloat), 1e-5);
  }
  SECTION("NaN") {
    inputs[3][classes.words[7]].fill_(NAN);
    require_error([&] { run(inputs, classes, y, {}); },
                  "hierarchical_cross_entropy: logits must be finite, got a log-sum-exp over a class's words "
                  "of nan at position 0");
  }
}

TEST_CASE("hierarchical_cross_entropy refuses wrong arguments in words", "[hierarchical]") {
  const Classes right({2, 4});
  const Tensors t =
      map(layers({3}, right, 4, true, at::kFloat), [](const at::Tensor& x) { return x.detach(); });
  const at::Tensor y = at::tensor(std::vector<int64_t>{0, 5, 2});
  const auto fails = [&](const std::string& words,
                         const std::function<void(Tensors&, Classes&, at::Tensor&, Options&)>& change) {
    Tensors inputs = t;
    Classes classes = right;
    at::Tensor target = y;
    Options options;
    change(inputs, classes, target, options);
    require_error([&] { run(inputs, classes, target, options); }, "hierarchical_cross_entropy: " + words);
  };
#define CHANGE(...) \
  [](auto& in, auto& c, auto& target, auto& o) { (void)in, (void)c, (void)target, (void)o, __VA_ARGS__; }
  fails("h must be float32, bfloat16 or float64, got Int", CHANGE(in[0] = in[0].to(at::kInt)));
  fails("class_weight must have h's dtype Float, got Double", CHANGE(in[1] = in[1].to(at::kDouble)));
  fails("class_weight's last dimension must be 4, got 5", CHANGE(in[1] = randn({2, 5})));
  fails("class_bias's size must be 2, got 3", CHANGE(in[2] = randn({3})));
  fails("word_weight must have 2 dimensions, got 1", CHANGE(in[3] = in[3][0]));
  fails("word_bias must have 1 dimension, got 2", CHANGE(in[4] = randn({6, 1})));
  fails("class_words' size must be 6, got 5", CHANGE(c.words = c.words.slice(0, 1)));
  fails("class_words must be int64, got Int", CHANGE(c.words = c.words.to(at::kInt)));
  fails("class_offsets' size, C + 1, must be 3, got 2", CHANGE(c.offsets = c.offsets.slice(0, 1)));
  fails("class_offsets must go from 0 to V = 6, got 1 to 7", CHANGE(c.offsets = c.offsets + 1));
  fails("class_offsets must rise, got 6 after 6 at 2", CHANGE(c.offsets = at::tensor(Sizes{0, 6, 6})));
  fails("class_words must be in [0, V) = [0, 6), got 6 at 1",
        CHANGE(c.words = at::tensor(Sizes{0, 6, 2, 3, 4, 5})));
  fails("class_words must name each word once, got word 2 at 1 and at 4",
        CHANGE(c.words = at::tensor(Sizes{0, 2, 1, 3, 2, 5})));
  fails("target must be int64, got Int", CHANGE(target = target.to(at::kInt)));
  fails("target's shape must be h's leading dimensions [3], got [2]", CHANGE(target = target.slice(0, 1)));
  fails("target must be in [0, V) = [0, 6) or ignore_index -100, got 6 at position 1",
        CHANGE(target = target + 1));
  fails("label_smoothing must be in [0, 1), got 1", CHANGE(o.label_smoothing = 1));
  fails("z_loss must be >= 0, got -1", CHANGE(o.z_loss = -1));
  fails("reduction must be mean, sum or none, got 'avg'", CHANGE(o.reduction = "avg"));
  fails("precision must be float32 or bfloat16, got 'int8'", CHANGE(o.precision = "int8"));
#undef CHANGE
}

// ---- log_prob, top_k, sample ----

namespace {

at::Tensor log_prob(const Tensors& t, const Classes& classes) {
  return hierarchical_log_prob(t[0], t[1], optional(t[2]), t[3], optional(t[4]), classes.words,
                               classes.offsets);
}

at::Tensor sample(const Tensors& t, const Classes& classes, const at::Tensor& h, double temperature,
                  int64_t top_k, double top_p, const at::Generator& generator) {
  return hierarchical_sample(h, t[1], optional(t[2]), t[3], optional(t[4]), classes.words, classes.offsets,
                             temperature, top_k, top_p, generator);
}

/// What hierarchical_sample promises to draw from, (V): as the sampler in model/generate.cpp.
at::Tensor sampled_distribution(const at::Tensor& log_p, double temperature, int64_t top_k, double top_p) {
  auto [sorted, order] = (log_p / temperature).sort(/*dim=*/-1, /*descending=*/true);
  if (top_k > 0) sorted = sorted.slice(0, 0, top_k);
  at::Tensor p = sorted.softmax(-1);
  p = p * ((p.cumsum(-1) - p) < top_p);
  p = p / p.sum();
  return at::zeros_like(log_p).index_copy_(0, order.slice(0, 0, p.size(0)), p);
}

}  // namespace

TEST_CASE("hierarchical_log_prob sums to one", "[hierarchical]") {
  const double spread = GENERATE(1.0, 30.0, 3000.0);
  const Classes classes({1, 300, 7, 40});
  const Tensors t = layers({2, 5}, classes, 16, true, at::kFloat, spread);
  const at::Tensor log_p = log_prob(t, classes);
  REQUIRE(log_p.isfinite().all().item<bool>());
  require_close(log_p.exp().sum(-1).detach(), at::ones({2, 5}), 1e-5);
  const Tensors grads = gradients([&](const Tensors& in) { return log_prob(in, classes); }, t);
  for (const at::Tensor& g : grads) REQUIRE(g.isfinite().all().item<bool>());
}

TEST_CASE("hierarchical_log_prob is the loss with its sign turned", "[hierarchical]") {
  const Classes classes({1, 30, 7, 4});
  const Tensors t = layers({42}, classes, 16, true, at::kDouble);
  const at::Tensor y = at::randperm(42, at::kLong);
  const at::Tensor picked = log_prob(t, classes).gather(1, y.unsqueeze(1)).squeeze(1);
  require_close(std::get<0>(run(t, classes, y, {0, 0, -100, "none"})), -picked, 1e-13);
}

TEST_CASE("hierarchical_top_k is the top of log_prob", "[hierarchical]") {
  const double spread = GENERATE(0.1, 1.0, 10.0);
  const Classes classes({1, 60, 7, 40, 1, 1, 25});
  const bool bias = GENERATE(true, false);
  const Tensors t = map(layers({3, 4}, classes, 16, bias, at::kDouble, spread),
                        [](const at::Tensor& x) { return x.detach(); });
  for (const int64_t k : {1, 2, 17, 135}) {
    const auto [want_log_p, want_word] = log_prob(t, classes).topk(k);
    const auto [log_p, word] = hierarchical_top_k(t[0], t[1], optional(t[2]), t[3], optional(t[4]),
                                                  classes.words, classes.offsets, k);
    require_close(log_p, want_log_p, 1e-13);
    REQUIRE(at::equal(word, want_word));
  }
}

TEST_CASE("hierarchical_top_k of equals: the words with the smaller numbers", "[hierarchical]") {
  const Classes classes({3, 3});
  const auto [log_p, word] =
      hierarchical_top_k(at::zeros({2}), at::zeros({2, 2}), std::nullopt, at::zeros({6, 2}), std::nullopt,
                         at::arange(6), classes.offsets, 4);
  require_close(log_p, at::full({4}, -std::log(6.0), at::kFloat), 1e-6);
  REQUIRE(at::equal(word, at::arange(4)));
}

TEST_CASE("hierarchical_sample draws from the distribution that it promises", "[hierarchical]") {
  const Classes classes({1, 6, 2, 4, 1, 5});
  const double temperature = GENERATE(0.2, 0.5, 1.0, 2.0);
  const auto [top_k, top_p] =
      GENERATE(std::pair<int64_t, double>{0, 1}, std::pair<int64_t, double>{5, 1},
               std::pair<int64_t, double>{0, 0.8}, std::pair<int64_t, double>{0, 0.35},
               std::pair<int64_t, double>{6, 0.7}, std::pair<int64_t, double>{100, 1});
  const char* more = std::getenv("FLASHLM_DRAWS");  // for a sharper look
  const int64_t draws = more ? std::atoll(more) : 10000;
  const Tensors t =
      map(layers({}, classes, 4, true, at::kDouble), [](const at::Tensor& x) { return x.detach(); });
  const at::Tensor p = sampled_distribution(log_prob(t, classes), temperature, top_k, top_p);
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(11);
  const at::Tensor words = sample(t, classes, t[0].expand({draws, 4}), temperature, top_k, top_p, generator);
  const at::Tensor counts = words.bincount({}, classes.vocabulary).to(at::kDouble);
  const at::Tensor possible = p > 0;
  REQUIRE((counts.masked_select(~possible) == 0).all().item<bool>());
  // A sum of squares of normal values, were the distribution right: its mean is their number.
  const at::Tensor expected = p.masked_select(possible) * draws;
  const double chi2 = ((counts.masked_select(possible) - expected).square() / expected).sum().item<double>();
  const double freedom = static_cast<double>(expected.numel() - 1);
  INFO("temperature " << temperature << " top_k " << top_k << " top_p " << top_p);
  REQUIRE(chi2 <= freedom + 6 * std::sqrt(2 * freedom) + 10 * (freedom > 0));
}

TEST_CASE("hierarchical_sample is settled by its generator", "[hierarchical]") {
  const Classes classes({10, 60, 7});
  const Tensors t =
      map(layers({50}, classes, 8, false, at::kFloat), [](const at::Tensor& x) { return x.detach(); });
  const auto draw = [&](uint64_t seed, double top_p) {
    return sample(t, classes, t[0], 1.3, 0, top_p, at::make_generator<at::CPUGeneratorImpl>(seed));
  };
  for (const double top_p : {1.0, 0.9}) {
    REQUIRE(at::equal(draw(1, top_p), draw(1, top_p)));
    REQUIRE_FALSE(at::equal(draw(1, top_p), draw(2, top_p)));
  }
  const auto draw_globally = [&] {
    at::manual_seed(7);
    return hierarchical_sample(t[0], t[1], std::nullopt, t[3], std::nullopt, classes.words, classes.offsets);
  };
  REQUIRE(at::equal(draw_globally(), draw_globally()));
}

TEST_CASE("hierarchical_sample when cold takes the likeliest word", "[hierarchical]") {
  const Classes classes({10, 60, 7});
  const Tensors t =
      map(layers({20}, classes, 8, true, at::kFloat), [](const at::Tensor& x) { return x.detach(); });
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(1);
  const at::Tensor likeliest = log_prob(t, classes).argmax(-1);
  for (const double temperature : {0.0, 1e-300, 1e-5}) {
    for (const double top_p : {1.0, 0.9}) {
      REQUIRE(at::equal(sample(t, classes, t[0], temperature, 0, top_p, generator), likeliest));
    }
  }
}

TEST_CASE("hierarchical_sample and top_k name what is not finite", "[hierarchical]") {
  const Classes classes({2, 3});
  const Tensors t =
      map(layers({2}, classes, 4, false, at::kFloat), [](const at::Tensor& x) { return x.detach(); });
  t[0][1][0] = NAN;
  const std::string words = "logits must be finite, got a log-sum-exp over the classes of nan at position 1";
  require_error([&] { sample(t, classes, t[0], 1, 0, 1, at::make_generator<at::CPUGeneratorImpl>(1)); },
                "hierarchical_sample: " + words);
  require_error(
      [&] {
        hierarchical_top_k(t[0], t[1], std::nullopt, t[3], std::nullopt, classes.words, classes.offsets, 1);
      },
      "hierarchical_top_k: " + words);
}
