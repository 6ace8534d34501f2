// SPDX-License-Identifier: Apache-2.0
#include "ops/causal_conv1d.h"

#include <memory>

#include "ops/conv.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? history=None, *, int dilation=1, int groups=1) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_causal_conv1d_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? history, int dilation, "
      "int groups) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

at::Tensor causal_conv1d(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::causal_conv1d", "")
                             .typed<decltype(causal_conv1d)>();
  return op.call(x, weight, history, dilation, groups);
}

namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Gradients causal_conv1d_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_causal_conv1d_backward", "")
                             .typed<decltype(causal_conv1d_backward)>();
  return op.call(grad_y, x, weight, history, dilation, groups);
}

/// Checks the arguments and makes the output: the Meta kernel, and the CPU kernel's first line.
at::Tensor new_output(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& history,
                      int64_t dilation, int64_t groups) {
  check_conv_input("causal_conv1d", x, dilation, groups);
  check_conv_weight("causal_conv1d", "weight", weight, x, groups);
  check_history("causal_conv1d", history, x, weight.sym_size(2), dilation);
  return x.new_empty_symint(x.sym_sizes());
}

at::Tensor causal_conv1d_cpu(const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups) {
  at::Tensor y = new_output(x, weight, history, dilation, groups);
  if (y.numel() == 0) return y;
  const at::Tensor in = kernel_input(x, x), w = kernel_input(weight, x);
  const at::Tensor before = history.has_value() ? kernel_input(*history, x) : at::Tensor();
  const kernels::Conv1d conv = conv_of(x, weight, history.has_value(), dilation, groups, 1);
  const at::Tensor packed = pack_forward(conv, {w}), out = at::empty(in.sizes(), in.options());
  const int64_t time = in.size(1), width = in.size(2), reach = reach_of(conv);
  const Blocks blocks(in.size(0), time, kBlock);
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const kernels::Table<T>& table = kernels::table<T>();
    const auto copy = [&](int64_t rows, const T* from, T* to) { std::copy_n(from, rows * width, to); };
    at::parallel_for(0, blocks.count(), block_grain(conv, blocks), [&](int64_t first, int64_t last) {
      const auto window = std::make_unique_for_overwrite<T[]>(window_rows(conv, blocks.length) * width);
      for (int64_t i = first; i < last; ++i) {
        const auto [b, begin, rows] = blocks[i];
        const T* sequence = in.const_data_ptr<T>() + b * time * width;
        T* to = out.mutable_data_ptr<T>() + (b * time + begin) * width;
        if (begin >= reach) {
          table.causal_conv1d(conv, rows, sequence + (begin - reach) * width, packed.const_data_ptr<T>(), to);
        } else {
          const T* rows_before = before.defined() ? before.const_data_ptr<T>() + b * reach * width : nullptr;
          const kernels::Conv1d cut =
              gather_window(conv, sequence, rows_before, begin, rows, window.get(), copy);
          table.causal_conv1d(cut, rows, window.get(), packed.const_data_ptr<T>(), to);
        }
      }
    });
  });
  return out.to(y.scalar_type());
}

Gradients new_gradients(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& history, int64_t dilation, int64_t groups) {
  new_output(x, weight, history, dilation, groups);
  check_grad_y("_causal_conv1d_backward", grad_y, x);
  return {x.new_empty_symint(x.sym_sizes()), weight.new_empty_symint(weight.sym_sizes()),
          new_history_gradient(history, x)};
}

// The gradient of [history, x] is the transposed correlation over grad_y with zeros around it.
Gradients causal_conv1d_backward_cpu(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& history, int64_t dilation,
                                     int64_t groups) {
  const auto [zero_x, zero_weight, zero_history] =
      new_gradients(grad_y, x, weight, history, dilation, groups);
  if (x.numel() == 0) return {zero_x, zero_weight.zero_(), zero_history.zero_()};
  const at::Tensor in = kernel_input(x, x), w = kernel_input(weight, x), g = kernel_input(grad_y, x);
  const kernels::Conv1d conv = conv_of(x, weight, history.has_value(), dilation, groups, 1);
  const kernels::Conv1d back = transposed(conv);
  const int64_t width = in.size(2), reach = reach_of(conv), lead = history.has_value() ? reach : 0;
  const at::Tensor whole = history.has_value() ? at::cat({kernel_input(*history, x), in}, 1)
                                               : at::constant_pad_nd(in, {0, 0, reach, 0});
  const at::Tensor padded = at::constant_pad_nd(g, {0, 0, lead, reach}), packed = pack_transposed(conv, {w});
  const Blocks blocks(in.size(0), lead + in.size(1), kBlock);
  const at::Tensor grad = at::empty({in.size(0), blocks.rows, width}, in.options());
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, blocks.count(), block_grain(back, blocks), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto [b, begin, rows] = blocks[i];
        kernels::table<T>().causal_conv1d(
            back, rows, padded.const_data_ptr<T>() + (b * padded.size(1) + begin) * width,
            packed.const_data_ptr<T>(), grad.mutable_data_ptr<T>() + (b * blocks.rows + begin) * width);
      }
    });
  });
  const auto [grad_x, grad_history] = split_gradient(grad, x, history);
  const at::Tensor grad_weight = weight_gradient(conv, weight_gradients(conv, whole, g), 0);
  return {grad_x, grad_weight.to(x.scalar_type()), grad_history};
}

struct CausalConv1d : torch::autograd::Function<CausalConv1d> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& weight, const std::optional<at::Tensor>& history,
                            int64_t dilation, int64_t groups) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight, history.value_or(at::Tensor())});
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    return causal_conv1d(x, weight, history, dilation, groups);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, grad_weight, grad_history] =
        causal_conv1d_backward(grads[0], saved[0], saved[1], saved_history(saved[2]),
                               ctx->saved_data["dilation"].toInt(), ctx->saved_data["groups"].toInt());
    return {grad_x, grad_weight, saved[2].defined() ? grad_history : no_grad(), no_grad(), no_grad()};
  }
};

at::Tensor causal_conv1d_autograd(const at::Tensor& x, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& history, int64_t dilation,
                                  int64_t groups) {
  return CausalConv1d::apply(x, weight, history, dilation, groups);
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("causal_conv1d", causal_conv1d_cpu);
  m.impl("_causal_conv1d_backward", causal_conv1d_backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("causal_conv1d", new_output);
  m.impl("_causal_conv1d_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("causal_conv1d", causal_conv1d_autograd);
  m.impl("_causal_conv1d_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm
