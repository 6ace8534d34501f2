// SPDX-License-Identifier: Apache-2.0
// Optimizers, their grouping and state, and the moving average.
#include <torch/torch.h>
#undef CHECK
#include <catch2/catch.hpp>
#include <sstream>

#include "data/error.h"
#include "tests/goldens.h"
#include "train/adamw.h"
#include "train/ema.h"
#include "train/normuon.h"
#include "train/optimizers.h"

using namespace flashlm;

namespace {

double max_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.detach().to(at::kDouble) - b.detach().to(at::kDouble)).abs().max().item<double>();
}

/// Same shape, same bits.
bool identical(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.detach().equal(b.detach());
}

at::Tensor parameter(at::IntArrayRef shape) { return at::randn(shape).requires_grad_(); }

void set_grad(const at::Tensor& tensor, const at::Tensor& grad) { tensor.mutable_grad() = grad; }

/// A copy as a checkpoint makes it.
TensorMap clone(const TensorMap& tensors) {
  TensorMap copy;
  for (const auto& [name, tensor] : tensors) copy[name] = tensor.clone();
  return copy;
}

NamedParameters clone(const NamedParameters& parameters) {
  NamedParameters copy;
  for (const auto& [name, tensor] : parameters) {
    copy.emplace_back(name, tensor.detach().clone().requires_grad_(tensor.requires_grad()));
  }
  return copy;
}

template <typename Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

/// The names and shapes of FlashLM v3, in the order of its state dict, the tied table under both names.
NamedParameters v3_parameters(int64_t vocabulary) {
  NamedParameters parameters;
  const auto add = [&](const std::string& name, at::IntArrayRef shape) {
    parameters.emplace_back(name, at::zeros(shape).requires_grad_());
  };
  add("embedding.weight", {vocabulary, 256});
  for (const char* i : {"0", "1", "2"}) {
    add(std::string("block.mixer.norms.") + i + ".scale", {256});
    add(std::string("block.mixer.gates.") + i + ".weight", {256, 16, 4});
    add(std::string("block.mixer.values.") + i + ".weight", {256, 16, 4});
  }
  add("block.mixer.out_proj.weight", {256, 256});
  add("block.norm1.scale", {256});
  add("block.norm2.scale", {256});
  add("block.glu.gate_proj.weight", {683, 256});
  add("block.glu.up_proj.weight", {683, 256});
  add("block.glu.down_proj.weight", {256, 683});
  add("block.router.linear.weight", {1, 256});
  add("block.router.linear.bias", {1});
  add("final_norm.scale", {256});
  parameters.emplace_back("lm_head.weight", parameters[0].second);
  return parameters;
}

/// One small parameter of each group.
NamedParameters small_parameters() {
  return {{"embedding.weight", parameter({11, 4})},
          {"conv.weight", parameter({4, 2, 3})},
          {"glu.up.weight", parameter({5, 4})},
          {"norm.scale", parameter({4})}};
}

/// Steps first..last-1 with gradients that depend on the step alone.
void train(Optimizers& optimizers, const NamedParameters& parameters, int first, int last) {
  for (int step = first; step < last; ++step) {
    at::manual_seed(step);
    for (const auto& [name, tensor] : parameters) set_grad(tensor, at::randn_like(tensor));
    optimizers.set_lr_scale(1.0 / (1 + step));
    optimizers.step();
  }
}

}  // namespace

TEST_CASE("clip_gradients clips as torch does", "[clip]") {
  const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
  for (const double max_norm : {0.5, 30.0, infinity}) {
    for (const double value : {1.0, infinity, nan}) {
      INFO("max_norm " << max_norm << " value " << value);
      torch::manual_seed(5);
      std::vector<at::Tensor> ours, theirs;
      for (int64_t size : {1, 7, 300}) {
        const at::Tensor gradient = torch::randn({size, 2});
        gradient[0][1] = value;
        for (auto* all : {&ours, &theirs}) {
          all->push_back(parameter({size, 2}));
          set_grad(all->back(), gradient.clone());
        }
      }
      for (auto* all : {&ours, &theirs}) all->push_back(parameter({3}));  // without a gradient
      const double got = clip_gradients(ours, max_norm);
      const double want = torch::nn::utils::clip_grad_norm_(theirs, max_norm);
      REQUIRE((got == want || std::abs(got / want - 1) < 1e-6 || (std::isnan(got) && std::isnan(want))));
      for (size_t i = 0; i < 3; ++i) {
        REQUIRE(at::allclose(ours[i].grad(), theirs[i].grad(), 1e-6, 0, /*equal_nan=*/true));
      }
      REQUIRE_FALSE(ours[3].grad().defined());
    }
  }
  REQUIRE(clip_gradients({parameter({3})}, 1) == 0);
}

TEST_CASE("clip_gradients adds up a large table's gradient without loss", "[clip]") {
  torch::manual_seed(6);
  const at::Tensor table = parameter({20000, 256}), gradient = torch::rand({20000, 256});
  set_grad(table, gradient);
  const double want = gradient.to(at::kDouble).norm().item<double>();
  REQUIRE(clip_gradients({table}, 1e9) == Approx(want).epsilon(1e-6));
}

TEST_CASE("newton_schulz brings singular values near one and keeps directions", "[normuon]") {
  at::manual_seed(1);
  const auto [rows, columns] = GENERATE(table<int, int>({{24, 24}, {12, 40}, {40, 12}, {1, 9}, {9, 1}}));
  const at::Tensor g = at::randn({rows, columns}, at::kDouble);
  const auto [u, s, vt] = at::linalg_svd(g, /*full_matrices=*/false);
  at::Tensor expected = s / s.norm();
  for (int i = 0; i < 5; ++i) {
    expected = 3.4445 * expected - 4.7750 * expected.pow(3) + 2.0315 * expected.pow(5);
  }
  const at::Tensor o = newton_schulz(g, 5);
  CHECK(o.sizes() == g.sizes());
  CHECK(max_difference(o, u.mm(at::diag(expected)).mm(vt)) < 1e-5);  // 1e-7 is added to the norm
  CHECK(max_difference(newton_schulz(1000 * g, 5), o) < 1e-5);
  CHECK(newton_schulz(at::zeros_like(g), 5).eq(0).all().item<bool>());
}

TEST_CASE("newton_schulz in bfloat16 keeps the singular values' range and the direction", "[normuon]") {
  at::manual_seed(10);
  const auto [rows, columns] = GENERATE(table<int, int>({{683, 256}, {256, 683}, {256, 256}, {1, 9}}));
  const at::Tensor g = at::randn({rows, columns});
  const at::Tensor exact = newton_schulz(g, 5), rounded = newton_schulz(g, 5, /*bfloat16=*/true);
  CHECK(rounded.scalar_type() == at::kFloat);
  CHECK(rounded.sizes() == g.sizes());
  CHECK_FALSE(identical(rounded, exact));
  const auto relative = (rounded - exact).norm() / exact.norm();
  CHECK(relative.item<double>() < 0.02);
  CHECK(max_difference(at::linalg_svdvals(rounded), at::linalg_svdvals(exact)) < 0.02);
  CHECK(newton_schulz(at::zeros_like(g), 5, true).eq(0).all().item<bool>());
}

TEST_CASE("NorMuon follows its Python twin over 100 steps", "[normuon]") {
  const auto golden = flashlm::testing::load_golden(NORMUON_GOLDEN);
  const std::string name = GENERATE("row", "column", "wide", "tall", "decayed");
  const auto tensor = [&](const std::string& what) { return golden.at(name + "." + what); };
  const auto option = [&](int i) { return tensor("options")[i].item<double>(); };
  const auto options =
      NorMuonOptions(option(0)).beta1(option(1)).beta2(option(2)).weight_decay(option(3)).eps(option(4));
  at::Tensor weight = tensor("weight_0").clone().requires_grad_();
  NorMuon optimizer({weight}, options);
  int compared = 0;
  for (int step = 1; step <= 100; ++step) {
    set_grad(weight, tensor("grads")[step - 1]);
    optimizer.step();
    const auto expected = golden.find(name + ".weight_" + std::to_string(step));
    if (expected == golden.end()) continue;
    INFO(name << ", step " << step);
    CHECK(max_difference(weight, expected->second) < 1e-7 * (1 + step));
    ++compared;
  }
  CHECK(compared == 4);
}

TEST_CASE("normuon_update is pure, and its RMS is 0.2 lr for any gradient", "[normuon]") {
  at::manual_seed(2);
  const double size = GENERATE(1e-6, 1.0, 1e6);
  const at::Tensor grad = size * at::randn({7, 12}), momentum = size * at::randn({7, 12});
  const at::Tensor second_moment = at::rand({7, 1});
  const at::Tensor before[] = {grad.clone(), momentum.clone(), second_moment.clone()};
  const NorMuonUpdate next = normuon_update(grad, momentum, second_moment, NorMuonOptions(0.5));
  CHECK(next.update.square().mean().sqrt().item<double>() == Approx(0.1).epsilon(1e-5));
  CHECK(next.update.sizes() == grad.sizes());
  CHECK(next.second_moment.sizes() == second_moment.sizes());
  CHECK(identical(grad, before[0]));
  CHECK(identical(momentum, before[1]));
  CHECK(identical(second_moment, before[2]));

  const at::Tensor zero = at::zeros({7, 12});
  CHECK(normuon_update(zero, zero, at::zeros({7, 1}), NorMuonOptions()).update.eq(0).all().item<bool>());
}

TEST_CASE("NorMuon in bfloat16 steps as far as in float32, in nearly the same direction", "[normuon]") {
  at::manual_seed(12);
  const at::Tensor grad = at::randn({96, 40}), momentum = at::zeros({96, 40}),
                   second_moment = at::zeros({96, 1});
  const auto update = [&](bool bfloat16) {
    return normuon_update(grad, momentum, second_moment, NorMuonOptions(0.5).bfloat16(bfloat16)).update;
  };
  const at::Tensor exact = update(false), rounded = update(true);
  CHECK(rounded.square().mean().sqrt().item<double>() == Approx(0.1).epsilon(1e-5));
  CHECK_FALSE(identical(rounded, exact));
  CHECK((rounded - exact).norm().item<double>() < 0.03 * exact.norm().item<double>());
}

TEST_CASE("NorMuon is a torch optimizer", "[normuon]") {
  at::manual_seed(3);
  const at::Tensor a = parameter({3, 4}), frozen = parameter({2, 2});
  const at::Tensor frozen_before = frozen.detach().clone();
  NorMuon optimizer({a, frozen}, NorMuonOptions(0.1).weight_decay(0.5));
  const at::Tensor target = at::randn({3, 4});
  const auto closure = [&] {
    optimizer.zero_grad();
    const at::Tensor loss = (a - target).square().sum();
    loss.backward();
    return loss;
  };
  const auto version = a._version();
  const double first = optimizer.step(closure).item<double>();
  CHECK(a._version() > version);
  for (int i = 0; i < 20; ++i) optimizer.step(closure);
  CHECK(closure().item<double>() < 0.5 * first);
  CHECK(identical(frozen, frozen_before));
  CHECK(optimizer.state_of(frozen).empty());
  CHECK(optimizer.state_of(a).at("second_moment").sizes() == at::IntArrayRef{3, 1});
}

TEST_CASE("optimizers refuse wrong settings and parameters", "[normuon][adamw]") {
  const auto normuon = [](NorMuonOptions options) {
    return message_of([&] { NorMuon({parameter({2, 2})}, options); });
  };
  CHECK(normuon(NorMuonOptions(-1)) == "NorMuon: lr must be >= 0, got -1");
  CHECK(normuon(NorMuonOptions().beta1(1)) == "NorMuon: beta1 must be in [0, 1), got 1");
  CHECK(normuon(NorMuonOptions().beta2(-0.5)) == "NorMuon: beta2 must be in [0, 1), got -0.5");
  CHECK(normuon(NorMuonOptions().weight_decay(-1)) == "NorMuon: weight_decay must be >= 0, got -1");
  CHECK(normuon(NorMuonOptions().eps(0)) == "NorMuon: eps must be > 0, got 0");
  CHECK(normuon(NorMuonOptions().steps(0)) == "NorMuon: steps must be >= 1, got 0");
  CHECK(message_of([] {
          NorMuon({parameter({2, 3, 4})});
        }) ==
        "NorMuon: parameters must have 2 dimensions, got one of shape [2, 3, 4]; give it to FusedAdamW");
  const auto adamw = [](FusedAdamWOptions options) {
    return message_of([&] { FusedAdamW({parameter({2})}, options); });
  };
  CHECK(adamw(FusedAdamWOptions(-1)) == "FusedAdamW: lr must be >= 0, got -1");
  CHECK(adamw(FusedAdamWOptions().beta1(-1)) == "FusedAdamW: beta1 must be in [0, 1), got -1");
  CHECK(adamw(FusedAdamWOptions().beta2(1.5)) == "FusedAdamW: beta2 must be in [0, 1), got 1.5");
  CHECK(adamw(FusedAdamWOptions().eps(-1)) == "FusedAdamW: eps must be >= 0, got -1");
  CHECK(adamw(FusedAdamWOptions().weight_decay(-1)) == "FusedAdamW: weight_decay must be >= 0, got -1");
  CHECK(adamw(FusedAdamWOptions().beta2(0).lazy(true)) == "FusedAdamW: beta2 must be > 0 if lazy, got 0");
  CHECK(message_of([] {
          FusedAdamW({at::zeros({2, 3}).t()});
        }) == "FusedAdamW: parameters must be contiguous, got one with sizes [3, 2] and strides [1, 3]");
  CHECK(message_of([] { newton_schulz(at::zeros({3}), 5); }) ==
        "newton_schulz: g must have 2 dimensions, got 1");
}

TEST_CASE("FusedAdamW equals torch's AdamW over 20 steps", "[adamw]") {
  at::manual_seed(4);
  const at::Tensor ours[] = {parameter({33, 7}), parameter({5}), parameter({4, 2, 3})};
  std::vector<at::Tensor> theirs;
  for (const at::Tensor& tensor : ours) theirs.push_back(tensor.detach().clone().requires_grad_());
  // The second group has settings of its own.
  using torch::optim::OptimizerParamGroup;
  std::vector<OptimizerParamGroup> our_groups, their_groups;
  our_groups.emplace_back(std::vector<at::Tensor>{ours[0], ours[2]});
  our_groups.emplace_back(std::vector<at::Tensor>{ours[1]},
                          std::make_unique<FusedAdamWOptions>(FusedAdamWOptions(0.02).weight_decay(0)));
  their_groups.emplace_back(std::vector<at::Tensor>{theirs[0], theirs[2]});
  their_groups.emplace_back(std::vector<at::Tensor>{theirs[1]},
                            std::make_unique<torch::optim::AdamWOptions>(
                                torch::optim::AdamWOptions(0.02).betas({0.9, 0.95}).weight_decay(0)));
  FusedAdamW fused(our_groups, FusedAdamWOptions(0.01));
  torch::optim::AdamW reference(their_groups,
                                torch::optim::AdamWOptions(0.01).betas({0.9, 0.95}).weight_decay(0.1));
  const auto version = ours[0]._version();
  for (int step = 0; step < 20; ++step) {
    for (int i = 0; i < 3; ++i) {
      // The last parameter is frozen at first: its own step count starts with its first gradient.
      if (i == 2 && step < 5) continue;
      const at::Tensor grad = at::randn_like(ours[i]) * (1 + step);
      set_grad(ours[i],
               grad.transpose(0, -1).contiguous().transpose(0, -1));  // another layout, the same values
      set_grad(theirs[i], grad);
    }
    fused.step();
    reference.step();
    for (int i = 0; i < 3; ++i) CHECK(max_difference(ours[i], theirs[i]) < 1e-6);
  }
  CHECK(ours[0]._version() > version);
  CHECK(fused.state_of(ours[2]).at("step").item<float>() == 15);
}

TEST_CASE("lazy FusedAdamW puts rows without a gradient off, and catches up", "[adamw]") {
  at::manual_seed(11);
  const at::Tensor dense = parameter({200, 3}), lazy = dense.detach().clone().requires_grad_();
  FusedAdamW first({dense}, FusedAdamWOptions(0.01)), second({lazy}, FusedAdamWOptions(0.01).lazy(true));
  second.catch_up();  // nothing to do yet
  for (int step = 1; step <= 40; ++step) {
    at::Tensor grad = at::randn({200, 3});
    for (int row = 0; row < 200; ++row) {
      if ((row + step) % 11 != 0) grad[row].zero_();
    }
    set_grad(dense, grad);
    set_grad(lazy, grad);
    first.step();
    second.step();
  }
  CHECK(max_difference(dense, lazy) > 1e-3);
  second.catch_up();
  CHECK(max_difference(dense, lazy) < 1e-5);
  CHECK(second.state_of(lazy).at("last_step").eq(40).all().item<bool>());
}

TEST_CASE("optimizers can be saved by torch::save", "[normuon][adamw]") {
  at::manual_seed(5);
  const auto check = [](auto make_optimizer) {
    const at::Tensor a = parameter({3, 4});
    auto first = make_optimizer(a, 0.01);
    const at::Tensor grads = at::randn({6, 3, 4});
    for (int i = 0; i < 3; ++i) set_grad(a, grads[i]), first->step();
    std::stringstream file;
    torch::save(*first, file);
    const at::Tensor b = a.detach().clone().requires_grad_();
    auto second = make_optimizer(b, 0.5);  // its lr is replaced by the saved one
    torch::load(*second, file);
    for (int i = 3; i < 6; ++i) {
      set_grad(a, grads[i]), first->step();
      set_grad(b, grads[i]), second->step();
    }
    CHECK(identical(a, b));
  };
  check([](const at::Tensor& p, double lr) {
    return std::make_unique<NorMuon>(std::vector{p}, NorMuonOptions(lr));
  });
  for (const bool lazy : {false, true}) {
    check([lazy](const at::Tensor& p, double lr) {
      return std::make_unique<FusedAdamW>(std::vector{p}, FusedAdamWOptions(lr).lazy(lazy));
    });
  }
}

TEST_CASE("parameters are grouped as in v3", "[optimizers]") {
  const NamedParameters parameters = v3_parameters(50257);
  const Optimizers optimizers(parameters, {});
  const auto& groups = optimizers.groups();
  REQUIRE(groups.size() == 4);
  CHECK(groups[0].name == "matrices");
  CHECK(groups[0].optimizer == "NorMuon");
  CHECK(groups[0].elements() == 590336);
  CHECK(groups[0].parameters.size() == 5);
  CHECK(groups[1].elements() + groups[2].elements() == 12964096);
  CHECK(groups[1].parameters.size() + groups[2].parameters.size() == 7);
  CHECK(groups[1].parameters[0].first == "embedding.weight");
  CHECK(groups[1].weight_decay == 0.1);
  CHECK(groups[2].weight_decay == 0.1);
  CHECK(groups[3].elements() == 1537);
  CHECK(groups[3].parameters.size() == 7);
  CHECK(groups[3].weight_decay == 0);
  CHECK(optimizers.summary() ==
        "matrices  NorMuon  lr 0.02     decay 0          590,336 parameters in 5 tensors\n"
        "tables    AdamW    lr 0.0003   decay 0.1     12,865,792 parameters in 1 tensors\n"
        "kernels   AdamW    lr 0.0003   decay 0.1         98,304 parameters in 6 tensors\n"
        "vectors   AdamW    lr 0.0003   decay 0            1,537 parameters in 7 tensors\n");
}

TEST_CASE("the configuration chooses optimizers and rates", "[optimizers]") {
  OptimizerConfig config;
  config.matrix_optimizer = "adamw";
  config.embedding_lr = 0.003;
  const NamedParameters parameters = small_parameters();
  const Optimizers optimizers(parameters, config);
  CHECK(optimizers.groups()[0].optimizer == "AdamW");
  CHECK(optimizers.groups()[0].lr == 3e-4);
  CHECK(optimizers.groups()[0].weight_decay == 0.1);
  CHECK(optimizers.groups()[1].name == "tables");
  CHECK(optimizers.groups()[1].lr == 0.003);
  CHECK(Optimizers({{"norm.scale", parameter({4})}}, {}).groups().size() == 1);
  config.matrix_optimizer = "muon";
  CHECK(message_of([&] { Optimizers(parameters, config); }) ==
        "matrix_optimizer must be \"normuon\" or \"adamw\", got \"muon\"");
  config.matrix_optimizer = "normuon";
  config.newton_schulz = "float16";
  CHECK(message_of([&] { Optimizers(parameters, config); }) ==
        "newton_schulz must be \"auto\", \"float32\" or \"bfloat16\", got \"float16\"");
}

TEST_CASE("each group steps at its own rate, scaled, and frozen parameters rest", "[optimizers]") {
  at::manual_seed(6);
  const NamedParameters parameters = small_parameters();
  const NamedParameters before = clone(parameters);
  OptimizerConfig config;
  config.weight_decay = 0;
  config.embedding_lr = 0.003;
  Optimizers optimizers(parameters, config);
  for (const auto& [name, tensor] : parameters) {
    if (name != "conv.weight") set_grad(tensor, at::ones_like(tensor));
  }
  optimizers.set_lr_scale(0.5);
  optimizers.step();
  // AdamW's first step is lr in size for each element; NorMuon's RMS is 0.2 lr.
  const auto change = [&](int i) { return (before[i].second - parameters[i].second).detach(); };
  CHECK(max_difference(change(0), at::full({11, 4}, 0.0015)) < 1e-6);
  CHECK(change(1).eq(0).all().item<bool>());
  CHECK(change(2).square().mean().sqrt().item<double>() == Approx(0.002).epsilon(1e-3));
  CHECK(max_difference(change(3), at::full({4}, 0.00015)) < 1e-6);

  optimizers.zero_grad();
  for (const auto& [name, tensor] : parameters) CHECK_FALSE(tensor.grad().defined());
  const NamedParameters after = clone(parameters);
  optimizers.step();
  for (size_t i = 0; i < parameters.size(); ++i) CHECK(identical(parameters[i].second, after[i].second));
}

TEST_CASE("saved state continues bit for bit", "[optimizers]") {
  at::manual_seed(7);
  const NamedParameters unbroken = small_parameters();
  Optimizers first(unbroken, {});
  train(first, unbroken, 0, 5);
  const TensorMap saved = clone(first.state());
  const NamedParameters resumed = clone(unbroken);
  train(first, unbroken, 5, 10);

  Optimizers second(resumed, {});
  second.load_state(saved);
  train(second, resumed, 5, 10);
  for (size_t i = 0; i < resumed.size(); ++i) CHECK(identical(resumed[i].second, unbroken[i].second));
  CHECK(saved.size() == 2 + 3 * 3);
  CHECK(saved.contains("optimizer.glu.up.weight.momentum"));
  CHECK(saved.at("optimizer.norm.scale.step").item<float>() == 5);
  CHECK(second.state().at("optimizer.norm.scale.step").item<float>() == 10);
}

TEST_CASE("saved state of a lazy table continues bit for bit, rows that wait included", "[optimizers]") {
  at::manual_seed(13);
  const auto step = [](Optimizers& optimizers, const NamedParameters& parameters, int first, int last) {
    for (int i = first; i < last; ++i) {
      at::manual_seed(i);
      at::Tensor grad = at::randn({300, 4});
      for (int row = 0; row < 300; ++row) {
        if ((row + i) % 7 != 0) grad[row].zero_();
      }
      set_grad(parameters[0].second, grad);
      optimizers.step();
    }
  };
  OptimizerConfig config;
  config.lazy_embedding = true;
  const NamedParameters unbroken = {{"embedding.weight", parameter({300, 4})}};
  Optimizers first(unbroken, config);
  step(first, unbroken, 0, 20);
  const TensorMap saved = clone(first.state());
  CHECK(saved.size() == 5);
  const NamedParameters resumed = clone(unbroken);
  Optimizers second(resumed, config);
  second.load_state(saved);
  step(first, unbroken, 20, 30);
  step(second, resumed, 20, 30);
  CHECK(identical(resumed[0].second, unbroken[0].second));
  first.catch_up();
  second.catch_up();
  CHECK(identical(resumed[0].second, unbroken[0].second));

  Optimizers dense(resumed, {});
  CHECK(message_of([&] { dense.load_state(saved); }) ==
        "optimizer state of embedding.weight, for AdamW: it was saved by a lazy one, which put rows off");
}

TEST_CASE("state that does not fit is refused", "[optimizers]") {
  at::manual_seed(8);
  const NamedParameters parameters = small_parameters();
  Optimizers optimizers(parameters, {});
  train(optimizers, parameters, 0, 1);
  TensorMap saved = clone(optimizers.state());
  saved["model.weight"] = at::zeros({1});  // other parts of a checkpoint are not looked at
  const auto error = [&] { return message_of([&] { optimizers.load_state(saved); }); };
  CHECK(error() == "");
  SECTION("another model's") {
    saved["optimizer.old.weight.momentum"] = at::zeros({1});
    CHECK(error() == "optimizer state \"optimizer.old.weight\" belongs to no parameter of this model");
  }
  SECTION("shape") {
    saved["optimizer.glu.up.weight.second_moment"] = at::zeros({4, 1});
    CHECK(error() ==
          "optimizer state of glu.up.weight, for NorMuon: \"second_moment\" must be Float [5, 1], got Float "
          "[4, 1]");
  }
  SECTION("dtype") {
    saved["optimizer.norm.scale.exp_avg"] = at::zeros({4}, at::kDouble);
    CHECK(error() ==
          "optimizer state of norm.scale, for AdamW: \"exp_avg\" must be Float [4], got Double [4]");
  }
  SECTION("another optimizer's") {
    OptimizerConfig config;
    config.matrix_optimizer = "adamw";
    Optimizers other(parameters, config);
    CHECK(message_of([&] { other.load_state(saved); }) ==
          "optimizer state of glu.up.weight, for AdamW: \"exp_avg\" is missing");
  }
  SECTION("none: a parameter that had no gradient yet") {
    saved.clear();
    CHECK(error() == "");
    CHECK(optimizers.state().empty());
  }
}

TEST_CASE("Ema averages each tensor once and trades places with the model", "[ema]") {
  at::manual_seed(9);
  const at::Tensor table = parameter({600, 2000}), scale = parameter({4});  // more than one piece to exchange
  const at::Tensor start = table.detach().clone();
  Ema ema({{"embedding.weight", table}, {"lm_head.weight", table}, {"norm.scale", scale}}, 0.9);
  {
    const torch::NoGradGuard no_grad;
    table.add_(1);
    ema.update();
    table.add_(1);
    ema.update();
  }
  const at::Tensor last = table.detach().clone();
  const at::Tensor expected = 0.9 * (0.9 * start + 0.1 * (start + 1)) + 0.1 * (start + 2);
  CHECK(ema.state().size() == 2);
  const at::Tensor average = ema.state().at("ema.embedding.weight").clone();
  CHECK(max_difference(average, expected) < 1e-6);
  {
    const Ema::Swap swap(ema);
    CHECK(identical(table, average));
    CHECK(table.requires_grad());
  }
  CHECK(identical(table, last));
  CHECK(identical(ema.state().at("ema.embedding.weight"), average));

  const TensorMap saved = clone(ema.state());
  Ema resumed({{"embedding.weight", table}, {"norm.scale", scale}}, 0.9);
  resumed.load_state(saved);
  ema.update();
  resumed.update();
  CHECK(identical(ema.state().at("ema.embedding.weight"), resumed.state().at("ema.embedding.weight")));
  CHECK(message_of([&] { resumed.load_state({}); }) == "\"ema.embedding.weight\" is missing");
  CHECK(message_of([&] { Ema({}, 1.5); }) == "Ema: decay must be in [0, 1], got 1.5");
}
