// SPDX-License-Identifier: Apache-2.0
// The MatMul-free LM in its three forms against tests/goldens/matmulfree.py, an implementation in plain
// PyTorch that shares nothing with this one; and what all of them have: states, recomputation, packed
// weights, TorchScript, the released checkpoints' names.
#include <torch/script.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "data/error.h"
#include "model/flash_lm.h"
#include "model/generate.h"
#include "model/hgrn_bit.h"
#include "model/pack.h"
#include "model/safetensors.h"
#include "model/torchscript.h"
#include "tests/goldens.h"
#include "tests/ops/check.h"
#include "train/config.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

/// float32 follows the golden's float64 to a few units in the last place of each tensor's largest element.
constexpr double kValue = 1e-5, kGradient = 5e-5;

ModelConfig tiny(const std::string& block) {
  ModelConfig config;
  config.vocab_size = 61;
  config.d_model = 24;
  config.d_inner = 50;
  config.groups = 4;
  config.dilations = {1, 3};
  config.layers = 3;
  config.recursions = 1;
  config.block = block;
  config.mixers = {"mlgru"};
  config.quantizer = "absmean";
  config.activation = "int8";
  config.router = false;
  config.embedding_scale = 50;
  return config;
}

/// v3's blocks with both mixers, the paper's, and the released code's with its ternary head last.
std::vector<ModelConfig> kinds() {
  std::vector<ModelConfig> all = {tiny("v3"), tiny("matmulfree"), tiny("matmulfree"), tiny("hgrn-bit"),
                                  tiny("hgrn-bit")};
  all[0].mixers = {"conv", "mlgru"};
  all[1].mixers = {"mlgru", "conv"};
  all[2].recursions = 2;
  all[2].head = "hierarchical";
  all[2].head_bias = true;
  all[3].mixers = {"mlgru", "conv"};
  all[3].head = "adaptive";
  all[3].tied = false;
  all[3].cutoffs = {20};
  all[4].tied = false;
  all[4].head_quantizer = "absmean";
  all[4].head_bias = true;
  return all;
}

/// Every parameter is random, so that no scale is 1, no bias and no lower bound 0.
FlashLM make(const ModelConfig& config) {
  torch::manual_seed(3);
  FlashLM model(config);
  torch::NoGradGuard no_grad;
  for (auto& p : model->parameters()) {
    if (p.dim() == 1) p.add_(torch::randn_like(p), 0.1);
  }
  for (auto& p : model->named_parameters()) {
    if (p.key() == "lower_bounds") p.value().normal_();
  }
  return model;
}

at::Tensor tokens(int64_t batch, int64_t length) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{5});
  return torch::randint(0, 61, {batch, length}, generator, at::kLong);
}

std::map<std::string, at::Tensor> gradients_of(FlashLM& model, const at::Tensor& ids) {
  model->zero_grad();
  std::get<0>(model->loss(ids.slice(1, 0, -1), ids.slice(1, 1))).backward();
  std::map<std::string, at::Tensor> found;
  for (const auto& p : model->named_parameters()) found[p.key()] = p.value().grad().to_dense().clone();
  return found;
}

struct TemporaryFolder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("flashlm_matmulfree_" + std::to_string(getpid()));
  TemporaryFolder() { std::filesystem::create_directories(path); }
  ~TemporaryFolder() { std::filesystem::remove_all(path); }
};

}  // namespace

TEST_CASE("logits, loss and every gradient are the golden's", "[matmulfree]") {
  const std::string name = GENERATE("matmulfree", "hgrn_bit", "hybrid");
  INFO(name);
  const std::string path = std::string(MATMULFREE_GOLDENS) + "/" + name + ".safetensors";
  const auto golden = load_golden(path);
  auto settings = nlohmann::json::parse(to_json(ModelConfig{}));
  settings.update(nlohmann::json::parse(load_safetensors(path).metadata.at("config")));
  FlashLM model(model_config_from_json(settings.dump()));
  std::map<std::string, at::Tensor> parameters;
  for (const auto& [key, tensor] : golden) {
    if (key.starts_with("param.")) parameters[key.substr(6)] = tensor;
  }
  load_weights(model, parameters, path);
  const at::Tensor ids = golden.at("tokens");
  {
    torch::NoGradGuard no_grad;
    require_close(model(ids.slice(1, 0, -1)), golden.at("logits"), kValue);
  }
  require_close(std::get<0>(model->loss(ids.slice(1, 0, -1), ids.slice(1, 1))), golden.at("loss"), kValue);
  for (const auto& [key, gradient] : gradients_of(model, ids)) {
    INFO(key);
    require_close(gradient, golden.at("grad." + key), kGradient);
  }
}

TEST_CASE("a text in pieces, or token by token, gives the whole's hidden states, exactly", "[matmulfree]") {
  for (const ModelConfig& config : kinds()) {
    INFO(to_json(config));
    FlashLM model = make(config);
    torch::NoGradGuard no_grad;
    const at::Tensor ids = tokens(2, 40), whole = model->hidden(ids);
    for (const std::vector<int64_t>& sizes :
         {std::vector<int64_t>{40}, {3, 1, 36}, std::vector<int64_t>(40, 1)}) {
      State state = model->initial_state(2);
      Tensors pieces;
      int64_t at = 0;
      for (const int64_t size : sizes) {
        pieces.push_back(model->hidden(ids.slice(1, at, at + size), &state));
        at += size;
      }
      REQUIRE(at::equal(torch::cat(pieces, 1), whole));
    }
  }
}

TEST_CASE("tokens after t change no output up to t, exactly", "[matmulfree][causality]") {
  for (const ModelConfig& config : kinds()) {
    FlashLM model = make(config);
    torch::NoGradGuard no_grad;
    const at::Tensor ids = tokens(2, 30), h = model->hidden(ids);
    at::Tensor changed = ids.clone();
    changed.slice(1, 17) = (changed.slice(1, 17) + 1) % 61;
    const at::Tensor moved = model->hidden(changed);
    REQUIRE(at::equal(moved.slice(1, 0, 17), h.slice(1, 0, 17)));
    REQUIRE_FALSE(at::equal(moved.select(1, 17), h.select(1, 17)));
  }
}

TEST_CASE("recomputed activations give the same gradients", "[matmulfree][recompute]") {
  for (ModelConfig config : kinds()) {
    INFO(to_json(config));
    FlashLM kept = make(config);
    const at::Tensor ids = tokens(2, 21);
    const auto want = gradients_of(kept, ids);
    for (const char* how : {"float32", "bfloat16"}) {
      config.recompute = how;
      FlashLM model = make(config);
      const auto got = gradients_of(model, ids);
      const bool all_equal = std::all_of(want.begin(), want.end(), [&](const auto& named) {
        return at::equal(got.at(named.first), named.second);
      });
      REQUIRE(all_equal == (config.recompute == "float32"));
      for (const auto& [name, gradient] : want) {
        INFO(how << " " << name);
        REQUIRE((got.at(name) - gradient).norm().item<double>() <= 0.2 * gradient.norm().item<double>());
      }
    }
  }
}

TEST_CASE("what is recomputed is trained with a frozen embedding too", "[matmulfree][recompute]") {
  ModelConfig config = tiny("matmulfree");
  config.tied = false;
  config.recompute = "float32";
  FlashLM model = make(config);
  model->embedding.set_requires_grad(false);
  const at::Tensor ids = tokens(2, 9);
  std::get<0>(model->loss(ids.slice(1, 0, -1), ids.slice(1, 1))).backward();
  for (const auto& p : model->named_parameters()) {
    INFO(p.key());
    REQUIRE(p.value().grad().defined() == (p.key() != "embedding.weight"));
  }
}

TEST_CASE("a packed model gives the float model's logits, exactly, from memory and from a mapped file",
          "[matmulfree][pack]") {
  const TemporaryFolder folder;
  for (const ModelConfig& config : kinds()) {
    INFO(to_json(config));
    FlashLM model = make(config);
    torch::NoGradGuard no_grad;
    const at::Tensor ids = tokens(2, 11), want = model(ids);
    FlashLM packed = pack(model);
    REQUIRE(at::equal(packed(ids), want));
    save_model(packed, folder.path / "packed.safetensors");
    const auto path = folder.path / "packed.safetensors";
    FlashLM mapped = model_from(map_safetensors(path), path.string());
    std::filesystem::remove(path);
    REQUIRE(at::equal(mapped(ids), want));
    REQUIRE(at::equal(std::get<1>(mapped->loss(ids.slice(1, 0, -1), ids.slice(1, 1))),
                      std::get<1>(model->loss(ids.slice(1, 0, -1), ids.slice(1, 1)))));
    require_error([&] { pack(packed); }, "packed already");
  }
}

TEST_CASE("unscaled weights, float activations and a ternary head of another quantizer can be packed",
          "[matmulfree][pack]") {
  ModelConfig config = tiny("v3");
  config.quantizer = "threshold";
  config.activation = "none";
  config.tied = false;
  config.head_quantizer = "absmean";
  FlashLM model = make(config);
  torch::NoGradGuard no_grad;
  const at::Tensor ids = tokens(2, 11);
  FlashLM packed = pack(model);
  require_close(packed(ids), model(ids), 1e-3);  // sums in another order, then rounded to int8 by the head
  require_close(to_torchscript(packed).forward({ids}).toTensor(), packed(ids), 1e-6);
}

TEST_CASE("mapped tensors are the file, copies are not", "[matmulfree][pack]") {
  const TemporaryFolder folder;
  const auto path = folder.path / "some.safetensors";
  const at::Tensor odd = randn({3}), lines = randn({4, 16}), more = randn({7, 5});
  save_safetensors(path, {{"a.odd", odd}, {"b.lines", lines}, {"c.more", more}});
  const auto mapped = map_safetensors(path), copied = load_safetensors(path);
  for (const auto& [name, tensor] : {std::pair{"a.odd", odd}, {"b.lines", lines}, {"c.more", more}}) {
    REQUIRE(at::equal(mapped.tensors.at(name), tensor));
    REQUIRE(at::equal(copied.tensors.at(name), tensor));
  }
  // The first value in the file, which must be the first of the whole lines.
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  uint64_t header = 0;
  file.read(reinterpret_cast<char*>(&header), sizeof header);
  REQUIRE((sizeof header + header) % 64 == 0);
  const float changed = 1234;
  file.seekp(static_cast<std::streamoff>(sizeof header + header));
  file.write(reinterpret_cast<const char*>(&changed), sizeof changed);
  file.close();
  REQUIRE(mapped.tensors.at("b.lines").flatten()[0].item<float>() == changed);
  REQUIRE(at::equal(copied.tensors.at("b.lines"), lines));
}

TEST_CASE("a packed file that lacks a tensor, or has it in another type, is refused", "[matmulfree][pack]") {
  const FlashLM model = pack(make(kinds().back()));
  const auto refused = [&](const char* words, const auto& change) {
    auto weights = model->named_weights();
    change(weights);
    require_error([&] { load_weights(model, weights, "FILE"); }, words);
  };
  refused("FILE: has no weight 'blocks.1.glu.down_proj.scale'",
          [](auto& w) { w.erase("blocks.1.glu.down_proj.scale"); });
  refused("FILE: weight 'embedding.weight' must be Float, got Half; make the file anew with flashlm pack",
          [](auto& w) { w["embedding.weight"] = w["embedding.weight"].to(at::kHalf); });
}

TEST_CASE("a packed model with random weights computes", "[matmulfree][pack]") {
  ModelConfig config = kinds().back();
  FlashLM model = random_packed(config);
  torch::NoGradGuard no_grad;
  const at::Tensor logits = model(tokens(1, 4));
  REQUIRE(logits.sizes() == at::IntArrayRef({1, 4, 61}));
  REQUIRE(at::isfinite(logits).all().item<bool>());
  REQUIRE(logits.std().item<double>() > 0);
}

TEST_CASE("the TorchScript module computes what the model does, packed or not", "[matmulfree][torchscript]") {
  for (const ModelConfig& config : kinds()) {
    INFO(to_json(config));
    const FlashLM model = make(config);
    torch::NoGradGuard no_grad;
    for (FlashLM each : {model, pack(model)}) {
      torch::jit::Module module = to_torchscript(each);
      const at::Tensor ids = tokens(2, 23), want = each(ids);
      require_close(module.forward({ids}).toTensor(), want, 1e-6);
      auto state = module.get_method("initial_state")({int64_t{2}});
      Tensors pieces;
      for (int64_t t = 0; t < ids.size(1); ++t) {
        const auto out = module.get_method("step")({ids.slice(1, t, t + 1), state}).toTuple();
        pieces.push_back(out->elements()[0].toTensor());
        state = out->elements()[1];
      }
      require_close(torch::cat(pieces, 1), want, 1e-6);
    }
  }
}

TEST_CASE("generation goes token by token on the state", "[matmulfree]") {
  for (const ModelConfig& config : kinds()) {
    FlashLM model = make(config);
    SamplingOptions options;
    options.temperature = 0;
    std::vector<int32_t> text = {7, 3};
    const auto drawn = generate(model, text, 6, /*stop_at=*/-1, options);
    torch::NoGradGuard no_grad;
    for (const int32_t token : drawn) {
      const at::Tensor all = torch::tensor(std::vector<int64_t>(text.begin(), text.end())).unsqueeze(0);
      REQUIRE(model(all).select(1, -1).argmax().item<int64_t>() == token);
      text.push_back(token);
    }
  }
}

namespace {

/// A made-up checkpoint with the names and shapes of those released.
std::map<std::string, at::Tensor> released(int64_t layers, int64_t v, int64_t d, int64_t h) {
  std::map<std::string, at::Tensor> t;
  uint64_t seed = 0;
  const auto add = [&](const std::string& name, at::IntArrayRef shape) {
    t[name] = randn(shape, at::kHalf, ++seed);
  };
  add("model.embeddings.weight", {v, d});
  add("model.lower_bounds", {layers, d});
  add("model.norm.weight", {d});
  add("lm_head.weight", {v, d});
  add("lm_head.norm.weight", {d});
  for (int64_t i = 0; i < layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    for (const char* name : {"attn_norm.weight", "mlp_norm.weight", "attn.g_norm.weight"})
      add(layer + name, {d});
    for (const char* name : {"i", "f", "g", "o"}) {
      add(layer + "attn." + name + "_proj.weight", {d, d});
      add(layer + "attn." + name + "_proj.norm.weight", {d});
    }
    add(layer + "mlp.gate_proj.weight", {2 * h, d});
    add(layer + "mlp.gate_proj.norm.weight", {d});
    add(layer + "mlp.down_proj.weight", {d, h});
    add(layer + "mlp.down_proj.norm.weight", {h});
  }
  return t;
}

}  // namespace

TEST_CASE("a released checkpoint's tensors go where their names say", "[matmulfree][hgrn_bit]") {
  for (const int64_t layers : {1, 2}) {
    const auto tensors = released(layers, 37, 24, 40);
    FlashLM model = from_hgrn_bit(tensors, "made up");
    const std::string last = layers == 1 ? "block." : "blocks.1.";
    const std::string layer = "model.layers." + std::to_string(layers - 1) + ".";
    const auto weights = model->named_weights();
    REQUIRE(weights.size() == tensors.size());
    const auto same = [&](const std::string& ours, const std::string& theirs) {
      INFO(ours);
      REQUIRE(at::equal(weights.at(ours), tensors.at(theirs).to(at::kFloat)));
    };
    same("embedding.weight", "model.embeddings.weight");
    same("lower_bounds", "model.lower_bounds");
    same("final_norm.scale", "model.norm.weight");
    same("head.weight", "lm_head.weight");
    same("head.norm_scale", "lm_head.norm.weight");
    same(last + "norm1.scale", layer + "attn_norm.weight");
    same(last + "norm2.scale", layer + "mlp_norm.weight");
    same(last + "token_mixer.c_proj.weight", layer + "attn.i_proj.weight");
    same(last + "token_mixer.f_proj.norm_scale", layer + "attn.f_proj.norm.weight");
    same(last + "token_mixer.g_proj.weight", layer + "attn.g_proj.weight");
    same(last + "token_mixer.g_norm.scale", layer + "attn.g_norm.weight");
    same(last + "token_mixer.o_proj.weight", layer + "attn.o_proj.weight");
    same(last + "glu.gate_up_proj.weight", layer + "mlp.gate_proj.weight");
    same(last + "glu.down_proj.norm_scale", layer + "mlp.down_proj.norm.weight");
  }
}

TEST_CASE("what is no released checkpoint is refused in one line", "[matmulfree][hgrn_bit]") {
  const auto refused = [](const char* words, const auto& change) {
    auto tensors = released(2, 37, 24, 40);
    change(tensors);
    require_error([&] { from_hgrn_bit(tensors, "FILE"); }, words);
  };
  refused("FILE is not a released MatMul-free LM: it has no tensor 'model.embeddings.weight' of 2 dimensions",
          [](auto& t) { t.erase("model.embeddings.weight"); });
  refused("FILE: has no tensor 'model.layers.1.attn.f_proj.norm.weight'",
          [](auto& t) { t.erase("model.layers.1.attn.f_proj.norm.weight"); });
  refused("FILE: tensor 'model.layers.0.attn.i_conv1d.weight' is not one of a released MatMul-free LM",
          [](auto& t) {
            t["model.layers.0.attn.i_conv1d.weight"] = randn({24, 1, 4});
          });
  refused("weight 'head.weight' must be [37, 24], got [36, 24]", [](auto& t) {
    t["lm_head.weight"] = randn({36, 24});
  });
}

TEST_CASE("the presets are models of the sizes that they say", "[matmulfree]") {
  const auto count = [](const std::string& preset) {
    ModelConfig config = model_config_from_toml(std::string(PRESETS) + "/" + preset + ".toml");
    config.packed = true;  // no memory is touched
    const FlashLM model(config);
    int64_t sum = model->parameter_count();
    for (const auto& b : model->named_buffers()) {
      if (b.key().ends_with(".packed")) sum += 4 * b.value().numel();  // no padding at these sizes
    }
    return sum;
  };
  REQUIRE(count("matmulfree-13m") == 14'290'737);
  REQUIRE(count("matmulfree-370m") == 374'108'160);
  REQUIRE(count("matmulfree-1.3b") == 1'364'779'008);
  REQUIRE(count("matmulfree-2.7b") == 2'702'357'504);
}

TEST_CASE("blocks, mixers, heads and recomputation that cannot be are refused", "[matmulfree]") {
  const auto refused = [](const char* words, const auto& change) {
    ModelConfig config;
    change(config);
    require_error([&] { config.validate(); }, words);
  };
  refused("block must be 'v3', 'matmulfree' or 'hgrn-bit', got 'v4'", [](auto& c) { c.block = "v4"; });
  refused("each of mixers must be 'conv' or 'mlgru', got 'rwkv'", [](auto& c) {
    c.mixers = {"conv", "rwkv"};
  });
  refused("mixers must name at most one for each of layers = 1, got 2", [](auto& c) {
    c.mixers = {"conv", "mlgru"};
  });
  refused("mixers must name at least one, got none", [](auto& c) { c.mixers = {}; });
  refused("recompute must be 'none', 'float32' or 'bfloat16', got 'int8'",
          [](auto& c) { c.recompute = "int8"; });
  refused("head-quantizer must be 'none' or 'absmean', got 'threshold'",
          [](auto& c) { c.head_quantizer = "threshold"; });
  refused("head-quantizer 'absmean' needs head 'full' and tied false, got 'full' and true",
          [](auto& c) { c.head_quantizer = "absmean"; });
  ModelConfig without_convolutions = tiny("matmulfree");
  without_convolutions.groups = 7;
  without_convolutions.validate();
}
