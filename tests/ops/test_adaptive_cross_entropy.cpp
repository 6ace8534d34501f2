// SPDX-License-Identifier: Apache-2.0
#include "ops/adaptive_cross_entropy.h"
#include "tests/ops/check.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

/// torch's module and its parameters in the operators' order.
struct Peer {
  Peer(int64_t width, int64_t vocabulary, const std::vector<int64_t>& cutoffs, double div_value,
       bool head_bias)
      : module(torch::nn::AdaptiveLogSoftmaxWithLossOptions(width, vocabulary, cutoffs)
                   .div_value(div_value)
                   .head_bias(head_bias)) {
    module->to(at::kDouble);
    uint64_t seed = 1;
    for (at::Tensor& p : module->parameters()) {
      p.set_data(randn(p.sizes(), at::kDouble, seed++) / std::sqrt(static_cast<double>(p.size(-1))));
    }
    for (size_t i = 0; i < cutoffs.size(); ++i) {
      const auto names = module->named_parameters();
      const std::string tail = "tail." + std::to_string(i);
      projections.push_back(names[tail + ".0.weight"]);
      weights.push_back(names[tail + ".1.weight"]);
    }
    if (head_bias) bias = module->head->bias;
  }

  Tensors parameters() const {
    Tensors all = {module->head->weight};
    if (bias) all.push_back(*bias);
    all.insert(all.end(), projections.begin(), projections.end());
    all.insert(all.end(), weights.begin(), weights.end());
    return all;
  }

  torch::nn::AdaptiveLogSoftmaxWithLoss module;
  std::optional<at::Tensor> bias;
  Tensors projections, weights;
};

at::Tensor words(at::IntArrayRef shape, int64_t vocabulary) {
  return torch::randint(vocabulary, shape, at::make_generator<at::CPUGeneratorImpl>(5),
                        at::TensorOptions(at::kLong));
}

}  // namespace

TEST_CASE("adaptive_cross_entropy equals torch's AdaptiveLogSoftmaxWithLoss", "[adaptive]") {
  const bool head_bias = GENERATE(true, false);
  const double div_value = GENERATE(4.0, 2.0);
  const std::vector<int64_t> cutoffs =
      GENERATE(std::vector<int64_t>{10, 40}, std::vector<int64_t>{3}, std::vector<int64_t>{1, 2, 60});
  constexpr int64_t kWords = 100, kWidth = 64;
  Peer peer(kWidth, kWords, cutoffs, div_value, head_bias);
  Tensors leaves = peer.parameters();
  const at::Tensor h = randn({37, kWidth}, at::kDouble, 50).requires_grad_(), y = words({37}, kWords);
  leaves.push_back(h);

  const at::Tensor theirs = -peer.module->log_prob(h).gather(1, y.unsqueeze(1)).mean();
  REQUIRE(std::abs(peer.module(h, y).loss - theirs.item<double>()) < 1e-12);
  auto [loss, nll] =
      adaptive_cross_entropy(h, peer.module->head->weight, peer.bias, peer.projections, peer.weights, y);
  require_close(loss, theirs, 1e-13);
  require_close(nll, theirs, 1e-13);
  REQUIRE_FALSE(nll.requires_grad());
  const Tensors want = torch::autograd::grad({theirs}, leaves), got = torch::autograd::grad({loss}, leaves);
  for (size_t i = 0; i < leaves.size(); ++i) {
    INFO("gradient " << i);
    require_close(got[i], want[i], 1e-11);
  }

  const at::Tensor log_p =
      adaptive_log_prob(h, peer.module->head->weight, peer.bias, peer.projections, peer.weights);
  require_close(log_p, peer.module->log_prob(h), 1e-12);
  require_close(-log_p.gather(1, y.unsqueeze(1)).mean(), loss, 1e-13);
}

TEST_CASE("adaptive_cross_entropy: reductions, smoothing and positions left out", "[adaptive]") {
  const Peer peer(8, 30, {5, 12}, 2, true);
  const at::Tensor h = randn({2, 9, 8}, at::kDouble, 50);
  at::Tensor y = words({2, 9}, 30);
  y[0][3] = y[1][0] = 6;  // a word of the first tail, and the number of its entry in the head
  const auto run = [&](double label_smoothing, double z_loss, const std::string& reduction, int64_t ignore) {
    return adaptive_cross_entropy(h, peer.module->head->weight, peer.bias, peer.projections, peer.weights, y,
                                  label_smoothing, z_loss, ignore, reduction);
  };
  const auto [all_loss, all_nll] = run(0.1, 0.01, "none", -100);
  require_close(all_nll,
                -adaptive_log_prob(h, peer.module->head->weight, peer.bias, peer.projections, peer.weights)
                     .gather(2, y.unsqueeze(2))
                     .squeeze(2),
                1e-13);
  REQUIRE((all_loss != all_nll).all().item<bool>());
  const at::Tensor kept = y != 6;
  const auto [loss, nll] = run(0.1, 0.01, "none", 6);
  require_equal(loss, all_loss * kept);
  require_equal(nll, all_nll * kept);
  require_close(std::get<0>(run(0.1, 0.01, "sum", 6)), loss.sum(), 1e-14);
  require_close(std::get<0>(run(0.1, 0.01, "mean", 6)), loss.sum() / kept.sum(), 1e-14);
  require_close(std::get<1>(run(0.1, 0.01, "mean", 6)), nll.sum() / kept.sum(), 1e-14);
}

TEST_CASE("adaptive_log_prob sums to one", "[adaptive]") {
  const Peer peer(16, 200, {5, 50}, 4, false);
  const double spread = GENERATE(1.0, 1000.0);
  const auto in_float = [](const Tensors& in) {
    Tensors out;
    for (const at::Tensor& t : in) out.push_back(t.detach().to(at::kFloat));
    return out;
  };
  const at::Tensor log_p =
      adaptive_log_prob(randn({3, 16}) * spread, peer.module->head->weight.detach().to(at::kFloat),
                        std::nullopt, in_float(peer.projections), in_float(peer.weights));
  require_close(log_p.exp().sum(-1), at::ones({3}), 1e-5);
}

TEST_CASE("adaptive_cross_entropy refuses wrong arguments in words", "[adaptive]") {
  const at::Tensor h = randn({3, 4}), head = randn({5, 4}), y = at::tensor(std::vector<int64_t>{0, 8, 2});
  const Tensors projections = {randn({2, 4}), randn({1, 4})}, weights = {randn({4, 2}), randn({2, 1})};
  const auto fails = [&](const std::string& what, const at::Tensor& head_weight, const Tensors& p,
                         const Tensors& w, const at::Tensor& target) {
    require_error([&] { adaptive_cross_entropy(h, head_weight, std::nullopt, p, w, target); },
                  "adaptive_cross_entropy: " + what);
  };
  fails("tail_weights must have at least 1 tensor, got 0", head, {}, {}, y);
  fails("tail_projections must be as many as tail_weights, 2, got 1", head, {projections[0]}, weights, y);
  fails("head_weight must have more rows than there are tails, 2, got 2", randn({2, 4}), projections, weights,
        y);
  fails("head_weight's last dimension must be 4, got 3", randn({5, 3}), projections, weights, y);
  fails("tail_projections[1]'s last dimension must be 4, got 3", head, {projections[0], randn({1, 3})},
        weights, y);
  fails("tail_weights[0]'s last dimension must be 2, got 3", head, projections, {randn({4, 3}), weights[1]},
        y);
  fails("tail_weights[1] must have h's dtype Float, got Double", head, projections,
        {weights[0], weights[1].to(at::kDouble)}, y);
  fails("target must be in [0, V) = [0, 9) or ignore_index -100, got 9 at position 1", head, projections,
        weights, y + 1);
  fails("target must be int64, got Int", head, projections, weights, y.to(at::kInt));
}
