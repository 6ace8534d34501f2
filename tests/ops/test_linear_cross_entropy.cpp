// SPDX-License-Identifier: Apache-2.0
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <future>

#include "ops/kernels/kernels.h"
#include "ops/linear_cross_entropy.h"
#include "tests/ops/check.h"
#include "tests/ops/reference.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

struct Options {
  double label_smoothing = 0;
  double z_loss = 0;
  int64_t ignore_index = -100;
  std::string reduction = "mean";
  std::string precision = "float32";
};

/// Words in [0, vocabulary), about one in five replaced by ignore_index if that is asked for.
at::Tensor targets(at::IntArrayRef shape, int64_t vocabulary, const Options& options, bool ignore = true) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(5);
  at::Tensor y = torch::randint(vocabulary, shape, generator, at::TensorOptions(at::kLong));
  if (!ignore) return y;
  const at::Tensor dropped = torch::randint(5, shape, generator, at::TensorOptions(at::kLong)) == 0;
  return at::where(dropped, options.ignore_index, y);
}

/// h, weight and bias (undefined if not wanted) that all require gradients.
Tensors parameters(std::vector<int64_t> shape, int64_t vocabulary, int64_t width, bool bias,
                   at::ScalarType dtype) {
  shape.push_back(width);
  const double scale = 1 / std::sqrt(static_cast<double>(width));
  Tensors out = {randn(shape, at::kDouble), randn({vocabulary, width}, at::kDouble, 1) * 2 * scale,
                 bias ? randn({vocabulary}, at::kDouble, 2) : at::Tensor()};
  for (auto& t : out) {
    if (t.defined()) t = t.to(dtype).requires_grad_();
  }
  return out;
}

std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

std::tuple<at::Tensor, at::Tensor> run(const Tensors& t, const at::Tensor& target, const Options& o) {
  return linear_cross_entropy(t[0], t[1], optional(t[2]), target, o.label_smoothing, o.z_loss, o.ignore_index,
                              o.reduction, o.precision);
}

std::tuple<at::Tensor, at::Tensor> run_reference(const Tensors& t, const at::Tensor& target,
                                                 const Options& o) {
  return reference::linear_cross_entropy(t[0], t[1], optional(t[2]), target, o.label_smoothing, o.z_loss,
                                         o.ignore_index, o.reduction);
}

Tensors map(const Tensors& in, const std::function<at::Tensor(const at::Tensor&)>& f) {
  Tensors out;
  for (const auto& t : in) out.push_back(t.defined() ? f(t) : t);
  return out;
}

/// Loss, nll and gradients equal those of the reference in double; so do they behind awkward strides.
void require_equals_reference(const Tensors& inputs, const at::Tensor& target, const Options& options,
                              double loss_tolerance, double grad_tolerance) {
  const auto dtype = inputs[0].scalar_type();
  const auto loss_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const Tensors exact =
      map(inputs, [](const at::Tensor& t) { return t.detach().to(at::kDouble).requires_grad_(); });
  const auto [want_loss, want_nll] = run_reference(exact, target, options);
  for (const Tensors& in : {inputs, map(inputs, strided)}) {
    const auto [loss, nll] = run(in, in[0].is_contiguous() ? target : strided(target), options);
    require_close(loss, want_loss.to(loss_dtype), loss_tolerance);
    require_close(nll, want_nll.to(loss_dtype), loss_tolerance);
    REQUIRE(loss.requires_grad());
    REQUIRE_FALSE(nll.requires_grad());
  }
  const Tensors got = gradients(
      [&](const Tensors& t) { return std::get<0>(run(map(t, strided), target, options)).to(at::kDouble); },
      inputs);
  const Tensors want =
      gradients([&](const Tensors& t) { return std::get<0>(run_reference(t, target, options)); }, exact);
  REQUIRE(got.size() == want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    INFO("gradient " << i);
    require_close(got[i], want[i].to(dtype), grad_tolerance);
  }
}

at::Tensor rounded_to_bfloat16(const at::Tensor& t) { return t.to(at::kBFloat16).to(at::kDouble); }

/// In double, with the operands of all products rounded to bfloat16: loss, nll and the gradients of the
/// loss's sum.
Tensors rounded_reference(const Tensors& t, const at::Tensor& target, const Options& o) {
  const at::Tensor h = rounded_to_bfloat16(t[0].detach()), weight = rounded_to_bfloat16(t[1].detach());
  at::Tensor z = at::matmul(h, weight.t());
  if (t[2].defined()) z = z + t[2].detach().to(at::kDouble);
  z.requires_grad_();
  const at::Tensor identity = at::eye(weight.size(0), at::kDouble);
  const auto [loss, nll] = reference::linear_cross_entropy(
      z, identity, std::nullopt, target, o.label_smoothing, o.z_loss, o.ignore_index, o.reduction);
  const at::Tensor exact = torch::autograd::grad({loss.sum()}, {z})[0];
  const at::Tensor grad = rounded_to_bfloat16(exact.to(at::kFloat));
  Tensors out = {loss.detach(), nll.detach(), grad.matmul(weight), grad.t().matmul(h)};
  if (t[2].defined()) out.push_back(exact.sum(0));
  return out;
}

/// Counts the bytes that tensors hold while it lives.
class PeakMemory final : public at::Allocator {
 public:
  PeakMemory() : inner_(c10::GetCPUAllocator()) {
    live_ = 0;
    peak_ = 0;
    c10::SetCPUAllocator(this);
  }
  ~PeakMemory() override { c10::SetCPUAllocator(inner_); }
  int64_t bytes() const { return peak_; }

  at::DataPtr allocate(size_t n) override {
    const int64_t now = live_ += static_cast<int64_t>(n);
    for (int64_t seen = peak_; now > seen && !peak_.compare_exchange_weak(seen, now);) {
    }
    auto* block = new Block{inner_->allocate(n), static_cast<int64_t>(n)};
    return {block->memory.get(), block, &release, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }

 private:
  struct Block {
    at::DataPtr memory;
    int64_t size;
  };
  static void release(void* block) {
    live_ -= static_cast<Block*>(block)->size;
    delete static_cast<Block*>(block);
  }
  at::Allocator* inner_;
  // Static: tensors may outlive the object.
  static inline std::atomic<int64_t> live_, peak_;
};

}  // namespace

TEST_CASE("linear_cross_entropy equals its reference around its blocks", "[linear_cross_entropy]") {
  // Every size with every width; the options cycle at different periods so that all pairs of them occur.
  int64_t k = 0;
  for (int64_t positions : {1, 5, 257, 1030}) {
    for (int64_t vocabulary : {1, 2, 17, 256, 1000}) {
      for (int64_t width : {1, 7, 64}) {
        const Options options{k % 4 < 2 ? 0 : 0.1, k % 3 == 0 ? 0 : 1e-2, k % 5 == 0 ? vocabulary / 2 : -100,
                              std::vector<std::string>{"mean", "sum", "none"}[k % 3]};
        const bool bias = k % 2 == 0;
        INFO("N " << positions << " V " << vocabulary << " D " << width << " bias " << bias << " smoothing "
                  << options.label_smoothing << " z_loss " << options.z_loss << " ignore_index "
                  << options.ignore_index << " reduction " << options.reduction);
        const at::Tensor y = targets({positions}, vocabulary, options, k % 7 != 0);
        // All ignored: 0 / 0 and no gradient to compare.
        const bool any = (y != options.ignore_index).any().item<bool>();
        if (any || options.reduction != "mean") {
          require_equals_reference(parameters({positions}, vocabulary, width, bias, at::kFloat), y, options,
                                   4e-6, 1e-5);
        }
        ++k;
      }
    }
  }
}

TEST_CASE("linear_cross_entropy of few words and many rows equals its reference", "[linear_cross_entropy]") {
  // One group of rows, two, and several chunks of them: with groups, and without. A fifth is ignored.
  const auto [positions, vocabulary] =
      GENERATE(table<int64_t, int64_t>({{512, 224}, {1000, 224}, {1030, 2000}, {12000, 3}, {1300, 3000}}));
  const Options options{0.1, 1e-3, -100, GENERATE("sum", "none")};
  const at::Tensor y = targets({positions}, vocabulary, options);
  require_equals_reference(parameters({positions}, vocabulary, 16, true, at::kFloat), y, options, 4e-6, 1e-5);
}

TEST_CASE("linear_cross_entropy in every dtype, over GPT-2's vocabulary", "[linear_cross_entropy]") {
  const Options options{0.1, 1e-3, -1, "mean"};
  const at::Tensor y = targets({2, 3}, 50257, options);
  require_equals_reference(parameters({2, 3}, 50257, 7, true, at::kFloat), y, options, 2e-6, 1e-5);
  require_equals_reference(parameters({2, 3}, 50257, 7, false, at::kDouble), y, options, 1e-13, 1e-13);
  // Gradients are rounded to bfloat16, the loss is not.
  require_equals_reference(parameters({2, 3}, 50257, 7, true, at::kBFloat16), y, options, 2e-6, 8e-3);
}

TEST_CASE("linear_cross_entropy takes any leading dimensions", "[linear_cross_entropy]") {
  const auto shape = GENERATE(std::vector<int64_t>{}, std::vector<int64_t>{3}, std::vector<int64_t>{2, 3, 5});
  const auto reduction = GENERATE("mean", "sum", "none");
  const Options options{0.1, 0, -100, reduction};
  const at::Tensor y = targets(shape, 300, options, /*ignore=*/shape.size() > 1);
  require_equals_reference(parameters(shape, 300, 9, true, at::kDouble), y, options, 1e-13, 1e-13);
}

TEST_CASE("linear_cross_entropy of no positions", "[linear_cross_entropy]") {
  const Tensors inputs = parameters({4}, 6, 3, true, at::kFloat);
  const at::Tensor all_ignored = at::full({4}, -100, at::kLong);
  for (const bool empty : {true, false}) {
    const Tensors in = {empty ? inputs[0].detach().slice(0, 0, 0).requires_grad_() : inputs[0], inputs[1],
                        inputs[2]};
    const at::Tensor y = empty ? all_ignored.slice(0, 0, 0) : all_ignored;
    const auto [mean, mean_nll] = run(in, y, {});
    REQUIRE((mean.isnan().item<bool>() && mean_nll.isnan().item<bool>()));
    require_equal(std::get<1>(run(in, y, {0, 0, -100, "none"})), at::zeros({y.size(0)}));
    const auto [sum, sum_nll] = run(in, y, {0, 0, -100, "sum"});
    require_equal(sum, at::zeros({}));
    require_equal(sum_nll, at::zeros({}));
    const Tensors grads = torch::autograd::grad({sum}, in);
    for (size_t i = 0; i < 3; ++i) require_equal(grads[i], at::zeros_like(in[i]));
  }
}

TEST_CASE("linear_cross_entropy equals torch's linear and cross_entropy", "[linear_cross_entropy]") {
  namespace F = torch::nn::functional;
  const Tensors inputs = parameters({70}, 600, 32, true, at::kFloat);
  const Options options{0.2, 0, -100, "mean"};
  const at::Tensor y = targets({70}, 600, options);
  const auto torchs = [&](const Tensors& t, double label_smoothing) {
    return F::cross_entropy(F::linear(t[0], t[1], t[2]), y,
                            F::CrossEntropyFuncOptions().label_smoothing(label_smoothing));
  };
  const auto [loss, nll] = run(inputs, y, options);
  require_close(loss, torchs(inputs, 0.2), 1e-6);
  require_close(nll, torchs(inputs, 0), 1e-6);
  const Tensors got = gradients([&](const Tensors& t) { return std::get<0>(run(t, y, options)); }, inputs);
  const Tensors want = gradients([&](const Tensors& t) { return torchs(t, 0.2); }, inputs);
  for (size_t i = 0; i < 3; ++i) require_close(got[i], want[i], 1e-5);
}

TEST_CASE("linear_cross_entropy gradients", "[linear_cross_entropy]") {
  const auto reduction = GENERATE("mean", "sum", "none");
  const auto shape = GENERATE(std::vector<int64_t>{5}, std::vector<int64_t>{2, 3});
  const bool bias = GENERATE(true, false);
  const Options options{0.1, 0.05, 2, reduction};
  const at::Tensor y = targets(shape, 11, options);
  require_gradients_match([&](const Tensors& t) { return std::get<0>(run(t, y, options)); },
                          parameters(shape, 11, 3, bias, at::kDouble));
}

TEST_CASE("linear_cross_entropy computes only the gradients that are asked for", "[linear_cross_entropy]") {
  const Tensors inputs = parameters({6}, 300, 5, true, at::kFloat);
  const at::Tensor y = targets({6}, 300, {});
  const auto loss = [&](const Tensors& t) { return std::get<0>(run(t, y, {})); };
  const Tensors all = gradients(loss, inputs);
  for (size_t i = 0; i < 3; ++i) {
    Tensors one = map(inputs, [](const at::Tensor& t) { return t.detach(); });
    one[i].requires_grad_();
    const Tensors got = gradients(loss, one);
    REQUIRE(got.size() == 1);
    require_equal(got[0], all[i]);
  }
  const Tensors frozen = map(inputs, [](const at::Tensor& t) { return t.detach(); });
  REQUIRE_FALSE(loss(frozen).requires_grad());
}

TEST_CASE("linear_cross_entropy is finite and right at large logits", "[linear_cross_entropy]") {
  const double size = GENERATE(80.0, 3e4);
  // One logit of +size and the rest -size; the target is that word, and another one.
  const at::Tensor weight = at::full({700, 1}, -size, at::kFloat);
  weight[650].fill_(size);
  const Tensors inputs = {at::ones({2, 1}).requires_grad_(), weight.requires_grad_(), at::Tensor()};
  const at::Tensor y = at::tensor(std::vector<int64_t>{650, 3});
  const auto [loss, nll] = run(inputs, y, {0, 0, -100, "none"});
  REQUIRE(loss[0].item<float>() == 0);
  REQUIRE(loss[1].item<double>() == 2 * size);
  require_equals_reference(inputs, y, {0.1, 1e-3, -100, "sum"}, 1e-6, 4e-6);
}

TEST_CASE("linear_cross_entropy: words masked by -inf, and NaN that is not hidden",
          "[linear_cross_entropy]") {
  Tensors inputs =
      map(parameters({4}, 600, 3, true, at::kFloat), [](const at::Tensor& t) { return t.detach(); });
  const at::Tensor y = at::full({4}, 500, at::kLong);
  inputs[2].slice(0, 0, 400).fill_(-INFINITY);  // more than one whole block
  const Tensors kept = {inputs[0], inputs[1].slice(0, 400), inputs[2].slice(0, 400)};
  require_close(std::get<0>(run(inputs, y, {})), std::get<0>(run(kept, y - 400, {})), 1e-6);
}

TEST_CASE("linear_cross_entropy refuses logits that are not finite, and says where",
          "[linear_cross_entropy]") {
  const std::string precision = GENERATE("float32", "bfloat16");
  const Tensors inputs =
      map(parameters({5}, 600, 3, true, at::kFloat), [](const at::Tensor& t) { return t.detach(); });
  const at::Tensor y = at::tensor(std::vector<int64_t>{0, -100, 2, 3, 4});
  const auto refused = [&](int64_t input, int64_t row, double value, const std::string& words) {
    Tensors bad = inputs;
    bad[input] = bad[input].clone();
    bad[input][row].fill_(value);
    REQUIRE_THROWS_AS(run(bad, y, {0, 0, -100, "mean", precision}), c10::ValueError);
    require_error(
        [&] {
          run(bad, y, {0, 0, -100, "mean", precision});
        },
        "linear_cross_entropy: logits must be finite, got a log-sum-exp of " + words +
            " (h, weight or bias has a NaN or an infinity)");
  };
  refused(0, 3, NAN, "nan at position 3");
  refused(0, 2, INFINITY, "nan at position 2");
  refused(1, 450, NAN, "nan at position 0");
  refused(2, 599, NAN, "nan at position 0");
  refused(2, 0, INFINITY, "nan at position 0");
  // An ignored position is not looked at.
  Tensors ignored = inputs;
  ignored[0] = ignored[0].clone();
  ignored[0][1].fill_(NAN);
  REQUIRE(std::get<0>(run(ignored, y, {})).isfinite().item<bool>());
}

TEST_CASE("linear_cross_entropy in bfloat16 rounds the operands of its products, and probabilities",
          "[linear_cross_entropy]") {
  struct Shape {
    int64_t positions, vocabulary, width;
  };
  const auto shape = GENERATE(Shape{1, 1, 1}, Shape{5, 1, 7}, Shape{3, 2, 64}, Shape{257, 17, 33},
                              Shape{1030, 224, 64}, Shape{600, 255, 31}, Shape{600, 257, 32},
                              Shape{514, 1000, 65}, Shape{40, 9000, 16}, Shape{0, 300, 8});
  const int k = GENERATE(0, 1, 2);
  const Options options{k == 0 ? 0 : 0.1, k == 1 ? 1e-2 : 0, k == 2 ? 0 : -100,
                        std::vector<std::string>{"mean", "sum", "none"}[k], "bfloat16"};
  const Tensors inputs = parameters({shape.positions}, shape.vocabulary, shape.width, k != 1, at::kFloat);
  const at::Tensor y = targets({shape.positions}, shape.vocabulary, options, k > 0);
  if (k == 0 && shape.positions == 0) return;  // the mean of nothing
  INFO("N " << shape.positions << " V " << shape.vocabulary << " D " << shape.width << " options " << k);
  const auto results = [&](const Options& o) {
    const auto [loss, nll] = run(inputs, y, o);
    Tensors out = {loss.detach(), nll};
    Tensors leaves = inputs;
    if (!leaves[2].defined()) leaves.pop_back();
    for (auto& grad : torch::autograd::grad({loss.sum()}, leaves)) out.push_back(grad);
    return out;
  };
  Options exact = options;
  exact.precision = "float32";
  const Tensors got = results(options), plain = results(exact);
  if (kernels::table<float>().bf16_panel == 0) {
    for (size_t i = 0; i < got.size(); ++i) require_equal(got[i], plain[i]);
    return;
  }
  const Tensors want = rounded_reference(inputs, y, options);
  REQUIRE(got.size() == want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    INFO("result " << i);
    // Values differ by float32's rounding of sums alone. So do the gradients of logits before they are
    // rounded: 1e-6 of them; one in 2,000 then falls to the other side of a tie, by 2^-8 of itself. In the
    // norm that is 1e-4 or, of few gradients, 2^-8 of the one that matters. A reduced loss keeps the
    // probabilities in bfloat16: 2^-9 of each at most, 8e-4 in the norm.
    const bool keeps = options.reduction != "none";
    require_close_in_norm(got[i], want[i],
                          i < 2                                       ? 4e-6
                          : shape.positions * shape.vocabulary > 1000 ? (keeps ? 1.5e-3 : 3e-4)
                                                                      : (keeps ? 8e-3 : 4e-3));
    // Rounding costs 2^-9 of each operand, less in a sum; more where summands cancel.
    require_close_in_norm(got[i], plain[i], 3e-2);
  }
}

TEST_CASE("linear_cross_entropy in bfloat16 keeps the gradients of targets that are all but certain",
          "[linear_cross_entropy]") {
  // Operands exact in bfloat16, so that the logits are; 1 - p(y) is 1e-5 to 1e-2, where p(y) in bfloat16
  // is 1.
  constexpr int64_t kPositions = 40, kWords = 300, kWidth = 64;
  const at::Tensor weight = randn({kWords, kWidth}).sign() * 0.25,
                   y = targets({kPositions}, kWords, {}, false);
  const Tensors inputs = {(weight.index_select(0, y) * 4).requires_grad_(), weight.clone().requires_grad_(),
                          at::Tensor()};
  const auto grads = [&](const std::string& precision) {
    const at::Tensor loss = std::get<0>(run(inputs, y, {0, 0, -100, "sum", precision}));
    REQUIRE(loss.item<double>() < 0.01 * kPositions);
    return torch::autograd::grad({loss}, {inputs[0], inputs[1]});
  };
  const Tensors got = grads("bfloat16"), want = grads("float32");
  for (size_t i = 0; i < got.size(); ++i) require_close_in_norm(got[i], want[i], 1e-2);
}

TEST_CASE("linear_cross_entropy in bfloat16 is float32 for what is exact in bfloat16",
          "[linear_cross_entropy]") {
  // Logits are dyadic, so all but the gradients have the same bits; bfloat16 inputs get no other result.
  const Tensors inputs = {dyadic({300, 24}), dyadic({700, 24}, at::kFloat, 1), at::Tensor()};
  const at::Tensor y = targets({300}, 700, {});
  const Options options{0.1, 1e-3, -100, "none", "bfloat16"};
  const Options plain{0.1, 1e-3, -100, "none"};
  require_equal(std::get<0>(run(inputs, y, options)), std::get<0>(run(inputs, y, plain)));
  const Tensors small = map(inputs, [](const at::Tensor& t) { return t.to(at::kBFloat16); });
  require_equal(std::get<0>(run(small, y, options)), std::get<0>(run(inputs, y, plain)));
  const Tensors large =
      map(parameters({9}, 300, 5, true, at::kDouble), [](const at::Tensor& t) { return t; });
  const at::Tensor few = targets({9}, 300, {});
  const auto loss = [&](const Options& o) {
    return [&, o](const Tensors& t) { return std::get<0>(run(t, few, o)); };
  };
  const Tensors got = gradients(loss(options), large), want = gradients(loss(plain), large);
  for (size_t i = 0; i < got.size(); ++i) require_equal(got[i], want[i]);
}

TEST_CASE("linear_cross_entropy does not depend on the number of threads", "[linear_cross_entropy]") {
  // Several slabs; one, and rows in groups; both, and more rows than fit one chunk of groups.
  const auto [positions, vocabulary] =
      GENERATE(table<int64_t, int64_t>({{1300, 3000}, {2100, 224}, {1300, 1200}, {12000, 5}}));
  const std::string precision = GENERATE("float32", "bfloat16");
  const Tensors inputs = parameters({positions}, vocabulary, 24, true, at::kFloat);
  const Options options{0.1, 1e-3, -100, GENERATE("mean", "none"), precision};
  const at::Tensor y = targets({positions}, vocabulary, options);
  require_same_for_any_threads([&] {
    Tensors out = gradients([&](const Tensors& t) { return std::get<0>(run(t, y, options)); }, inputs);
    const auto [loss, nll] = run(inputs, y, options);
    out.push_back(loss.detach());
    out.push_back(nll);
    return out;
  });
}

TEST_CASE("linear_cross_entropy never holds the logits", "[linear_cross_entropy]") {
  constexpr int64_t kPositions = 8192, kWords = 20000, kWidth = 16, kSlabs = 32;
  const Tensors inputs = parameters({kPositions}, kWords, kWidth, true, at::kFloat);
  const at::Tensor y = targets({kPositions}, kWords, {}, /*ignore=*/false);
  const std::string reduction = GENERATE("mean", "none"), precision = GENERATE("float32", "bfloat16");
  const int64_t threads = at::get_num_threads();
  // The header's formulas, and room for what is (N) or (V).
  constexpr int64_t kSmall = 32 * (kPositions + kWords);
  const int64_t forward = 4 * (3 * kSlabs * kPositions + 256 * threads * (kWidth + 272));
  const int64_t backward = 4 * ((kSlabs + 1) * 512 * kWidth + 256 * threads * (2 * kWidth + 272));
  const int64_t grads = 4 * (kPositions + kWords + 1) * kWidth;
  const int64_t at_once = reduction == "none" ? 0 : backward + grads + 4 * (1 << 24);
  at::Tensor loss;
  {
    PeakMemory peak;
    loss = std::get<0>(run(inputs, y, {0, 0, -100, reduction, precision}));
    REQUIRE(peak.bytes() > 0);
    REQUIRE(peak.bytes() < forward + at_once + kSmall);
  }
  {
    const at::Tensor sum = loss.sum();
    PeakMemory peak;
    sum.backward();
    REQUIRE(peak.bytes() < (reduction == "none" ? backward + grads : 0) + kSmall);
  }
  REQUIRE(forward + backward + grads + at_once < kPositions * kWords * 4 / 7);
}

TEST_CASE("linear_cross_entropy in two threads of the caller at once", "[linear_cross_entropy]") {
  const std::string precision = GENERATE("float32", "bfloat16");
  const Tensors inputs = parameters({300}, 5000, 8, true, at::kFloat);
  const at::Tensor y = targets({300}, 5000, {});
  const auto grads = [&] {
    return torch::autograd::grad({std::get<0>(run(inputs, y, {0, 0, -100, "mean", precision}))}, inputs);
  };
  const Tensors want = grads();
  std::vector<std::future<Tensors>> calls;
  for (int i = 0; i < 8; ++i) calls.push_back(std::async(std::launch::async, grads));
  for (auto& call : calls) {
    const Tensors got = call.get();
    for (size_t i = 0; i < want.size(); ++i) require_equal(got[i], want[i]);
  }
}

TEST_CASE("linear_cross_entropy: a loss that is used twice, scaled or not", "[linear_cross_entropy]") {
  const auto dtype = GENERATE(at::kFloat, at::kBFloat16);
  const Tensors inputs = parameters({20}, 300, 8, true, dtype);
  const at::Tensor y = targets({20}, 300, {}), loss = std::get<0>(run(inputs, y, {}));
  const auto grads = [&](double factor) {
    return torch::autograd::grad({loss}, inputs, {at::full({}, factor)}, /*retain_graph=*/true);
  };
  const Tensors one = grads(1), scaled = grads(-0.5), again = grads(1);
  for (size_t i = 0; i < 3; ++i) {
    REQUIRE(one[i].scalar_type() == dtype);
    require_equal(scaled[i], one[i] * -0.5);
    require_equal(again[i], one[i]);
  }
}

TEST_CASE("linear_cross_entropy refuses wrong arguments in words", "[linear_cross_entropy]") {
  const at::Tensor h = randn({3, 4}), weight = randn({6, 4}), bias = randn({6});
  const at::Tensor y = at::tensor(std::vector<int64_t>{0, 5, 2});
  const auto fails = [](const Tensors& t, const at::Tensor& target, const Options& options,
                        const std::string& words) {
    require_error([&] { run(t, target, options); }, "linear_cross_entropy: " + words);
  };
  fails({h.to(at::kInt), weight, bias}, y, {}, "h must be float32, bfloat16 or float64, got Int");
  fails({h, weight.to(at::kDouble), bias}, y, {}, "weight must have h's dtype Float, got Double");
  fails({h, weight, bias.to(at::kDouble)}, y, {}, "bias must have h's dtype Float, got Double");
  fails({at::scalar_tensor(1.0), weight, bias}, y, {}, "h must have at least 1 dimension, got 0");
  fails({h, weight[0], bias}, y, {}, "weight must have 2 dimensions, got 1");
  fails({h, randn({6, 5}), bias}, y, {}, "weight's last dimension must be 4, got 5");
  fails({h, randn({0, 4}), bias}, y, {}, "weight must have at least 1 row, got 0");
  fails({h, weight, randn({6, 1})}, y, {}, "bias must have 1 dimension, got 2");
  fails({h, weight, randn({7})}, y, {}, "bias's size must be 6, got 7");
  fails({h, weight, bias}, y.to(at::kInt), {}, "target must be int64, got Int");
  fails({h, weight, bias}, y.slice(0, 1), {}, "target's shape must be h's leading dimensions [3], got [2]");
  fails({h, weight, bias}, y.unsqueeze(0), {},
        "target's shape must be h's leading dimensions [3], got [1, 3]");
  fails({h, weight, bias}, y + 1, {},
        "target must be in [0, V) = [0, 6) or ignore_index -100, got 6 at position 1");
  fails({h, weight, bias}, y - 1, {-0.0, 0, -7},
        "target must be in [0, V) = [0, 6) or ignore_index -7, got -1 at position 0");
  fails({h, weight, bias}, y, {-0.1}, "label_smoothing must be in [0, 1), got -0.1");
  fails({h, weight, bias}, y, {1}, "label_smoothing must be in [0, 1), got 1");
  fails({h, weight, bias}, y, {0, -1}, "z_loss must be >= 0, got -1");
  fails({h, weight, bias}, y, {0, 0, -100, "avg"}, "reduction must be mean, sum or none, got 'avg'");
  fails({h, weight, bias}, y, {0, 0, -100, "mean", "fp8"},
        "precision must be float32 or bfloat16, got 'fp8'");
}

TEST_CASE("linear_cross_entropy refuses double backward in words", "[linear_cross_entropy]") {
  const auto [reduction, op] = GENERATE(table<std::string, std::string>(
      {{"mean", "_scale_gradient"}, {"none", "_linear_cross_entropy_backward"}}));
  const Tensors inputs = parameters({3}, 6, 4, true, at::kFloat);
  const at::Tensor y = targets({3}, 6, {}, false);
  const at::Tensor loss = std::get<0>(run(inputs, y, {0, 0, -100, reduction})).sum();
  for (const at::Tensor& root : {loss, loss.square()}) {
    const at::Tensor g = torch::autograd::grad({root}, {inputs[0]}, {}, true, true)[0];
    require_error([&] { g.sum().backward(); }, "derivative for flashlm::" + op + " is not implemented");
  }
}
