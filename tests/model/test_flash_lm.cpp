// SPDX-License-Identifier: Apache-2.0
// The model: v3's size and names, no look into the future, pieces equal the whole, weights on disk,
// TorchScript.
#include <torch/script.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "data/error.h"
#include "model/flash_lm.h"
#include "model/generate.h"
#include "model/layers.h"
#include "model/safetensors.h"
#include "model/torchscript.h"
#include "ops/kernels/kernels.h"
#include "ops/ops.h"
#include "tests/ops/check.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

ModelConfig tiny() {
  ModelConfig config;
  config.vocab_size = 61;
  config.d_model = 32;
  config.d_inner = 85;
  config.groups = 4;
  config.dilations = {1, 4, 9};
  return config;
}

/// What `quick` is, but smaller: scaled weights, int8 activations, several blocks.
ModelConfig tiny_scaled() {
  ModelConfig config = tiny();
  config.layers = 2;
  config.recursions = 1;
  config.quantizer = "absmean";
  config.activation = "int8";
  config.embedding_scale = 50;
  config.router = false;
  return config;
}

/// With rounded products, going forward and backward.
ModelConfig tiny_rounded() {
  ModelConfig config = tiny();
  config.gradient = "bfloat16";
  config.conv_precision = "bfloat16";
  return config;
}

FlashLM make(const ModelConfig& config) {
  torch::manual_seed(3);
  return FlashLM(config);
}

at::Tensor tokens(int64_t batch, int64_t length, int64_t vocab = 61, uint64_t seed = 5) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return torch::randint(0, vocab, {batch, length}, generator, at::kLong);
}

struct TemporaryFolder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("flashlm_model_" + std::to_string(getpid()));
  TemporaryFolder() { std::filesystem::create_directories(path); }
  ~TemporaryFolder() { std::filesystem::remove_all(path); }
};

}  // namespace

TEST_CASE("the default model is v3: its parameters by number, name and shape", "[model]") {
  const FlashLM model = make(ModelConfig{});
  REQUIRE(model->parameter_count() == 13'555'969);
  std::map<std::string, std::vector<int64_t>> shapes;
  for (const auto& p : model->named_parameters()) shapes[p.key()] = p.value().sizes().vec();
  std::map<std::string, std::vector<int64_t>> want = {{"embedding.weight", {50257, 256}},
                                                      {"block.norm1.scale", {256}},
                                                      {"block.token_mixer.out_proj.weight", {256, 256}},
                                                      {"block.norm2.scale", {256}},
                                                      {"block.glu.gate_proj.weight", {683, 256}},
                                                      {"block.glu.up_proj.weight", {683, 256}},
                                                      {"block.glu.down_proj.weight", {256, 683}},
                                                      {"block.router.linear.weight", {1, 256}},
                                                      {"block.router.linear.bias", {1}},
                                                      {"final_norm.scale", {256}}};
  for (const char* i : {"0", "1", "2"}) {
    want["block.token_mixer.layers." + std::string(i) + ".conv_gate.conv.weight"] = {256, 16, 4};
    want["block.token_mixer.layers." + std::string(i) + ".conv_value.conv.weight"] = {256, 16, 4};
    want["block.token_mixer.norms." + std::string(i) + ".scale"] = {256};
  }
  REQUIRE(shapes == want);
}

TEST_CASE("weights start as v3's do", "[model]") {
  const FlashLM model = make(ModelConfig{});
  const auto parameters = model->named_parameters();
  const auto std_of = [&](const char* name) { return parameters[name].std().item<double>(); };
  REQUIRE(std_of("embedding.weight") == Approx(0.02).epsilon(0.01));
  REQUIRE(std_of("block.token_mixer.layers.1.conv_gate.conv.weight") == Approx(0.125).epsilon(0.02));
  REQUIRE(std_of("block.glu.gate_proj.weight") == Approx(1.0 / 16).epsilon(0.02));
  REQUIRE(std_of("block.glu.down_proj.weight") == Approx(0.01).epsilon(0.02));
  REQUIRE(std_of("block.token_mixer.out_proj.weight") == Approx(0.01).epsilon(0.02));
}

TEST_CASE("tokens after t change no output up to t, exactly", "[model][causality]") {
  const ModelConfig config = GENERATE(tiny(), tiny_scaled());
  FlashLM model = make(config);
  torch::NoGradGuard no_grad;
  const at::Tensor before = tokens(2, 48);
  const at::Tensor h = model->hidden(before);
  for (int64_t t : {0, 1, 16, 30, 46}) {
    at::Tensor changed = before.clone();
    changed.slice(1, t + 1) = (changed.slice(1, t + 1) + 1 + tokens(2, 47 - t, 60, 9)) % 61;
    const at::Tensor moved = model->hidden(changed);
    REQUIRE(at::equal(moved.slice(1, 0, t + 1), h.slice(1, 0, t + 1)));
    REQUIRE_FALSE(at::equal(moved.select(1, t + 1), h.select(1, t + 1)));
  }
}

TEST_CASE("the loss holds position t against target t", "[model][causality]") {
  FlashLM model = make(tiny());
  torch::NoGradGuard no_grad;
  const at::Tensor ids = tokens(2, 12), inputs = ids.slice(1, 0, 11), targets = ids.slice(1, 1);
  const at::Tensor logits = model(inputs);
  const at::Tensor want =
      torch::nn::functional::cross_entropy(logits.flatten(0, 1), targets.flatten()).to(at::kDouble);
  require_close(std::get<1>(model->loss(inputs, targets)).to(at::kDouble), want, 1e-5);
  const at::Tensor chosen = torch::tensor({3, 11, 20}, at::kLong);
  const at::Tensor some = torch::nn::functional::cross_entropy(logits.flatten(0, 1).index_select(0, chosen),
                                                               targets.flatten().index_select(0, chosen));
  require_close(std::get<1>(model->loss(inputs, targets, {}, chosen)), some, 1e-5);
}

TEST_CASE("a text in pieces of any size gives the whole's hidden states, exactly", "[model]") {
  FlashLM model = make(GENERATE(tiny(), tiny_scaled(), tiny_rounded()));
  torch::NoGradGuard no_grad;
  const at::Tensor ids = tokens(2, 70), whole = model->hidden(ids);
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{70}, {1, 69}, {30, 1, 1, 38}, {5, 5, 60}}) {
    State state = model->initial_state(2);
    Tensors pieces;
    int64_t at = 0;
    for (int64_t size : sizes) {
      pieces.push_back(model->hidden(ids.slice(1, at, at + size), &state));
      at += size;
    }
    REQUIRE(at::equal(torch::cat(pieces, 1), whole));
  }
}

TEST_CASE("gradient and conv-precision reach the convolutions", "[model]") {
  ModelConfig config = tiny();
  config.dilations = {4};
  config.gradient = GENERATE("float32", "bfloat16");
  config.conv_precision = GENERATE("float32", "bfloat16");
  torch::manual_seed(3);
  ConvMixer mixer(config, /*out_std=*/0.1);
  const auto weights = mixer.named_parameters();
  const at::Tensor x = randn({2, 40, 32}).requires_grad_(), grad_y = randn({2, 40, 32}, at::kFloat, 1);
  const auto gradients_of = [&](const at::Tensor& y) {
    Tensors inputs = {x};
    for (const auto& weight : weights) inputs.push_back(weight.value());
    Tensors grads = torch::autograd::grad({y}, inputs, {grad_y});
    grads.push_back(y.detach());
    return grads;
  };
  const auto by_hand = [&](const std::string& gradient, const std::string& precision) {
    const at::Tensor y = gated_conv(x, weights["norms.0.scale"], weights["layers.0.conv_gate.conv.weight"],
                                    weights["layers.0.conv_value.conv.weight"], std::nullopt, /*dilation=*/4,
                                    config.groups, config.norm_eps, gradient, precision);
    return gradients_of(bit_linear(y, weights["out_proj.weight"], std::nullopt, config.quantizer,
                                   config.activation, /*eps=*/1e-6, config.gradient));
  };
  const auto all_equal = [](const Tensors& a, const Tensors& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [](const at::Tensor& s, const at::Tensor& t) { return at::equal(s, t); });
  };
  const Tensors got = gradients_of(mixer.forward(x, /*state=*/nullptr, /*lower_bound=*/{}));
  for (const char* gradient : {"float32", "bfloat16"}) {
    for (const char* precision : {"float32", "bfloat16"}) {
      const bool is_same = gradient == config.gradient && precision == config.conv_precision;
      if (is_same || kernels::table<float>().bf16_panel > 0) {
        REQUIRE(all_equal(by_hand(gradient, precision), got) == is_same);
      }
    }
  }
}

TEST_CASE("absmean scaling keeps the residual stream near unit size, threshold does not", "[model]") {
  torch::NoGradGuard no_grad;
  const auto rms_before_final_norm = [](const ModelConfig& config) {
    // The stream as the final norm gets it, rebuilt from the definition.
    FlashLM model = make(config);
    at::Tensor x = torch::embedding(model->embedding, tokens(2, 64)) * config.embedding_scale;
    for (const auto& child : model->named_modules()) {
      if (auto* block = child.value()->as<BlockImpl>()) {
        for (int64_t pass = 0; pass < config.recursions; ++pass)
          x = block->forward(x, nullptr, /*lower_bound=*/{});
      }
    }
    return x.square().mean().sqrt().item<double>();
  };
  const double scaled = rms_before_final_norm(tiny_scaled()), unscaled = rms_before_final_norm(tiny());
  REQUIRE(scaled > 0.5);
  REQUIRE(scaled < 2);
  REQUIRE(unscaled > 100);
}

TEST_CASE("a model comes back from disk as it was", "[model][formats]") {
  const TemporaryFolder folder;
  const auto path = folder.path / "model.safetensors";
  FlashLM model = make(tiny_scaled());
  save_model(model, path);
  FlashLM loaded = load_model(path);
  torch::NoGradGuard no_grad;
  REQUIRE(to_json(loaded->config()) == to_json(model->config()));
  REQUIRE(at::equal(loaded(tokens(1, 9)), model(tokens(1, 9))));
  // Other shapes, missing and unknown weights are refused by name.
  using Weights = std::map<std::string, at::Tensor>;
  const Weights weights = load_safetensors(path).tensors;
  Weights fewer = weights, more = weights, other = weights;
  fewer.erase("final_norm.scale");
  require_error([&] { load_weights(loaded, fewer, "x"); }, "x: has no weight 'final_norm.scale'");
  more["extra"] = torch::ones({1});
  require_error([&] { load_weights(loaded, more, "x"); }, "x: weight 'extra' is not one of this model's");
  other["final_norm.scale"] = torch::ones({33});
  require_error([&] { load_weights(loaded, other, "x"); },
                "x: weight 'final_norm.scale' must be [32], got [33]");
}

TEST_CASE("damaged safetensors are refused, wherever they are cut or changed", "[formats]") {
  const TemporaryFolder folder;
  const auto path = folder.path / "t.safetensors";
  save_safetensors(path, {{"a", torch::arange(6).view({2, 3})}, {"b", torch::empty({0, 4})}},
                   {{"who", "me"}});
  const SafeTensors back = load_safetensors(path);
  REQUIRE(at::equal(back.tensors.at("a"), torch::arange(6).view({2, 3})));
  REQUIRE(back.tensors.at("b").sizes() == at::IntArrayRef({0, 4}));
  REQUIRE(back.metadata.at("who") == "me");
  std::ifstream file(path, std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(file)), {});
  const auto refused = [&](const std::string& content) {
    std::ofstream(path, std::ios::binary) << content;
    require_error([&] { load_safetensors(path); }, "damaged or not a safetensors file");
  };
  for (size_t size = 0; size < whole.size(); ++size) refused(whole.substr(0, size));
  refused(whole + "x");
  for (size_t i = whole.size() - 48; i < whole.size(); ++i) {
    std::string changed = whole;
    changed[i] ^= 4;
    refused(changed);
  }
  std::string huge = whole;
  huge[6] = 0x7f;  // a header of 2^54 bytes
  refused(huge);
  require_error([&] { load_safetensors(folder.path / "none"); }, "none");
}

TEST_CASE("generation is greedy at temperature 0, seeded otherwise, and stops where it is told",
          "[generate]") {
  FlashLM model = make(tiny());
  const std::vector<int32_t> prompt = {4, 8, 15, 16, 23, 42};
  SamplingOptions greedy;
  greedy.temperature = 0;
  const auto text = generate(model, prompt, 12, -1, greedy);
  REQUIRE(text.size() == 12);
  // The same, the long way: the whole text again for each token.
  std::vector<int64_t> all(prompt.begin(), prompt.end());
  torch::NoGradGuard no_grad;
  for (int32_t token : text) {
    const auto logits = model(torch::tensor(all).unsqueeze(0)).select(1, -1);
    REQUIRE(logits.argmax().item<int64_t>() == token);
    all.push_back(token);
  }
  SamplingOptions drawn;
  drawn.seed = 5;
  const auto first = generate(model, prompt, 12, -1, drawn);
  REQUIRE(generate(model, prompt, 12, -1, drawn) == first);
  drawn.seed = 6;
  REQUIRE(generate(model, prompt, 12, -1, drawn) != first);
  const auto stopped = generate(model, prompt, 12, text[3], greedy);
  REQUIRE(stopped.size() <= 3);
}

TEST_CASE("top-k and top-p keep exactly the tokens they should", "[generate]") {
  const at::Tensor logits = torch::tensor({0.5, 0.25, 0.125, 0.125}).log();
  const auto drawn = [&](SamplingOptions options) {
    options.temperature = 1;
    std::set<int32_t> seen;
    at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(0);
    for (int i = 0; i < 300; ++i) seen.insert(static_cast<int32_t>(sample(logits, options, generator)));
    return seen;
  };
  SamplingOptions options;
  REQUIRE(drawn(options) == std::set<int32_t>{0, 1, 2, 3});
  options.top_k = 2;
  REQUIRE(drawn(options) == std::set<int32_t>{0, 1});
  options.top_k = 0;
  options.top_p = 0.7;  // 0.5 is short of it, 0.75 is not
  REQUIRE(drawn(options) == std::set<int32_t>{0, 1});
  options.top_p = 0.4;
  REQUIRE(drawn(options) == std::set<int32_t>{0});
}

TEST_CASE("the TorchScript module equals the model, saved, loaded, stepped and generating", "[torchscript]") {
  const TemporaryFolder folder;
  FlashLM model = make(GENERATE(tiny(), tiny_scaled(), tiny_rounded()));
  torch::NoGradGuard no_grad;
  const auto path = folder.path / "model.pt";
  export_torchscript(model, "tokenizer bytes", path);
  torch::jit::ExtraFilesMap extra = {{"tokenizer.model", ""}, {"config.json", ""}};
  torch::jit::Module script = torch::jit::load(path.string(), std::nullopt, extra);
  REQUIRE(extra["tokenizer.model"] == "tokenizer bytes");
  REQUIRE(extra["config.json"] == to_json(model->config()));

  const at::Tensor ids = tokens(2, 40), logits = model(ids);
  REQUIRE(at::equal(script.forward({ids}).toTensor(), logits));
  // Two pieces through step().
  auto state = script.get_method("initial_state")({2});
  Tensors pieces;
  for (const auto& piece : {ids.slice(1, 0, 17), ids.slice(1, 17)}) {
    const auto out = script.get_method("step")({piece, state});
    pieces.push_back(out.toTuple()->elements()[0].toTensor());
    state = out.toTuple()->elements()[1];
  }
  require_close(torch::cat(pieces, 1), logits, 1e-6);
  // Greedy text equals the model's own.
  SamplingOptions greedy;
  greedy.temperature = 0;
  const at::Tensor text = script.get_method("generate")({ids.slice(0, 0, 1), 8, 0.0}).toTensor();
  const auto row = ids[0].contiguous();
  const auto want = generate(
      model, std::vector<int32_t>(row.data_ptr<int64_t>(), row.data_ptr<int64_t>() + 40), 8, -1, greedy);
  for (int64_t i = 0; i < 8; ++i) REQUIRE(text[0][40 + i].item<int64_t>() == want[i]);
  // v3's names survive.
  std::set<std::string> names;
  for (const auto& p : script.named_parameters()) names.insert(p.name);
  for (const auto& p : model->named_parameters()) REQUIRE(names.count(p.key()) == 1);
}

TEST_CASE("settings that cannot be are refused by name", "[model]") {
  const auto refused = [](const std::string& words, const std::function<void(ModelConfig&)>& spoil) {
    ModelConfig config = tiny();
    spoil(config);
    require_error([&] { FlashLM model(config); }, words);
  };
  refused("vocab-size must be at least 1, got 0", [](auto& c) { c.vocab_size = 0; });
  refused("groups must divide d-model = 32, got 5", [](auto& c) { c.groups = 5; });
  refused("each of dilations must be at least 1, got 0", [](auto& c) { c.dilations = {1, 0}; });
  refused("dilations must name at least one convolution, got none", [](auto& c) { c.dilations = {}; });
  refused("quantizer must be 'absmean' or 'threshold', got 'sign'", [](auto& c) { c.quantizer = "sign"; });
  refused("conv-precision must be 'float32' or 'bfloat16', got 'int8'",
          [](auto& c) { c.conv_precision = "int8"; });
  refused("activation must be 'int8' or 'none', got 'fp8'", [](auto& c) { c.activation = "fp8"; });
  require_error([] { model_config_from_json("{}"); }, "unreadable model settings");
}
