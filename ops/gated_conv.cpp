// SPDX-License-Identifier: Apache-2.0
#include "ops/gated_conv.h"

#include <memory>

#include "ops/conv.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "gated_conv(Tensor x, Tensor norm_scale, Tensor gate_weight, Tensor value_weight, "
      "Tensor? history=None, *, int dilation=1, int groups=1, float eps=1e-6) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_gated_conv_backward(Tensor grad_y, Tensor x, Tensor norm_scale, Tensor gate_weight, "
      "Tensor value_weight, Tensor? history, int dilation, int groups, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

at::Tensor gated_conv(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                      const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                      int64_t dilation, int64_t groups, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flashlm::gated_conv", "").typed<decltype(gated_conv)>();
  return op.call(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
}

namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients gated_conv_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& norm_scale,
                              const at::Tensor& gate_weight, const at::Tensor& value_weight,
                              const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups,
                              double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_gated_conv_backward", "")
                             .typed<decltype(gated_conv_backward)>();
  return op.call(grad_y, x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
}

/// Checks the arguments and makes the output: the Meta kernel, and the CPU kernel's first line.
at::Tensor new_output(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
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
  return x.new_empty_symint(x.sym_sizes());
}

// A block of time at a time: its rows and those they reach are normalised into a window, both convolutions go
// over it, and the gate takes them while they are in cache.
at::Tensor gated_conv_cpu(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                          const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                          int64_t dilation, int64_t groups, double eps) {
  at::Tensor y = new_output(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  if (y.numel() == 0) return y;
  const at::Tensor in = kernel_input(x, x), scale = kernel_input(norm_scale, x);
  const at::Tensor before = history.has_value() ? kernel_input(*history, x) : at::Tensor();
  const kernels::Conv1d conv = conv_of(x, gate_weight, history.has_value(), dilation, groups, 2);
  const at::Tensor packed = pack_forward(conv, {kernel_input(gate_weight, x), kernel_input(value_weight, x)});
  const at::Tensor out = at::empty(in.sizes(), in.options());
  const int64_t time = in.size(1), width = in.size(2), reach = reach_of(conv);
  // Rows are normalised once for their own block and again for each block that reaches back to them: longer
  // blocks for a longer reach.
  const Blocks blocks(in.size(0), time, std::clamp(reach, kBlock, 4 * kBlock));
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const kernels::Table<T>& table = kernels::table<T>();
    const auto normalise = [&](int64_t rows, const T* from, T* to) {
      table.rms_norm(rows, width, from, scale.const_data_ptr<T>(), static_cast<T>(eps), to);
    };
    at::parallel_for(0, blocks.count(), block_grain(conv, blocks), [&](int64_t first, int64_t last) {
      const auto window = std::make_unique_for_overwrite<T[]>(window_rows(conv, blocks.length) * width);
      const auto convs = std::make_unique_for_overwrite<T[]>(blocks.length * 2 * width);
      for (int64_t i = first; i < last; ++i) {
        const auto [b, begin, rows] = blocks[i];
        const T* sequence = in.const_data_ptr<T>() + b * time * width;
        const T* rows_before = before.defined() ? before.const_data_ptr<T>() + b * reach * width : nullptr;
        const kernels::Conv1d cut =
            gather_window(conv, sequence, rows_before, begin, rows, window.get(), normalise);
        table.causal_conv1d(cut, rows, window.get(), packed.const_data_ptr<T>(), convs.get());
        table.gated_conv(rows * groups, conv.in, sequence + begin * width, convs.get(),
                         out.mutable_data_ptr<T>() + (b * time + begin) * width);
      }
    });
  });
  return out.to(y.scalar_type());
}

Gradients new_gradients(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& norm_scale,
                        const at::Tensor& gate_weight, const at::Tensor& value_weight,
                        const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups,
                        double eps) {
  new_output(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  check_grad_y("_gated_conv_backward", grad_y, x);
  return {x.new_empty_symint(x.sym_sizes()), norm_scale.new_empty_symint(norm_scale.sym_sizes()),
          gate_weight.new_empty_symint(gate_weight.sym_sizes()),
          value_weight.new_empty_symint(value_weight.sym_sizes()), new_history_gradient(history, x)};
}

/// The tensors of one backward pass, in the kernels' dtype. `whole` is [history, x], lead + T rows.
struct Backward {
  kernels::Conv1d conv;
  at::Tensor scale, whole, grad_y;
  double eps;
  int64_t batch, time, width, reach, lead;
};

/// h (B, reach + T, D): the normalised rows, after zeros where there is no history.
template <class T>
at::Tensor normalised(const Backward& call) {
  const int64_t rows = call.lead + call.time, zeros = call.reach - call.lead;
  const at::Tensor h = at::empty({call.batch, zeros + rows, call.width}, call.whole.options());
  h.narrow(1, 0, zeros).zero_();
  const Blocks blocks(call.batch, rows, kBlock);
  at::parallel_for(0, blocks.count(), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto [b, begin, count] = blocks[i];
      kernels::table<T>().rms_norm(count, call.width,
                                   call.whole.const_data_ptr<T>() + (b * rows + begin) * call.width,
                                   call.scale.const_data_ptr<T>(), static_cast<T>(call.eps),
                                   h.mutable_data_ptr<T>() + (b * h.size(1) + zeros + begin) * call.width);
    }
  });
  return h;
}

/// The gradient of the two convolutions of h, each group's side by side: (B, lead + T + reach, 2D), with
/// zeros before and after the T rows.
template <class T>
at::Tensor grad_of_convs(const Backward& call, const at::Tensor& h, const at::Tensor& packed) {
  const kernels::Table<T>& table = kernels::table<T>();
  const at::Tensor grad =
      at::empty({call.batch, call.lead + call.time + call.reach, 2 * call.width}, h.options());
  grad.narrow(1, 0, call.lead).zero_();
  grad.narrow(1, call.lead + call.time, call.reach).zero_();
  const Blocks blocks(call.batch, call.time, kBlock);
  at::parallel_for(0, blocks.count(), block_grain(call.conv, blocks), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto [b, begin, rows] = blocks[i];
      T* convs = grad.mutable_data_ptr<T>() + (b * grad.size(1) + call.lead + begin) * 2 * call.width;
      table.causal_conv1d(call.conv, rows, h.const_data_ptr<T>() + (b * h.size(1) + begin) * call.width,
                          packed.const_data_ptr<T>(), convs);
      table.gated_conv_backward(rows * call.conv.groups, call.conv.in,
                                call.grad_y.const_data_ptr<T>() + (b * call.time + begin) * call.width,
                                convs);
    }
  });
  return grad;
}

/// The gradients of `whole` and of norm_scale: the transposed correlation, rms_norm's backward and the
/// residual, block by block.
template <class T>
std::tuple<at::Tensor, at::Tensor> grad_of_input(const Backward& call, const at::Tensor& grad_convs,
                                                 const at::Tensor& packed) {
  const kernels::Table<T>& table = kernels::table<T>();
  const kernels::Conv1d back = transposed(call.conv);
  const int64_t length = call.lead + call.time, width = call.width;
  at::Tensor grad = at::empty_like(call.whole), grad_scale = at::empty_like(call.scale);
  sum_over_rows(
      call.batch * length, width, grad_scale.mutable_data_ptr<T>(),
      [&](int64_t first, int64_t last, T* partial) {
        const auto grad_h = std::make_unique_for_overwrite<T[]>(kBlock * width);
        for (int64_t row = first, rows; row < last; row += rows) {
          const int64_t b = row / length, begin = row % length;
          rows = std::min({kBlock, last - row, length - begin});
          T* to = grad.mutable_data_ptr<T>() + row * width;
          table.causal_conv1d(back, rows,
                              grad_convs.const_data_ptr<T>() + (b * grad_convs.size(1) + begin) * 2 * width,
                              packed.const_data_ptr<T>(), grad_h.get());
          table.rms_norm_backward(rows, width, grad_h.get(), call.whole.const_data_ptr<T>() + row * width,
                                  call.scale.const_data_ptr<T>(), static_cast<T>(call.eps), to, partial);
          // History has no residual.
          const int64_t skip = std::clamp<int64_t>(call.lead - begin, 0, rows);
          const T* residual =
              call.grad_y.const_data_ptr<T>() + (b * call.time + begin + skip - call.lead) * width;
          for (int64_t i = 0; i < (rows - skip) * width; ++i) to[skip * width + i] += residual[i];
        }
      });
  return {grad, grad_scale};
}

Gradients gated_conv_backward_cpu(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& norm_scale,
                                  const at::Tensor& gate_weight, const at::Tensor& value_weight,
                                  const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups,
                                  double eps) {
  auto out = new_gradients(grad_y, x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  if (x.numel() == 0) {
    std::apply([](auto&... grads) { (grads.zero_(), ...); }, out);
    return out;
  }
  const at::Tensor in = kernel_input(x, x);
  Backward call;
  call.conv = conv_of(x, gate_weight, history.has_value(), dilation, groups, 2);
  call.scale = kernel_input(norm_scale, x);
  call.whole = history.has_value() ? at::cat({kernel_input(*history, x), in}, 1) : in;
  call.grad_y = kernel_input(grad_y, x);
  call.eps = eps;
  call.batch = in.size(0);
  call.time = in.size(1);
  call.width = in.size(2);
  call.reach = reach_of(call.conv);
  call.lead = history.has_value() ? call.reach : 0;
  const Tensors weights = {kernel_input(gate_weight, x), kernel_input(value_weight, x)};
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const at::Tensor h = normalised<T>(call);
    const at::Tensor grad_convs = grad_of_convs<T>(call, h, pack_forward(call.conv, weights));
    const auto [grad, grad_scale] = grad_of_input<T>(call, grad_convs, pack_transposed(call.conv, weights));
    const at::Tensor grad_weights =
        weight_gradients(call.conv, h, grad_convs.narrow(1, call.lead, call.time));
    const auto [grad_x, grad_history] = split_gradient(grad, x, history);
    out = {grad_x, grad_scale.to(x.scalar_type()),
           weight_gradient(call.conv, grad_weights, 0).to(x.scalar_type()),
           weight_gradient(call.conv, grad_weights, 1).to(x.scalar_type()), grad_history};
  });
  return out;
}

struct GatedConv : torch::autograd::Function<GatedConv> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                            const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                            int64_t dilation, int64_t groups, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, norm_scale, gate_weight, value_weight, history.value_or(at::Tensor())});
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["eps"] = eps;
    return gated_conv(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, grad_scale, grad_gate, grad_value, grad_history] =
        gated_conv_backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved_history(saved[4]),
                            ctx->saved_data["dilation"].toInt(), ctx->saved_data["groups"].toInt(),
                            ctx->saved_data["eps"].toDouble());
    return {grad_x,    grad_scale, grad_gate, grad_value, saved[4].defined() ? grad_history : no_grad(),
            no_grad(), no_grad(),  no_grad()};
  }
};

at::Tensor gated_conv_autograd(const at::Tensor& x, const at::Tensor& norm_scale,
                               const at::Tensor& gate_weight, const at::Tensor& value_weight,
                               const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups,
                               double eps) {
  return GatedConv::apply(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("gated_conv", gated_conv_cpu);
  m.impl("_gated_conv_backward", gated_conv_backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("gated_conv", new_output);
  m.impl("_gated_conv_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("gated_conv", gated_conv_autograd);
  m.impl("_gated_conv_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm
