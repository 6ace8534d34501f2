// SPDX-License-Identifier: Apache-2.0
// The heads as a model has them: normalised, equal in loss, logits and samples, on disk, in TorchScript,
// converted.
#include <torch/script.h>

#include <filesystem>
#include <map>

#include "data/error.h"
#include "data/sampler.h"
#include "model/convert_head.h"
#include "model/generate.h"
#include "model/torchscript.h"
#include "tests/ops/check.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

constexpr int64_t kVocab = 61;

ModelConfig config_with(const std::string& head, bool bias = true, bool tied = true) {
  ModelConfig config;
  config.vocab_size = kVocab;
  config.d_model = 32;
  config.d_inner = 85;
  config.groups = 4;
  config.dilations = {1, 4};
  config.head = head;
  config.head_bias = bias;
  config.tied = tied;
  config.classes = 7;
  config.cutoffs = {10, 25};
  config.tail_divisor = 2;
  config.embedding_std = 0.5;  // probabilities that differ
  return config;
}

/// Classes that are no runs of ids, of 1 to 16 words; those of an adaptive head as it is cut.
WordClasses classes_for(const std::string& head) {
  WordClasses classes;
  for (int64_t i = 0; i < kVocab; ++i) classes.words.push_back(i * 17 % kVocab);
  classes.offsets = {0, 1, 3, 9, 20, 36, 50, kVocab};
  if (head == "adaptive") classes.offsets = {0, 10, 25, kVocab};
  return classes;
}

std::vector<int64_t> counts() {
  std::vector<int64_t> counts(kVocab);
  for (int64_t i = 0; i < kVocab; ++i) counts[i] = 3 * i * i % 40;
  return counts;
}

FlashLM make(const ModelConfig& config) {
  torch::manual_seed(3);
  FlashLM model(config);
  if (config.head != "full") model->head().initialize(classes_for(config.head), counts());
  return model;
}

at::Tensor tokens(int64_t batch, int64_t length) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(5);
  return torch::randint(0, kVocab, {batch, length}, generator, at::kLong);
}

FlashLM any_model() {
  const std::string head = GENERATE("full", "hierarchical", "adaptive");
  const bool bias = GENERATE(true, false), tied = GENERATE(true, false);
  return make(config_with(head, bias, tied));
}

/// One ahead of the inputs; some, or none, are kIgnoredTarget, which torch ignores as well.
at::Tensor targets_of(const at::Tensor& ids) {
  const bool some_ignored = GENERATE(false, true);
  at::Tensor targets = ids.slice(1, 1).clone();
  if (some_ignored) targets.slice(1, 0, -1, 3).fill_(kIgnoredTarget);
  return targets;
}

struct TemporaryFolder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("flashlm_heads_" + std::to_string(getpid()));
  TemporaryFolder() { std::filesystem::create_directories(path); }
  ~TemporaryFolder() { std::filesystem::remove_all(path); }
};

}  // namespace

TEST_CASE("the loss is the cross-entropy of the logits, whose probabilities sum to 1", "[heads]") {
  FlashLM model = any_model();
  torch::NoGradGuard no_grad;
  const at::Tensor ids = tokens(2, 24), inputs = ids.slice(1, 0, 23), targets = targets_of(ids);
  const at::Tensor logits = model(inputs).to(at::kDouble);
  if (model->config().head != "full") {
    require_close(logits.exp().sum(-1), torch::ones({2, 23}, at::kDouble), 1e-5);
  }
  const at::Tensor want = torch::nn::functional::cross_entropy(logits.flatten(0, 1), targets.flatten());
  const auto [loss, nll] = model->loss(inputs, targets);
  require_close(nll.to(at::kDouble), want, 1e-5);
  require_close(loss.to(at::kDouble), want, 1e-5);
}

TEST_CASE("every parameter has the gradient of that cross-entropy", "[heads]") {
  FlashLM model = any_model();
  const at::Tensor ids = tokens(2, 24), inputs = ids.slice(1, 0, 23), targets = targets_of(ids);
  const auto gradients = [&](const at::Tensor& loss) {
    model->zero_grad();
    loss.backward();
    std::map<std::string, at::Tensor> all;
    for (const auto& p : model->named_parameters()) {
      if (p.value().grad().defined()) all[p.key()] = p.value().grad().to_dense().clone();
    }
    return all;
  };
  const auto got = gradients(std::get<0>(model->loss(inputs, targets)));
  const auto want =
      gradients(torch::nn::functional::cross_entropy(model(inputs).flatten(0, 1), targets.flatten()));
  REQUIRE(got.size() == want.size());
  for (const auto& [name, gradient] : want) {
    INFO(name);
    require_close(got.at(name), gradient, 2e-5);
  }
}

TEST_CASE("a graph that is kept gives the same gradients again", "[heads]") {
  FlashLM model = any_model();
  const at::Tensor ids = tokens(2, 24);
  const at::Tensor loss = std::get<0>(model->loss(ids.slice(1, 0, 23), targets_of(ids)));
  const auto gradients = [&](bool keep_graph) {
    model->zero_grad();
    loss.backward({}, keep_graph);
    std::vector<at::Tensor> all;
    for (const at::Tensor& p : model->parameters()) {
      if (p.grad().defined()) all.push_back(p.grad().to_dense().clone());
    }
    return all;
  };
  const auto first = gradients(true), second = gradients(false);
  for (size_t i = 0; i < first.size(); ++i) REQUIRE(at::equal(first[i], second[i]));
}

TEST_CASE("the gradient of a tied table is summed where the head has made it", "[heads]") {
  static int64_t copies = 0;
  copies = 0;
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(
          [](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
            const std::string name = function.name();
            const auto inputs = function.inputs();
            if (name == "aten::copy_" && inputs[0].isTensor()) {
              copies += inputs[0].toTensor().sizes() == at::IntArrayRef{kVocab, 32};
            }
            return nullptr;
          })
          .needsInputs(true)
          .scopes({at::RecordScope::FUNCTION}));
  const at::Tensor ids = tokens(2, 24);
  for (const char* head : {"full", "hierarchical"}) {
    FlashLM model = make(config_with(head));
    const at::Tensor loss = std::get<0>(model->loss(ids.slice(1, 0, 23), targets_of(ids)));
    copies = 0;
    loss.backward();
    CHECK(copies == 0);
    CHECK_FALSE(model->embedding.grad().is_sparse());
  }
  at::removeCallback(handle);
}

TEST_CASE("biases start at the unigram distribution", "[heads]") {
  FlashLM model = make(config_with(GENERATE("hierarchical", "adaptive")));
  torch::NoGradGuard no_grad;
  model->head().initialize(classes_for(model->config().head), counts());
  const at::Tensor p = model->head().logits(torch::zeros({32})).exp();
  at::Tensor want = torch::tensor(counts()).to(at::kFloat) + 1;
  want /= want.sum();
  if (model->config().head == "hierarchical") {
    require_close(p, want, 1e-5);
  } else {  // words of a tail are equal
    const at::Tensor words = torch::tensor(classes_for("adaptive").words);
    const at::Tensor short_list = words.slice(0, 0, 10), tail = words.slice(0, 10, 25);
    require_close(p.index_select(0, short_list), want.index_select(0, short_list), 1e-5);
    require_close(p.index_select(0, tail), want.index_select(0, tail).mean().expand({15}), 1e-5);
  }
}

TEST_CASE("greedy text takes the likeliest word, and seeds decide what is drawn", "[heads]") {
  FlashLM model = any_model();
  torch::NoGradGuard no_grad;
  SamplingOptions options;
  options.temperature = 0;
  std::vector<int32_t> text = {5, 9, 60};
  for (const int32_t token : generate(model, text, 8, -1, options)) {
    const at::Tensor ids = torch::tensor(std::vector<int64_t>(text.begin(), text.end())).unsqueeze(0);
    REQUIRE(token == model(ids)[0][-1].argmax().item<int64_t>());
    text.push_back(token);
  }
  options.temperature = 1.3;
  options.top_k = 20;
  const auto drawn = generate(model, {5, 9}, 30, -1, options);
  REQUIRE(generate(model, {5, 9}, 30, -1, options) == drawn);
  options.seed = 1;
  REQUIRE(generate(model, {5, 9}, 30, -1, options) != drawn);
}

TEST_CASE("a head and its classes survive the disk, and TorchScript equals it", "[heads][torchscript]") {
  const TemporaryFolder folder;
  FlashLM model = any_model();
  torch::NoGradGuard no_grad;
  const auto path = folder.path / "model.safetensors";
  save_model(model, path);
  FlashLM loaded = load_model(path);
  const at::Tensor ids = tokens(2, 12), logits = model(ids);
  REQUIRE(at::equal(loaded(ids), logits));

  export_torchscript(model, "", folder.path / "model.pt");
  torch::jit::Module script = torch::jit::load((folder.path / "model.pt").string());
  REQUIRE(at::equal(script.forward({ids}).toTensor(), logits));
  SamplingOptions greedy;
  greedy.temperature = 0;
  const at::Tensor text = script.get_method("generate")({ids.slice(0, 0, 1), 6, 0.0}).toTensor();
  const auto row = ids[0].contiguous();
  const std::vector<int32_t> prompt(row.data_ptr<int64_t>(), row.data_ptr<int64_t>() + 12);
  const auto want = generate(model, prompt, 6, -1, greedy);
  for (int64_t i = 0; i < 6; ++i) REQUIRE(text[0][12 + i].item<int64_t>() == want[i]);
  // Two texts at once, drawn with every option.
  const at::Tensor both = script.get_method("generate")({ids, 5, 0.9, 10, 0.9}).toTensor();
  REQUIRE(both.sizes() == at::IntArrayRef({2, 17}));
}

TEST_CASE("classes that do not fit a head are refused", "[heads]") {
  FlashLM model = make(config_with("hierarchical"));
  WordClasses classes = classes_for("hierarchical");
  classes.offsets = {0, 30, kVocab};
  require_error([&] { model->head().initialize(classes, counts()); },
                "the head needs 7 classes of 61 words, got 2 of 61");
  FlashLM adaptive = make(config_with("adaptive"));
  classes.offsets = {0, 11, 25, kVocab};
  require_error([&] { adaptive->head().initialize(classes, counts()); }, "cut where it is");
}

TEST_CASE("a full head from a hierarchical one and back predicts what it did", "[heads][convert_head]") {
  torch::NoGradGuard no_grad;
  FlashLM model = make(config_with("hierarchical", GENERATE(true, false)));
  const at::Tensor ids = tokens(2, 12);
  const FlashLM full = convert_head(model, "full");
  REQUIRE(full->config().head == "full");
  FlashLM back = convert_head(full, "hierarchical", classes_for("hierarchical"));
  require_close(back(ids), model(ids), 1e-5);
  // Only at h = 0 are the two kinds equal in general.
  const at::Tensor zero = torch::zeros({32});
  require_close(full->head().logits(zero).log_softmax(-1), model->head().logits(zero), 1e-5);
  REQUIRE_FALSE(at::allclose(FlashLM(full)(ids).log_softmax(-1), model(ids), 1e-3, 1e-3));
}

TEST_CASE("heads whose classes have one word, or that have one class, are equal to full ones",
          "[heads][convert_head]") {
  torch::NoGradGuard no_grad;
  ModelConfig config = config_with("full", GENERATE(true, false), GENERATE(true, false));
  FlashLM model = make(config);
  WordClasses classes = classes_for("hierarchical");
  if (GENERATE(true, false)) {
    classes.offsets = {0, kVocab};
  } else {
    classes.offsets.resize(kVocab + 1);
    for (int64_t i = 0; i <= kVocab; ++i) classes.offsets[i] = i;
  }
  const at::Tensor ids = tokens(2, 12), want = model(ids).log_softmax(-1);
  FlashLM hierarchical = convert_head(model, "hierarchical", classes);
  require_close(hierarchical(ids), want, 1e-5);
  require_close(convert_head(hierarchical, "full")(ids).log_softmax(-1), want, 1e-5);
}

TEST_CASE("conversions that are none are refused", "[heads][convert_head]") {
  const FlashLM adaptive = make(config_with("adaptive")), full = make(config_with("full"));
  require_error([&] { convert_head(adaptive, "full"); }, "got from adaptive to full");
  require_error([&] { convert_head(full, "full"); }, "got from full to full");
  require_error([&] { convert_head(full, "hierarchical"); }, "a hierarchical head needs --class-file");
}
