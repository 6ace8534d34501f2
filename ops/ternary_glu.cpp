// SPDX-License-Identifier: Apache-2.0
// The public operator is a composite over _ternary_glu_forward, which also returns gate and up, if there will
// be a backward pass. Rows go through all three products a block at a time, in cache.
#include "ops/ternary_glu.h"

#include "ops/ternary_products.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "ternary_glu(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight, "
      "Tensor? norm_scale=None, Tensor? up_norm_scale=None, Tensor? down_norm_scale=None, *, "
      "str nonlinearity=\"relu2\", str quantizer=\"absmean\", str activation=\"int8\", float eps=1e-6, "
      "str gradient=\"float32\") -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_ternary_glu_forward(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight, "
      "Tensor? norm_scale, Tensor? up_norm_scale, Tensor? down_norm_scale, str nonlinearity, str quantizer, "
      "str activation, float eps, str gradient, bool with_gates) -> (Tensor y, Tensor gate, Tensor up)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_ternary_glu_backward(Tensor grad_y, Tensor x, Tensor gate, Tensor up, Tensor gate_weight, "
      "Tensor up_weight, Tensor down_weight, Tensor? norm_scale, Tensor? up_norm_scale, "
      "Tensor? down_norm_scale, str nonlinearity, str quantizer, str activation, float eps, str gradient) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

at::Tensor ternary_glu(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                       const at::Tensor& down_weight, const std::optional<at::Tensor>& norm_scale,
                       const std::optional<at::Tensor>& up_norm_scale,
                       const std::optional<at::Tensor>& down_norm_scale, std::string_view nonlinearity,
                       std::string_view quantizer, std::string_view activation, double eps,
                       std::string_view gradient) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::ternary_glu", "")
                             .typed<decltype(ternary_glu)>();
  return op.call(x, gate_weight, up_weight, down_weight, norm_scale, up_norm_scale, down_norm_scale,
                 nonlinearity, quantizer, activation, eps, gradient);
}

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Gradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs forward(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                const at::Tensor& down_weight, const OptionalTensor& norm_scale,
                const OptionalTensor& up_norm_scale, const OptionalTensor& down_norm_scale,
                std::string_view nonlinearity, std::string_view quantizer, std::string_view activation,
                double eps, std::string_view gradient, bool with_gates) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_ternary_glu_forward", "")
                             .typed<decltype(forward)>();
  return op.call(x, gate_weight, up_weight, down_weight, norm_scale, up_norm_scale, down_norm_scale,
                 nonlinearity, quantizer, activation, eps, gradient, with_gates);
}

Gradients backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& gate,
                   const at::Tensor& up, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                   const at::Tensor& down_weight, const OptionalTensor& norm_scale,
                   const OptionalTensor& up_norm_scale, const OptionalTensor& down_norm_scale,
                   std::string_view nonlinearity, std::string_view quantizer, std::string_view activation,
                   double eps, std::string_view gradient) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_ternary_glu_backward", "")
                             .typed<decltype(backward)>();
  return op.call(grad_y, x, gate, up, gate_weight, up_weight, down_weight, norm_scale, up_norm_scale,
                 down_norm_scale, nonlinearity, quantizer, activation, eps, gradient);
}

at::Tensor composite(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                     const at::Tensor& down_weight, const OptionalTensor& norm_scale,
                     const OptionalTensor& up_norm_scale, const OptionalTensor& down_norm_scale,
                     std::string_view nonlinearity, std::string_view quantizer, std::string_view activation,
                     double eps, std::string_view gradient) {
  const auto needs_gradient = [](const OptionalTensor& t) { return t && t->requires_grad(); };
  const bool with_gates = at::GradMode::is_enabled() &&
                          (needs_gradient(x) || needs_gradient(gate_weight) || needs_gradient(up_weight) ||
                           needs_gradient(down_weight) || needs_gradient(norm_scale) ||
                           needs_gradient(up_norm_scale) || needs_gradient(down_norm_scale));
  return std::get<0>(forward(x, gate_weight, up_weight, down_weight, norm_scale, up_norm_scale,
                             down_norm_scale, nonlinearity, quantizer, activation, eps, gradient,
                             with_gates));
}

void check_arguments(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                     const at::Tensor& down_weight, const OptionalTensor& norm_scale,
                     const OptionalTensor& up_norm_scale, const OptionalTensor& down_norm_scale,
                     std::string_view nonlinearity, std::string_view quantizer, std::string_view activation,
                     double eps, std::string_view gradient) {
  constexpr const char* kOp = "ternary_glu";
  check_floating(kOp, "x", x);
  TORCH_CHECK(x.dim() >= 1, kOp, ": x must have at least 1 dimension, got 0");
  check_same_dtype(kOp, "gate_weight", gate_weight, x);
  check_dim(kOp, "gate_weight", gate_weight, 2);
  const c10::SymInt width = gate_weight.sym_size(1), inner = gate_weight.sym_size(0);
  TORCH_SYM_CHECK(width.sym_ge(1), kOp, ": gate_weight's in must be at least 1, got ", width);
  TORCH_SYM_CHECK(inner.sym_ge(1), kOp, ": gate_weight's out must be at least 1, got ", inner);
  TORCH_SYM_CHECK(x.sym_size(-1).sym_eq(width), kOp,
                  ": x's last dimension must be gate_weight's in = ", width, ", got ", x.sym_size(-1));
  const auto check_weight = [&](const char* name, const at::Tensor& weight, const c10::SymInt& out,
                                const c10::SymInt& in) {
    check_same_dtype(kOp, name, weight, x);
    check_dim(kOp, name, weight, 2);
    const auto rule = [&] {
      std::ostringstream text;
      text << kOp << ": " << name << " must be (" << out << ", " << in << "), as gate_weight has it, got ("
           << weight.sym_size(0) << ", " << weight.sym_size(1) << ")";
      return text.str();
    };
    TORCH_SYM_CHECK(weight.sym_size(0).sym_eq(out), rule());
    TORCH_SYM_CHECK(weight.sym_size(1).sym_eq(in), rule());
  };
  check_weight("up_weight", up_weight, inner, width);
  check_weight("down_weight", down_weight, width, inner);
  if (norm_scale) check_norm_scale(kOp, "norm_scale", *norm_scale, x, width);
  if (up_norm_scale) check_norm_scale(kOp, "up_norm_scale", *up_norm_scale, x, width);
  if (down_norm_scale) check_norm_scale(kOp, "down_norm_scale", *down_norm_scale, x, inner);
  TORCH_CHECK(nonlinearity == "relu2" || nonlinearity == "silu" || nonlinearity == "sigmoid", kOp,
              ": nonlinearity must be 'relu2', 'silu' or 'sigmoid', got '", nonlinearity, "'");
  check_modes(kOp, width, quantizer, activation, eps, gradient);
  check_modes(kOp, inner, quantizer, activation, eps, gradient);
}

/// Rows that go from x to y together: their gate, up and h stay in a level-2 cache beside the weights. No
/// more than products take.
constexpr int64_t kBlockRows = 48;
static_assert(kBlockRows <= kRowBlock);

/// Of what is kept of gate and up.
at::ScalarType gate_dtype(const at::Tensor& x, std::string_view gradient) {
  return gradient == "float32" || x.scalar_type() == at::kDouble ? compute_dtype(x) : at::kBFloat16;
}

/// Checks the arguments and makes the outputs: the Meta kernel, and the CPU kernel's first line.
Outputs new_outputs(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                    const at::Tensor& down_weight, const OptionalTensor& norm_scale,
                    const OptionalTensor& up_norm_scale, const OptionalTensor& down_norm_scale,
                    std::string_view nonlinearity, std::string_view quantizer, std::string_view activation,
                    double eps, std::string_view gradient, bool with_gates) {
  check_arguments(x, gate_weight, up_weight, down_weight, norm_scale, up_norm_scale, down_norm_scale,
                  nonlinearity, quantizer, activation, eps, gradient);
  const auto options = x.options().dtype(gate_dtype(x, gradient));
  const c10::SymInt rows = with_gates ? x.sym_numel() / gate_weight.sym_size(1) : c10::SymInt(0);
  const auto new_gate = [&] { return x.new_empty_symint({rows, gate_weight.sym_size(0)}, options); };
  return {x.new_empty_symint(x.sym_sizes()), new_gate(), new_gate()};
}

/// The three products as the kernels read them. `down` has no x: h is made a few rows at a time.
struct Layers {
  Layers(const at::Tensor& x, const at::Tensor& gate_weight, const OptionalTensor& norm_scale,
         const OptionalTensor& up_norm_scale, const OptionalTensor& down_norm_scale,
         std::string_view quantizer, std::string_view activation, double eps, std::string_view gradient)
      : share_rows(!up_norm_scale) {
    const int64_t width = gate_weight.size(1), inner = gate_weight.size(0), rows = x.numel() / width;
    gate.x = kernel_input(x, x).view({rows, width});
    gate.m = rows, gate.n = inner, gate.k = width;
    gate.eps = eps;
    gate.int8 = parse_activation("ternary_glu", activation);
    gate.quantizer = parse_quantizer("ternary_glu", quantizer);
    gate.gradient = parse_gradient("ternary_glu", gradient);
    up = down = gate;
    down.x = at::Tensor();
    std::swap(down.n, down.k);
    if (norm_scale) gate.norm_scale = up.norm_scale = kernel_input(*norm_scale, x);
    if (up_norm_scale) up.norm_scale = kernel_input(*up_norm_scale, x);
    if (down_norm_scale) down.norm_scale = kernel_input(*down_norm_scale, x);
  }

  TernaryLayer gate, up, down;
  bool share_rows;  // gate and up
};

template <class T>
const kernels::Glu<T>& glu_kernels(std::string_view nonlinearity) {
  const auto& table = kernels::table<T>();
  return nonlinearity == "relu2"  ? table.relu2_glu
         : nonlinearity == "silu" ? table.silu_glu
                                  : table.sigmoid_glu;
}

// ---- what is kept of gate and up ----

template <class T>
void keep(int64_t n, const T* from, const at::Tensor& to, int64_t offset) {
  if (to.scalar_type() == at::kBFloat16) {
    if constexpr (std::is_same_v<T, float>) {
      auto* bits = reinterpret_cast<uint16_t*>(to.mutable_data_ptr<at::BFloat16>());
      kernels::table<T>().to_bf16(n, from, bits + offset);
    }
  } else {
    std::copy_n(from, n, to.mutable_data_ptr<T>() + offset);
  }
}

template <class T>
void take(int64_t n, const at::Tensor& from, int64_t offset, T* to) {
  if (from.scalar_type() == at::kBFloat16) {
    if constexpr (std::is_same_v<T, float>) {
      const auto* bits = reinterpret_cast<const uint16_t*>(from.const_data_ptr<at::BFloat16>());
      kernels::table<T>().from_bf16(n, bits + offset, to);
    }
  } else {
    std::copy_n(from.const_data_ptr<T>() + offset, n, to);
  }
}

// ---- forward ----

template <class T>
void run_forward(const Layers& layers, const kernels::Glu<T>& glu, const at::Tensor& gate_weight,
                 const at::Tensor& up_weight, const at::Tensor& down_weight, T* y,
                 const at::Tensor& kept_gate, const at::Tensor& kept_up) {
  const int64_t width = layers.gate.k, inner = layers.gate.n;
  const ForwardProduct<T> gate(layers.gate, gate_weight), up(layers.up, up_weight),
      down(layers.down, down_weight);
  const T* const x = layers.gate.x.const_data_ptr<T>();
  at::parallel_for(0, layers.gate.m, kBlockRows, [&](int64_t first, int64_t last) {
    LayerRows<T> gate_rows(layers.gate, kBlockRows);
    std::optional<LayerRows<T>> up_rows;
    if (!layers.share_rows) up_rows.emplace(layers.up, kBlockRows);
    Scratch<T> gates(kBlockRows * inner), ups(kBlockRows * inner), h(kBlockRows * inner);
    LayerRows<T> down_rows(layers.down, kBlockRows);
    const auto gate_workspace = gate.workspace(), down_workspace = down.workspace();
    for_row_blocks(first, last, kBlockRows, [&](int64_t begin, int64_t end) {
      const int64_t count = end - begin, inners = count * inner;
      const ProductRows<T> a = gate_rows(begin, end);
      gate(count, a, gates.data, gate_workspace);
      up(count, up_rows ? (*up_rows)(begin, end) : a, ups.data, gate_workspace);
      if (kept_gate.size(0) > 0) {
        keep<T>(inners, gates.data, kept_gate, begin * inner);
        keep<T>(inners, ups.data, kept_up, begin * inner);
      }
      glu.forward(inners, gates.data, ups.data, h.data);
      T* const to = y + begin * width;
      down(count, down_rows.of(count, h.data), to, down_workspace);
      for (int64_t i = 0; i < count * width; ++i) to[i] = x[begin * width + i] + to[i];
    });
  });
}

Outputs forward_cpu(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                    const at::Tensor& down_weight, const OptionalTensor& norm_scale,
                    const OptionalTensor& up_norm_scale, const OptionalTensor& down_norm_scale,
                    std::string_view nonlinearity, std::string_view quantizer, std::string_view activation,
                    double eps, std::string_view gradient, bool with_gates) {
  auto out = new_outputs(x, gate_weight, up_weight, down_weight, norm_scale, up_norm_scale, down_norm_scale,
                         nonlinearity, quantizer, activation, eps, gradient, with_gates);
  auto& [y, gate, up] = out;
  if (x.numel() == 0) return out;
  const Layers layers(x, gate_weight, norm_scale, up_norm_scale, down_norm_scale, quantizer, activation, eps,
                      gradient);
  const at::Tensor computed = kernel_output(y);
  prefer_huge_pages(gate);
  prefer_huge_pages(up);
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    run_forward<T>(layers, glu_kernels<T>(nonlinearity), gate_weight, up_weight, down_weight,
                   computed.mutable_data_ptr<T>(), gate, up);
  });
  y = computed.to(y.scalar_type());
  return out;
}

// ---- backward ----

Gradients new_gradients(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& gate,
                        const at::Tensor& up, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                        const at::Tensor& down_weight, const OptionalTensor& norm_scale,
                        const OptionalTensor& up_norm_scale, const OptionalTensor& down_norm_scale,
                        std::string_view nonlinearity, std::string_view quantizer,
                        std::string_view activation, double eps, std::string_view gradient) {
  check_arguments(x, gate_weight, up_weight, down_weight, norm_scale, up_norm_scale, down_norm_scale,
                  nonlinearity, quantizer, activation, eps, gradient);
  check_same_dtype("_ternary_glu_backward", "grad_y", grad_y, x);
  check_size("_ternary_glu_backward", "gate's rows", gate.sym_size(0),
             x.sym_numel() / gate_weight.sym_size(1));
  check_size("_ternary_glu_backward", "up's rows", up.sym_size(0), gate.sym_size(0));
  const auto like = [](const at::Tensor& t) { return t.new_empty_symint(t.sym_sizes()); };
  const auto like_scale = [&](const OptionalTensor& t) { return t ? like(*t) : x.new_empty({0}); };
  return {x.new_empty_symint(x.sym_sizes()),
          like(gate_weight),
          like(up_weight),
          like(down_weight),
          like_scale(norm_scale),
          like_scale(up_norm_scale),
          like_scale(down_norm_scale)};
}

/// Rows whose gradients of gate and up, and h, are held at once: whole blocks, here and in PackedRows.
constexpr int64_t kHeldRows = 6 * kDepth;
static_assert(kHeldRows % kBlockRows == 0);

/// The gradient of a norm's scale: each block of rows has a sum of its own, and those are added in order, so
/// that it is the same for any number of threads.
template <class T>
class ScaleGradient {
 public:
  /// Into total (width); nothing if that is null.
  ScaleGradient(T* total, int64_t blocks, int64_t width)
      : total_(total), width_(width), sums_(total != nullptr ? blocks * width : 0) {
    std::fill_n(total, sums_.empty() ? 0 : width, T(0));
  }

  T* block(int64_t i) { return total_ != nullptr ? sums_.data() + i * width_ : nullptr; }

  /// Adds the blocks' sums to the total, and makes them zero.
  void add() {
    for (size_t i = 0; i < sums_.size(); ++i) total_[i % width_] += sums_[i];
    std::fill(sums_.begin(), sums_.end(), T(0));
  }

 private:
  T* total_;
  int64_t width_;
  std::vector<T> sums_;
};

/// grad_x (rows, K) = residual + what grad_a brings it, through the layer's norm if it has one; with a norm,
/// residual may be null.
template <class T>
void rows_gradient(const TernaryLayer& layer, int64_t begin, int64_t rows, const T* grad_a, const T* residual,
                   T* grad_x, T* grad_scale) {
  if (layer.norm_scale.defined()) {
    kernels::table<T>().rms_norm_residual_backward(
        rows, layer.k, grad_a, layer.x.const_data_ptr<T>() + begin * layer.k,
        layer.norm_scale.const_data_ptr<T>(), static_cast<T>(layer.eps), residual, grad_x, grad_scale);
  } else {
    for (int64_t i = 0; i < rows * layer.k; ++i) grad_x[i] = residual[i] + grad_a[i];
  }
}

/// Where the gradients of parameters go; a scale's is null if there is no such scale.
template <class T>
struct ParameterGradients {
  T *gate_weight, *up_weight, *down_weight, *norm_scale, *up_norm_scale, *down_norm_scale;
};

template <class T>
void run_backward(Layers& layers, const kernels::Glu<T>& glu, const at::Tensor& gate_weight,
                  const at::Tensor& up_weight, const at::Tensor& down_weight, const at::Tensor& kept_gate,
                  const at::Tensor& kept_up, const T* grad_y, T* grad_x, const ParameterGradients<T>& grad) {
  const int64_t m = layers.gate.m, width = layers.gate.k, inner = layers.gate.n,
                held = std::min(m, kHeldRows);
  const BackwardProduct<T> gate(layers.gate, gate_weight), up(layers.up, up_weight),
      down(layers.down, down_weight);
  Scratch<T> grad_gate(held * inner), grad_up(held * inner), h(held * inner);
  layers.down.x = h.memory;
  PackedRows<T> gate_rows(layers.gate, held), down_rows(layers.down, held);
  std::optional<PackedRows<T>> up_rows;
  if (!layers.share_rows) up_rows.emplace(layers.up, held);
  const int64_t blocks = (held + kBlockRows - 1) / kBlockRows;
  ScaleGradient<T> norm(grad.norm_scale, blocks, width), up_norm(grad.up_norm_scale, blocks, width),
      down_norm(grad.down_norm_scale, blocks, inner);

  for_row_blocks(0, m, kHeldRows, [&](int64_t first, int64_t last) {
    at::parallel_for(0, (last - first + kBlockRows - 1) / kBlockRows, 1, [&](int64_t from, int64_t to) {
      auto gate_memory = gate.memory(), down_memory = down.memory();
      Scratch<T> grad_h(kBlockRows * inner), by_gate(kBlockRows * width), by_up(kBlockRows * width);
      for (int64_t block = from; block < to; ++block) {
        const int64_t at = block * kBlockRows, begin = first + at, count = std::min(kBlockRows, last - begin);
        const int64_t inners = count * inner, widths = count * width;
        T *const g = grad_gate.data + at * inner, *const u = grad_up.data + at * inner;
        const T* const dy = grad_y + begin * width;
        T* const dx = grad_x + begin * width;
        down(count, dy, grad_h.data, down_memory);
        take<T>(inners, kept_gate, begin * inner, g);
        take<T>(inners, kept_up, begin * inner, u);
        glu.forward(inners, g, u, h.data + at * inner);
        if (layers.down.norm_scale.defined()) {
          rows_gradient<T>(layers.down, at, count, grad_h.data, /*residual=*/nullptr, grad_h.data,
                           down_norm.block(block));
        }
        glu.backward(inners, grad_h.data, g, u, g, u);
        gate(count, g, by_gate.data, gate_memory);
        up(count, u, by_up.data, gate_memory);
        if (layers.share_rows) {
          for (int64_t i = 0; i < widths; ++i) by_gate.data[i] += by_up.data[i];
        }
        rows_gradient<T>(layers.gate, begin, count, by_gate.data, dy, dx, norm.block(block));
        if (!layers.share_rows) {
          rows_gradient<T>(layers.up, begin, count, by_up.data, dx, dx, up_norm.block(block));
        }
      }
    });
    for (ScaleGradient<T>* scale : {&norm, &up_norm, &down_norm}) scale->add();
    const bool add = first > 0;
    gate_rows.pack(first, last);
    gate_rows.weight_gradient(grad_gate.data, grad.gate_weight, add);
    if (up_rows) up_rows->pack(first, last);
    (up_rows ? *up_rows : gate_rows).weight_gradient(grad_up.data, grad.up_weight, add);
    down_rows.pack(0, last - first);
    down_rows.weight_gradient(grad_y + first * width, grad.down_weight, add);
  });
}

Gradients backward_cpu(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& gate,
                       const at::Tensor& up, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                       const at::Tensor& down_weight, const OptionalTensor& norm_scale,
                       const OptionalTensor& up_norm_scale, const OptionalTensor& down_norm_scale,
                       std::string_view nonlinearity, std::string_view quantizer, std::string_view activation,
                       double eps, std::string_view gradient) {
  auto out =
      new_gradients(grad_y, x, gate, up, gate_weight, up_weight, down_weight, norm_scale, up_norm_scale,
                    down_norm_scale, nonlinearity, quantizer, activation, eps, gradient);
  auto& [grad_x, grad_gate_weight, grad_up_weight, grad_down_weight, grad_norm, grad_up_norm,
         grad_down_norm] = out;
  if (x.numel() == 0) {
    for (at::Tensor* grad : {&grad_gate_weight, &grad_up_weight, &grad_down_weight, &grad_norm, &grad_up_norm,
                             &grad_down_norm}) {
      grad->zero_();
    }
    return out;
  }
  Layers layers(x, gate_weight, norm_scale, up_norm_scale, down_norm_scale, quantizer, activation, eps,
                gradient);
  const at::Tensor g = kernel_input(grad_y, x);
  const at::Tensor dx = kernel_output(grad_x), dgate = kernel_output(grad_gate_weight),
                   dup = kernel_output(grad_up_weight), ddown = kernel_output(grad_down_weight),
                   dnorm = kernel_output(grad_norm), dup_norm = kernel_output(grad_up_norm),
                   ddown_norm = kernel_output(grad_down_norm);
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const auto of_scale = [](const OptionalTensor& scale, const at::Tensor& grad) {
      return scale ? grad.mutable_data_ptr<T>() : nullptr;
    };
    run_backward<T>(layers, glu_kernels<T>(nonlinearity), gate_weight, up_weight, down_weight,
                    gate.contiguous(), up.contiguous(), g.const_data_ptr<T>(), dx.mutable_data_ptr<T>(),
                    {dgate.mutable_data_ptr<T>(), dup.mutable_data_ptr<T>(), ddown.mutable_data_ptr<T>(),
                     of_scale(norm_scale, dnorm), of_scale(up_norm_scale, dup_norm),
                     of_scale(down_norm_scale, ddown_norm)});
  });
  const auto dtype = x.scalar_type();
  return {dx.to(dtype),    dgate.to(dtype),    dup.to(dtype),       ddown.to(dtype),
          dnorm.to(dtype), dup_norm.to(dtype), ddown_norm.to(dtype)};
}

// ---- autograd ----

struct TernaryGlu : torch::autograd::Function<TernaryGlu> {
  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& gate_weight,
      const at::Tensor& up_weight, const at::Tensor& down_weight, const OptionalTensor& norm_scale,
      const OptionalTensor& up_norm_scale, const OptionalTensor& down_norm_scale,
      const std::string& nonlinearity, const std::string& quantizer, const std::string& activation,
      double eps, const std::string& gradient, bool with_gates) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, gate, up] =
        flashlm::forward(x, gate_weight, up_weight, down_weight, norm_scale, up_norm_scale, down_norm_scale,
                         nonlinearity, quantizer, activation, eps, gradient, with_gates);
    ctx->mark_non_differentiable({gate, up});
    ctx->set_materialize_grads(false);  // else backward gets zeros of gate's size
    const auto or_none = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    ctx->save_for_backward({x, gate, up, gate_weight, up_weight, down_weight, or_none(norm_scale),
                            or_none(up_norm_scale), or_none(down_norm_scale)});
    ctx->saved_data["nonlinearity"] = nonlinearity;
    ctx->saved_data["quantizer"] = quantizer;
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["gradient"] = gradient;
    return {y, gate, up};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    if (!grads[0].defined()) return torch::autograd::variable_list(13);
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto [grad_x, grad_gate, grad_up, grad_down, grad_norm, grad_up_norm, grad_down_norm] =
        flashlm::backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
                          if_defined(saved[6]), if_defined(saved[7]), if_defined(saved[8]),
                          data["nonlinearity"].toStringView(), data["quantizer"].toStringView(),
                          data["activation"].toStringView(), data["eps"].toDouble(),
                          data["gradient"].toStringView());
    const auto if_given = [&](size_t i, const at::Tensor& grad) {
      return saved[i].defined() ? grad : no_grad();
    };
    return {grad_x,
            grad_gate,
            grad_up,
            grad_down,
            if_given(6, grad_norm),
            if_given(7, grad_up_norm),
            if_given(8, grad_down_norm),
            no_grad(),
            no_grad(),
            no_grad(),
            no_grad(),
            no_grad(),
            no_grad()};
  }
};

Outputs forward_autograd(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                         const at::Tensor& down_weight, const OptionalTensor& norm_scale,
                         const OptionalTensor& up_norm_scale, const OptionalTensor& down_norm_scale,
                         std::string_view nonlinearity, std::string_view quantizer,
                         std::string_view activation, double eps, std::string_view gradient,
                         bool with_gates) {
  auto out = TernaryGlu::apply(x, gate_weight, up_weight, down_weight, norm_scale, up_norm_scale,
                               down_norm_scale, std::string(nonlinearity), std::string(quantizer),
                               std::string(activation), eps, std::string(gradient), with_gates);
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CompositeImplicitAutograd, m) { m.impl("ternary_glu", composite); }
TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("_ternary_glu_forward", forward_cpu);
  m.impl("_ternary_glu_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("_ternary_glu_forward", new_outputs);
  m.impl("_ternary_glu_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("_ternary_glu_forward", forward_autograd);
  m.impl("_ternary_glu_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm
