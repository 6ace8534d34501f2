// SPDX-License-Identifier: Apache-2.0
#include "model/torchscript.h"

#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/csrc/jit/frontend/sugared_value.h>

#include <iomanip>
#include <sstream>

#include "data/file.h"

namespace flashlm {

namespace {

/// TorchScript compiled from C++ knows the torch namespace only; this adds `flashlm`.
struct FlashlmResolver : torch::jit::Resolver {
  std::shared_ptr<torch::jit::SugaredValue> resolveValue(const std::string& name,
                                                         torch::jit::GraphFunction& function,
                                                         const torch::jit::SourceRange& where) override {
    if (name == "flashlm") return std::make_shared<torch::jit::BuiltinModule>("flashlm");
    return native_->resolveValue(name, function, where);
  }
  c10::TypePtr resolveType(const std::string& name, const torch::jit::SourceRange& where) override {
    return native_->resolveType(name, where);
  }

 private:
  std::shared_ptr<torch::jit::NativeResolver> native_ = torch::jit::nativeResolver();
};

/// Puts a tensor at a dotted path, making the modules on the way.
void register_at(torch::jit::Module module, const std::string& path, const at::Tensor& value,
                 bool is_buffer) {
  const size_t dot = path.find('.');
  if (dot == std::string::npos) {
    module.register_parameter(path, value, is_buffer);
    return;
  }
  const std::string name = path.substr(0, dot);
  if (!module.hasattr(name)) {
    module.register_module(name,
                           torch::jit::Module(c10::QualifiedName("__torch__.flashlm.Part"),
                                              module._ivalue()->compilation_unit(), /*shouldMangle=*/true));
  }
  register_at(module.attr(name).toModule(), path.substr(dot + 1), value, is_buffer);
}

/// "a.0.b" as an expression on self: digits are no attribute names in the language, so getattr takes them.
std::string attribute(const std::string& path) {
  std::string expression = "self";
  std::istringstream parts(path);
  for (std::string part; std::getline(parts, part, '.');) {
    const bool digits = part.find_first_not_of("0123456789") == std::string::npos;
    expression = digits ? "getattr(" + expression + ", \"" + part + "\")" : expression + "." + part;
  }
  return expression;
}

/// Lines of one block's forward, on `x`; `slot` counts the states used so far.
void write_block(std::ostream& code, const ModelConfig& config, const std::string& block, int64_t& slot) {
  const auto weight = [&](const std::string& name) { return attribute(block + "." + name); };
  const std::string eps = ", eps=self.norm_eps)\n";
  const auto bit_linear = [&](const std::string& x, const std::string& name) {
    return "flashlm.bit_linear(" + x + ", " + weight(name + ".weight") + ", None, quantizer=\"" +
           config.quantizer + "\", activation=\"" + config.activation + "\")";
  };
  code << "    m = flashlm.rms_norm(x, " << weight("norm1.scale") << eps;
  for (size_t i = 0; i < config.dilations.size(); ++i, ++slot) {
    const std::string layer = "token_mixer.layers." + std::to_string(i);
    code << "    before = state[" << slot << "]\n"
         << "    after.append(torch.cat([before, m], 1)[:, m.size(1):])\n"
         << "    m = flashlm.gated_conv(m, " << weight("token_mixer.norms." + std::to_string(i) + ".scale")
         << ", " << weight(layer + ".conv_gate.conv.weight") << ", "
         << weight(layer + ".conv_value.conv.weight") << ", before, dilation=" << config.dilations[i]
         << ", groups=" << config.groups << eps;
  }
  code << "    x = x + " << bit_linear("m", "token_mixer.out_proj") << "\n"
       << "    n = flashlm.rms_norm(x, " << weight("norm2.scale") << eps  //
       << "    gated = flashlm.relu2_glu(" << bit_linear("n", "glu.gate_proj") << ", "
       << bit_linear("n", "glu.up_proj") << ")\n"
       << "    x = x + " << bit_linear("gated", "glu.down_proj") << "\n";
}

/// The arguments of the head's operators, after h.
std::string head_arguments(const ModelConfig& config) {
  const auto bias = [&](const char* name) {
    return config.head_bias ? std::string("self.head.") + name : std::string("None");
  };
  if (config.head == "adaptive") {
    std::string projections, weights;
    for (size_t i = 0; i < config.cutoffs.size(); ++i) {
      const std::string tail = "head.tails." + std::to_string(i);
      projections += attribute(tail + ".projection") + ", ";
      weights += attribute(tail + ".weight") + ", ";
    }
    return "self.head.weight, " + bias("bias") + ", [" + projections + "], [" + weights + "]";
  }
  const std::string table = config.tied ? "self.embedding.weight" : "self.head.word_weight";
  return "self.head.class_weight, " + bias("class_bias") + ", " + table + ", " + bias("word_bias") +
         ", self.head.class_words, self.head.class_offsets";
}

/// logits(h) and draw(h, ...), the token drawn for each row of h.
std::string head_source(const ModelConfig& config) {
  const std::string logits = "def logits(self, h: Tensor) -> Tensor:\n    return ";
  const std::string draw =
      "def draw(self, h: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:\n    return ";
  const std::string draw_from_logits = draw + "self.sample(self.logits(h), temperature, top_k, top_p)\n\n";
  const std::string arguments = head_arguments(config);
  if (config.head == "hierarchical") {
    return logits + "flashlm.hierarchical_log_prob(h, " + arguments + ")\n\n" + draw +
           "flashlm.hierarchical_sample(h, " + arguments +
           ", temperature=temperature, top_k=top_k, top_p=top_p).unsqueeze(-1)\n\n";
  }
  if (config.head == "adaptive") {
    return logits + "flashlm.adaptive_log_prob(h, " + arguments +
           ").index_select(-1, self.head.word_rank)\n\n" + draw_from_logits;
  }
  return logits + "torch.linear(h, " + (config.tied ? "self.embedding.weight" : "self.head.weight") + ", " +
         (config.head_bias ? "self.head.bias" : "None") + ")\n\n" + draw_from_logits;
}

std::string source(const ModelConfig& config) {
  std::ostringstream code;
  code << "def hidden(self, tokens: Tensor, state: List[Tensor]) -> Tuple[Tensor, List[Tensor]]:\n"
       << "    after: List[Tensor] = []\n"
       << "    x = torch.embedding(self.embedding.weight, tokens) * self.embedding_scale\n";
  int64_t slot = 0;
  for (int64_t pass = 0; pass < config.recursions; ++pass) {
    for (int64_t i = 0; i < config.layers; ++i) {
      write_block(code, config, config.layers == 1 ? "block" : "blocks." + std::to_string(i), slot);
    }
  }
  code << "    return flashlm.rms_norm(x, self.final_norm.scale, eps=self.norm_eps), after\n";
  code << R"(
def initial_state(self, batch: int) -> List[Tensor]:
    state: List[Tensor] = []
    for length in self.state_lengths:
        state.append(torch.zeros([batch, length, self.d_model]))
    return state

def step(self, tokens: Tensor, state: List[Tensor]) -> Tuple[Tensor, List[Tensor]]:
    h, state = self.hidden(tokens, state)
    return self.logits(h), state

def forward(self, tokens: Tensor) -> Tensor:
    return self.step(tokens, self.initial_state(tokens.size(0)))[0]

def sample(self, logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    if temperature == 0.0:
        return torch.argmax(logits, -1, True)
    ordered, order = torch.sort(logits / temperature, -1, True)
    if top_k > 0:
        ordered = ordered[:, :top_k]
    p = torch.softmax(ordered, -1)
    if top_p < 1.0:
        p = p * ((torch.cumsum(p, -1) - p) < top_p)
    return torch.gather(order, -1, torch.multinomial(p, 1))

def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 0.8, top_k: int = 0,
             top_p: float = 1.0) -> Tensor:
    state = self.initial_state(tokens.size(0))
    out = [tokens]
    for _ in range(max_new_tokens):
        h, state = self.hidden(out[-1], state)
        out.append(self.draw(h[:, -1], temperature, top_k, top_p))
    return torch.cat(out, 1)
)";
  return code.str() + "\n" + head_source(config);
}

}  // namespace

torch::jit::Module to_torchscript(const FlashLM& model) {
  const ModelConfig& config = model->config();
  torch::jit::Module module("flashlm.FlashLM");
  for (const auto& p : model->named_parameters()) {
    register_at(module, p.key(), p.value().detach().clone(), /*is_buffer=*/false);
  }
  for (const auto& b : model->named_buffers())
    register_at(module, b.key(), b.value().clone(), /*is_buffer=*/true);
  std::vector<int64_t> lengths;
  for (const auto& history : model->initial_state(1)) lengths.push_back(history.size(1));
  module.register_attribute("state_lengths", c10::ListType::ofInts(), c10::List<int64_t>(lengths));
  module.register_attribute("d_model", c10::IntType::get(), config.d_model);
  module.register_attribute("norm_eps", c10::FloatType::get(), config.norm_eps);
  module.register_attribute("embedding_scale", c10::FloatType::get(), config.embedding_scale);
  module.define(source(config), std::make_shared<FlashlmResolver>());
  module.eval();
  return module;
}

void export_torchscript(const FlashLM& model, const std::string& tokenizer,
                        const std::filesystem::path& path) {
  torch::jit::ExtraFilesMap extra = {{"config.json", to_json(model->config())}};
  if (!tokenizer.empty()) extra["tokenizer.model"] = tokenizer;
  std::ostringstream archive;
  to_torchscript(model).save(archive, extra);
  write_file(path, archive.view());
}

}  // namespace flashlm
