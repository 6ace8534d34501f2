// SPDX-License-Identifier: Apache-2.0
// The public operator is a composite over _gated_conv_forward, which also returns the slopes of the gate, in
// bfloat16, that a backward pass in bfloat16 multiplies by: (B, G, T, [dy/dgate, dy/dvalue], D/G), where gate
// and value are the two convolutions. Without slopes, of size 0, the backward pass is in float32 and computes
// the convolutions again.
#include "ops/gated_conv.h"

#include "ops/conv.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "gated_conv(Tensor x, Tensor norm_scale, Tensor gate_weight, Tensor value_weight, "
      "Tensor? history=None, *, int dilation=1, int groups=1, float eps=1e-6, str gradient=\"float32\") "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_gated_conv_forward(Tensor x, Tensor norm_scale, Tensor gate_weight, Tensor value_weight, "
      "Tensor? history, int dilation, int groups, float eps, bool with_slopes) "
      "-> (Tensor y, Tensor slopes)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_gated_conv_backward(Tensor grad_y, Tensor slopes, Tensor x, Tensor norm_scale, Tensor gate_weight, "
      "Tensor value_weight, Tensor? history, int dilation, int groups, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

at::Tensor gated_conv(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                      const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                      int64_t dilation, int64_t groups, double eps, std::string_view gradient) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flashlm::gated_conv", "").typed<decltype(gated_conv)>();
  return op.call(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps, gradient);
}

namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs forward(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                const at::Tensor& value_weight, const std::optional<at::Tensor>& history, int64_t dilation,
                int64_t groups, double eps, bool with_slopes) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_gated_conv_forward", "")
                             .typed<decltype(forward)>();
  return op.call(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps, with_slopes);
}

Gradients backward(const at::Tensor& grad_y, const at::Tensor& slopes, const at::Tensor& x,
                   const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                   const at::Tensor& value_weight, const std::optional<at::Tensor>& history, int64_t dilation,
                   int64_t groups, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_gated_conv_backward", "")
                             .typed<decltype(backward)>();
  return op.call(grad_y, slopes, x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
}

at::Tensor composite(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                     const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                     int64_t dilation, int64_t groups, double eps, std::string_view gradient) {
  TORCH_CHECK(gradient == "float32" || gradient == "bfloat16",
              "gated_conv: gradient must be 'float32' or 'bfloat16', got '", gradient, "'");
  const bool needs_gradient =
      at::GradMode::is_enabled() &&
      (x.requires_grad() || norm_scale.requires_grad() || gate_weight.requires_grad() ||
       value_weight.requires_grad() || (history.has_value() && history->requires_grad()));
  return std::get<0>(forward(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps,
                             /*with_slopes=*/needs_gradient && gradient == "bfloat16"));
}

void check_arguments(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                     const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                     int64_t dilation, int64_t groups, double eps) {
  check_conv_input("gated_conv", x, dilation, groups);
  check_same_dtype("gated_conv", "norm_scale", norm_scale, x);
  check_dim("gated_conv", "norm_scale", norm_scale, 1);
  check_size("gated_conv", "norm_scale's size", norm_scale.sym_size(0), x.sym_size(2));
  check_conv_weight("gated_conv", "gate_weight", gate_weight, x, groups);
  const c10::SymInt taps = gate_weight.sym_size(2);
  check_conv_weight("gated_conv", "value_weight", value_weight, x, groups, &taps);
  check_history("gated_conv", history, x, taps, dilation);
  TORCH_CHECK(eps >= 0, "gated_conv: eps must be >= 0, got ", eps);
}

/// Checks the arguments and makes the outputs: the Meta kernel, and the CPU kernel's first line.
Outputs new_outputs(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                    const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                    int64_t dilation, int64_t groups, double eps, bool with_slopes) {
  check_arguments(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  std::vector<c10::SymInt> slopes = {0};
  if (with_slopes && compute_dtype(x) == at::kFloat && kernels::table<float>().bf16_panel > 0) {
    slopes = {x.sym_size(0), groups, x.sym_size(1), 2 * (x.sym_size(2) / groups)};
  }
  return {x.new_empty_symint(x.sym_sizes()), x.new_empty_symint(slopes, x.options().dtype(at::kBFloat16))};
}

/// The slopes of group g at row `row` of all B*T.
uint16_t* slopes_at(const ConvCall& call, uint16_t* slopes, int64_t row, int64_t g) {
  const int64_t b = row / call.time, t = row % call.time;
  return slopes + ((b * call.groups + g) * call.time + t) * call.conv.out;
}

/// As the kernels take them; null if there are none.
uint16_t* slopes_data(const at::Tensor& slopes) {
  return slopes.numel() > 0 ? static_cast<uint16_t*>(slopes.mutable_data_ptr()) : nullptr;
}

// A block of time at a time, in it a group at a time: its rows and those they reach are normalised into a
// window, both convolutions go over it, and the gate takes them while they are in cache.
Outputs forward_cpu(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                    const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                    int64_t dilation, int64_t groups, double eps, bool with_slopes) {
  Outputs outputs =
      new_outputs(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps, with_slopes);
  auto& [y, slopes] = outputs;
  if (y.numel() == 0) return outputs;
  const at::Tensor in = kernel_input(x, x), scale = kernel_input(norm_scale, x);
  const at::Tensor before = history.has_value() ? kernel_input(*history, x) : at::Tensor();
  const ConvCall call(x, gate_weight, history.has_value(), dilation, groups, 2);
  const at::Tensor packed =
      pack_conv(call, side_by_side(call, {kernel_input(gate_weight, x), kernel_input(value_weight, x)}));
  const at::Tensor out = kernel_output(y);
  // Rows are normalised once for their own block and again for each block that reaches back to them: longer
  // blocks for a longer reach.
  const int64_t longest = std::clamp(call.reach, kBlock, 4 * kBlock);
  uint16_t* const all_slopes = slopes_data(slopes);
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const kernels::Table<T>& table = kernels::table<T>();
    const T* const all_x = in.const_data_ptr<T>();
    T* const all_y = out.mutable_data_ptr<T>();
    const T* const all_panels = packed.const_data_ptr<T>();
    for_each_window(
        Input<T>(call, in, before, scale, eps), longest,
        [&](int64_t row, int64_t rows, int64_t g, const auto& conv, const T* window, T* convs) {
          const T* const panels = all_panels + g * packed.size(1);
          // Asks for the same rows of the next block.
          const int64_t next = rows * call.width;
          for (int64_t r = 0; r < rows; r += kPiece) {
            const int64_t count = std::min(kPiece, rows - r), at = (row + r) * call.width + g * conv.in;
            prefetch<Access::kRead>(all_x + at + next, count, conv.in, call.width);
            prefetch<Access::kWrite>(all_y + at + next, count, conv.in, call.width);
            table.causal_conv1d(conv, count, window + r * conv.in, conv.in, panels, convs, conv.out);
            if (all_slopes != nullptr) {
              uint16_t* const to = slopes_at(call, all_slopes, row + r, g);
              prefetch<Access::kWrite>(to + rows * conv.out, count, conv.out, conv.out);
              table.gated_conv_slopes(count, conv.in, all_x + at, call.width, convs, all_y + at, to);
            } else {
              table.gated_conv(count, conv.in, all_x + at, call.width, convs, all_y + at);
            }
          }
        });
  });
  y = out.to(y.scalar_type());
  return outputs;
}

Gradients new_gradients(const at::Tensor& grad_y, const at::Tensor& /*slopes*/, const at::Tensor& x,
                        const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                        const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                        int64_t dilation, int64_t groups, double eps) {
  check_arguments(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  check_grad_y("_gated_conv_backward", grad_y, x);
  return {x.new_empty_symint(x.sym_sizes()), norm_scale.new_empty_symint(norm_scale.sym_sizes()),
          gate_weight.new_empty_symint(gate_weight.sym_sizes()),
          value_weight.new_empty_symint(value_weight.sym_sizes()), new_history_gradient(history, x)};
}

/// rms_norm's backward in place on rows first .. first + count of sequence b, in grad (B, lead + T, D): from
/// the gradient of the normalised rows to that of the rows themselves, with the residual grad_y. Adds to
/// grad_scale (D).
template <class T>
void norm_backward(const Input<T>& input, int64_t b, int64_t first, int64_t count, const T* grad_y, T* grad,
                   T* grad_scale) {
  const ConvCall& call = input.call;
  input.for_rows(b, first, count, [&](const T* from, int64_t i, int64_t n) {
    const int64_t row = first + i;
    T* to = grad + ((b + 1) * call.lead + b * call.time + row) * call.width;
    // History has no residual.
    const T* residual = row < 0 ? nullptr : grad_y + (b * call.time + row) * call.width;
    kernels::table<T>().rms_norm_residual_backward(n, call.width, to, from, input.scale, input.eps, residual,
                                                   to, grad_scale);
  });
}

Gradients backward_cpu(const at::Tensor& grad_y, const at::Tensor& slopes, const at::Tensor& x,
                       const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                       const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                       int64_t dilation, int64_t groups, double eps) {
  auto out =
      new_gradients(grad_y, slopes, x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  if (x.numel() == 0) {
    std::apply([](auto&... grads) { (grads.zero_(), ...); }, out);
    return out;
  }
  const at::Tensor in = kernel_input(x, x), scale = kernel_input(norm_scale, x), dy = kernel_input(grad_y, x);
  const at::Tensor before = history.has_value() ? kernel_input(*history, x) : at::Tensor();
  const ConvCall call(x, gate_weight, history.has_value(), dilation, groups, 2);
  const at::Tensor weights =
      side_by_side(call, {kernel_input(gate_weight, x), kernel_input(value_weight, x)});
  const at::Tensor grad = new_padded_gradient(call, std::get<0>(out));
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const kernels::Table<T>& table = kernels::table<T>();
    const Input<T> input(call, in, before, scale, eps);
    const Blocks blocks(1, call.lead + call.time, kBlock);
    const at::Tensor grad_scales = at::zeros({call.batch * blocks.count(), call.width}, grad.options());
    const auto grad_y_at = [&, all = dy.const_data_ptr<T>()](int64_t row, int64_t g) {
      return all + row * call.width + g * call.conv.in;
    };
    const auto finish = [&](int64_t b) {
      at::parallel_for(0, blocks.count(), 1, [&](int64_t i, int64_t last) {
        for (; i < last; ++i) {
          norm_backward(input, b, blocks[i].begin - call.lead, blocks[i].rows, dy.const_data_ptr<T>(),
                        grad.mutable_data_ptr<T>(),
                        grad_scales.mutable_data_ptr<T>() + (b * blocks.count() + i) * call.width);
        }
      });
    };
    at::Tensor grad_weights;
    if (uint16_t* const all_slopes = slopes_data(slopes)) {
      grad_weights = conv_backward_bf16(
          input, weights, grad,
          [&](int64_t row, int64_t rows, int64_t g, uint16_t* grads) {
            table.gated_conv_backward_slopes(rows, call.conv.in, grad_y_at(row, g), call.width,
                                             slopes_at(call, all_slopes, row, g), grads);
          },
          [&](int64_t b, int64_t g, int64_t time, int64_t rows) __attribute__((always_inline)) {
            const int64_t row = b * call.time + time, ins = call.conv.in;
            if (time < 0) return;
            if (g + 1 < call.groups) {
              prefetch<Access::kRead>(grad_y_at(row, g + 1), rows, ins, call.width);
              prefetch<Access::kRead>(slopes_at(call, all_slopes, row, g + 1), rows, 2 * ins, 2 * ins);
            }
            if (b + 1 < call.batch) {
              const T* const next_x = input.x + (row + call.time) * call.width + g * ins;
              prefetch<Access::kRead>(next_x, rows, ins, call.width);
            }
          },
          finish);
    } else {
      const at::Tensor packed = pack_conv(call, weights), back = pack_conv(call, weights, true);
      grad_weights = conv_backward(
          input, back, grad,
          [&](int64_t row, int64_t rows, int64_t g, const auto& conv, const T* h, T* convs) {
            table.causal_conv1d(conv, rows, h, conv.in, packed.const_data_ptr<T>() + g * packed.size(1),
                                convs, conv.out);
            table.gated_conv_backward(rows, conv.in, grad_y_at(row, g), call.width, convs);
          },
          finish);
    }
    const at::Tensor grad_scale = sum_in_order<T>(grad_scales);
    const auto [grad_x, grad_history] = split_gradient(grad, x, history);
    out = {grad_x, grad_scale.to(x.scalar_type()), weight_gradient(call, grad_weights, 0).to(x.scalar_type()),
           weight_gradient(call, grad_weights, 1).to(x.scalar_type()), grad_history};
  });
  return out;
}

struct GatedConv : torch::autograd::Function<GatedConv> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                                                const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                                                const at::Tensor& value_weight,
                                                const std::optional<at::Tensor>& history, int64_t dilation,
                                                int64_t groups, double eps, bool with_slopes) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, slopes] = flashlm::forward(x, norm_scale, gate_weight, value_weight, history, dilation,
                                              groups, eps, with_slopes);
    ctx->mark_non_differentiable({slopes});
    ctx->set_materialize_grads(false);  // else backward gets zeros of the slopes' size
    ctx->save_for_backward(
        {slopes, x, norm_scale, gate_weight, value_weight, history.value_or(at::Tensor())});
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["eps"] = eps;
    return {y, slopes};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    if (!grads[0].defined()) return torch::autograd::variable_list(9);
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, grad_scale, grad_gate, grad_value, grad_history] =
        flashlm::backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved_history(saved[5]),
                          ctx->saved_data["dilation"].toInt(), ctx->saved_data["groups"].toInt(),
                          ctx->saved_data["eps"].toDouble());
    return {grad_x,    grad_scale, grad_gate, grad_value, saved[5].defined() ? grad_history : no_grad(),
            no_grad(), no_grad(),  no_grad(), no_grad()};
  }
};

Outputs forward_autograd(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                         const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                         int64_t dilation, int64_t groups, double eps, bool with_slopes) {
  auto out =
      GatedConv::apply(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps, with_slopes);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CompositeImplicitAutograd, m) { m.impl("gated_conv", composite); }
TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("_gated_conv_forward", forward_cpu);
  m.impl("_gated_conv_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("_gated_conv_forward", new_outputs);
  m.impl("_gated_conv_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("_gated_conv_forward", forward_autograd);
  m.impl("_gated_conv_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm
