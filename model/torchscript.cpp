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

/// The product of a ternary layer named `path`, as an expression: bit_linear or packed_linear, and its bias.
std::string ternary_product(const ModelConfig& config, const std::string& x, const std::string& path,
                            bool has_norm, const std::string& out_features, bool has_bias = false) {
  const auto weight = [&](const char* name) { return attribute(path + "." + name); };
  const std::string norm = has_norm ? weight("norm_scale") : "None";
  std::ostringstream end;
  end << "activation=\"" << config.activation << "\", eps=" << kLinearNormEps << ")";
  std::string product = config.packed
                            ? "flashlm.packed_linear(" + x + ", " + weight("packed") + ", " +
                                  weight("scale") + ", " + out_features + ", " + norm + ", " + end.str()
                            : "flashlm.bit_linear(" + x + ", " + weight("weight") + ", " + norm +
                                  ", quantizer=\"" + config.quantizer + "\", " + end.str();
  return has_bias ? product + " + " + weight("bias") : product;
}

/// Writes the lines of a block's forward, on `x`, with the states from `state` to `after`.
class BlockWriter {
 public:
  BlockWriter(std::ostream& code, const ModelConfig& config) : code_(code), config_(config) {}

  void write(const std::string& block, int64_t layer) {
    block_ = block;
    const bool has_norms = config_.block != "matmulfree";
    const auto normed = [&](const char* norm) {
      return has_norms ? "flashlm.rms_norm(x, " + weight(std::string(norm) + ".scale") + eps() : "x";
    };
    code_ << "    m = " << normed("norm1") << "\n";
    config_.mixer(layer) == "mlgru" ? write_mlgru(layer) : write_conv();
    code_ << "    n = " << normed("norm2") << "\n";
    write_glu();
  }

 private:
  std::string eps() const { return ", eps=self.norm_eps)"; }
  std::string weight(const std::string& name) const { return attribute(block_ + "." + name); }
  std::string bit_linear(const std::string& x, const std::string& name, int64_t out,
                         bool has_bias = false) const {
    return ternary_product(config_, x, block_ + "." + name, config_.block != "v3", std::to_string(out),
                           has_bias);
  }

  void write_conv() {
    for (size_t i = 0; i < config_.dilations.size(); ++i, ++slot_) {
      const std::string layer = "token_mixer.layers." + std::to_string(i);
      code_ << "    before = state[" << slot_ << "]\n"
            << "    after.append(torch.cat([before, m], 1)[:, m.size(1):])\n"
            << "    m = flashlm.gated_conv(m, " << weight("token_mixer.norms." + std::to_string(i) + ".scale")
            << ", " << weight(layer + ".conv_gate.conv.weight") << ", "
            << weight(layer + ".conv_value.conv.weight") << ", before, dilation=" << config_.dilations[i]
            << ", groups=" << config_.groups << ", precision=\"" << config_.conv_precision << "\"" << eps()
            << "\n";
    }
    code_ << "    x = x + " << bit_linear("m", "token_mixer.out_proj", config_.d_model) << "\n";
  }

  void write_mlgru(int64_t layer) {
    const auto projection = [&](const char* x, const char* name) {
      return bit_linear(x, std::string("token_mixer.") + name, config_.d_model,
                        config_.block == "matmulfree");
    };
    const bool hgrn = config_.block == "hgrn-bit";
    code_ << "    h, last = flashlm.mlgru(" << projection("m", "f_proj") << ", " << projection("m", "c_proj")
          << ", state[" << slot_ << "].squeeze(1), "
          << (hgrn ? "lower_bounds[" + std::to_string(layer) + "]" : "None") << ", activation=\"silu\")\n"
          << "    after.append(last.unsqueeze(1))\n"
          << "    g = " << projection("m", "g_proj") << "\n";
    if (hgrn) {
      code_ << "    gated = flashlm.silu_glu(h, flashlm.rms_norm(g, " << weight("token_mixer.g_norm.scale")
            << eps() << ")\n";
    } else {
      code_ << "    gated = flashlm.sigmoid_glu(g, h)\n";
    }
    code_ << "    x = x + " << projection("gated", "o_proj") << "\n";
    ++slot_;
  }

  void write_glu() {
    if (config_.block == "hgrn-bit") {
      code_ << "    gate, up = torch.chunk(" << bit_linear("n", "glu.gate_up_proj", 2 * config_.d_inner)
            << ", 2, -1)\n";
    } else {
      code_ << "    gate = " << bit_linear("n", "glu.gate_proj", config_.d_inner) << "\n"
            << "    up = " << bit_linear("n", "glu.up_proj", config_.d_inner) << "\n";
    }
    code_ << "    gated = flashlm." << (config_.block == "v3" ? "relu2_glu" : "silu_glu") << "(gate, up)\n"
          << "    x = x + " << bit_linear("gated", "glu.down_proj", config_.d_model) << "\n";
  }

  std::ostream& code_;
  const ModelConfig& config_;
  std::string block_;
  int64_t slot_ = 0;  // states used so far
};

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
  if (config.head_quantizer != "none") {
    ModelConfig head = config;
    head.quantizer = config.head_quantizer;
    head.activation = "int8";
    return logits +
           ternary_product(head, "h", "head", /*has_norm=*/true, std::to_string(config.vocab_size),
                           config.head_bias) +
           "\n\n" + draw_from_logits;
  }
  return logits + "torch.linear(h, " + (config.tied ? "self.embedding.weight" : "self.head.weight") + ", " +
         (config.head_bias ? "self.head.bias" : "None") + ")\n\n" + draw_from_logits;
}

std::string source(const ModelConfig& config, bool has_lower_bounds) {
  std::ostringstream code;
  code << "def hidden(self, tokens: Tensor, state: List[Tensor]) -> Tuple[Tensor, List[Tensor]]:\n"
       << "    after: List[Tensor] = []\n"
       << "    x = torch.embedding(self.embedding.weight, tokens) * self.embedding_scale\n";
  if (has_lower_bounds) {
    code << "    p = torch.softmax(self.lower_bounds, 0)\n"
         << "    lower_bounds = torch.cumsum(p, 0) - p[0]\n";
  }
  BlockWriter writer(code, config);
  for (int64_t pass = 0; pass < config.recursions; ++pass) {
    for (int64_t i = 0; i < config.layers; ++i) {
      writer.write(config.layers == 1 ? "block" : "blocks." + std::to_string(i), i);
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
  for (const auto& kept : model->initial_state(1)) lengths.push_back(kept.size(1));
  module.register_attribute("state_lengths", c10::ListType::ofInts(), c10::List<int64_t>(lengths));
  module.register_attribute("d_model", c10::IntType::get(), config.d_model);
  module.register_attribute("norm_eps", c10::FloatType::get(), config.norm_eps);
  module.register_attribute("embedding_scale", c10::FloatType::get(), config.embedding_scale);
  module.define(source(config, module.hasattr("lower_bounds")), std::make_shared<FlashlmResolver>());
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
