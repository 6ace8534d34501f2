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
      "Tensor? history=None, *, int dilation=1, int groups=1, float eps=1e-6, str gradient=\"float32\", "
      "str precision=\"float32\") -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_gated_conv_forward(Tensor x, Tensor norm_scale, Tensor gate_weight, Tensor value_weight, "
      "Tensor? history, int dilation, int groups, float eps, str precision, bool with_slopes) "
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
                      int64_t dilation, int64_t groups, double eps, std::string_view gradient,
                      std::string_view precision) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flashlm::gated_conv", "").typed<decltype(gated_conv)>();
  return op.call(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps, gradient,
                 precision);
}

namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs forward(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                const at::Tensor& value_weight, const std::optional<at::Tensor>& history, int64_t dilation,
                int64_t groups, double eps, std::string_view precision, bool with_slopes) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_gated_conv_forward", "")
                             .typed<decltype(forward)>();
  return op.call(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps, precision,
                 with_slopes);
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

/// Whether x can be multiplied in bfloat16, if that is asked for.
bool has_bfloat16_products(const at::Tensor& x) {
  return compute_dtype(x) == at::kFloat && kernels::table<float>().bf16_panel > 0;
}

at::Tensor composite(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                     const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                     int64_t dilation, int64_t groups, double eps, std::string_view gradient,
                     std::string_view precision) {
  TORCH_CHECK(gradient == "float32" || gradient == "bfloat16",
              "gated_conv: gradient must be 'float32' or 'bfloat16', got '", gradient, "'");
  const bool needs_gradient =
      at::GradMode::is_enabled() &&
      (x.requires_grad() || norm_scale.requires_grad() || gate_weight.requires_grad() ||
       value_weight.requires_grad() || (history.has_value() && history->requires_grad()));
  const bool with_slopes = needs_gradient && gradient == "bfloat16" && has_bfloat16_products(x);
  return std::get<0>(forward(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps,
                             precision, with_slopes));
}

void check_arguments(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                     const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                     int64_t dilation, int64_t groups, double eps) {
  check_conv_input("gated_conv", x, dilation, groups);
  check_norm_scale("gated_conv", "norm_scale", norm_scale, x, x.sym_size(2));
  check_conv_weight("gated_conv", "gate_weight", gate_weight, x, groups);
  const c10::SymInt taps = gate_weight.sym_size(2);
  check_conv_weight("gated_conv", "value_weight", value_weight, x, groups, &taps);
  check_history("gated_conv", history, x, taps, dilation);
  TORCH_CHECK(eps >= 0, "gated_conv: eps must be >= 0, got ", eps);
}

std::vector<c10::SymInt> slopes_shape(const at::Tensor& x, int64_t groups) {
  return {x.sym_size(0), groups, x.sym_size(1), 2 * (x.sym_size(2) / groups)};
}

/// Checks the arguments and makes the outputs: the Meta kernel, and the CPU kernel's first line.
Outputs new_outputs(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                    const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                    int64_t dilation, int64_t groups, double eps, std::string_view precision,
                    bool with_slopes) {
  check_arguments(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  TORCH_CHECK(precision == "float32" || precision == "bfloat16",
              "gated_conv: precision must be 'float32' or 'bfloat16', got '", precision, "'");
  const auto shape = with_slopes ? slopes_shape(x, groups) : std::vector<c10::SymInt>{0};
  return {x.new_empty_symint(x.sym_sizes()), x.new_empty_symint(shape, x.options().dtype(at::kBFloat16))};
}

/// pack_conv in pairs of bfloat16 along each tap's input channels, an odd one filled up with a zero.
at::Tensor pack_conv_bf16(const ConvCall& call, const at::Tensor& w, bool back = false) {
  const kernels::Table<float>& table = kernels::table<float>();
  // (G, K, in, out)
  at::Tensor ordered = back ? w.permute({0, 3, 1, 2}).flip({1}) : w.permute({0, 3, 2, 1});
  if (ordered.size(2) % 2 != 0) ordered = at::constant_pad_nd(ordered, {0, 0, 0, 1});
  ordered = ordered.contiguous();
  const int64_t depth = call.conv.taps * ordered.size(2), outs = ordered.size(3);
  const at::Tensor packed = at::empty({call.groups, depth / 2 * round_up(outs, table.bf16_panel)}, at::kInt);
  for (int64_t g = 0; g < call.groups; ++g) {
    table.bf16_pack(depth, outs, ordered.const_data_ptr<float>() + g * ordered.stride(0), outs,
                    /*factor=*/nullptr, packed.mutable_data_ptr<int32_t>() + g * packed.size(1));
  }
  return packed;
}

/// Rows between two requests for memory: whole tiles of the kernels, for T and for pairs of bfloat16.
template <class Element>
constexpr int64_t kPiece = 24;
template <>
constexpr int64_t kPiece<int32_t> = 32;

/// Asks for (rows, width), rows `row` elements apart, that will soon be read or written: a group's columns
/// are too far apart for the CPU to foresee. Addresses past an array's end do no harm. Always inlined, as
/// whatever does nothing but call it must be: GCC takes such a function for one without effects, and drops
/// the call.
template <class T>
[[gnu::always_inline]] inline void prefetch(const T* at, int64_t rows, int64_t width, int64_t row) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r, at += row) {
    for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(at + i, /*for writing*/ 0, /*locality*/ 2);
  }
}

/// The slopes of group g at row `row` of all B*T.
template <class Slope>
Slope* slopes_at(const ConvCall& call, Slope* slopes, int64_t row, int64_t g) {
  const int64_t b = row / call.time, t = row % call.time;
  return slopes + ((b * call.groups + g) * call.time + t) * call.conv.out;
}

// A block of time at a time, in it a group at a time: its rows and those they reach are normalised into a
// window, both convolutions go over it, and the gate takes them while they are in cache.
Outputs forward_cpu(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                    const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                    int64_t dilation, int64_t groups, double eps, std::string_view precision,
                    bool with_slopes) {
  Outputs outputs = new_outputs(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps,
                                precision, with_slopes);
  auto& [y, slopes] = outputs;
  TORCH_CHECK(!with_slopes || kernels::table<float>().bf16_panel > 0,
              "_gated_conv_forward: slopes need a CPU with AVX512-BF16, got the level ", kernels::isa());
  if (y.numel() == 0) return outputs;
  const at::Tensor in = kernel_input(x, x), scale = kernel_input(norm_scale, x);
  const at::Tensor before = history.has_value() ? kernel_input(*history, x) : at::Tensor();
  const ConvCall call(x, gate_weight, history.has_value(), dilation, groups, 2);
  const at::Tensor weights =
      side_by_side(call, {kernel_input(gate_weight, x), kernel_input(value_weight, x)});
  const bool is_rounded = precision == "bfloat16" && has_bfloat16_products(x);
  const at::Tensor packed = is_rounded ? pack_conv_bf16(call, weights) : pack_conv(call, weights);
  const at::Tensor out = kernel_output(y);
  // Rows are normalised once for their own block and again for each block that reaches back to them: longer
  // blocks for a longer reach.
  const int64_t longest = std::clamp(call.reach, kBlock, 4 * kBlock);
  auto* const all_slopes = with_slopes ? static_cast<uint16_t*>(slopes.mutable_data_ptr()) : nullptr;
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const kernels::Table<T>& table = kernels::table<T>();
    const T* const all_x = in.const_data_ptr<T>();
    T* const all_y = out.mutable_data_ptr<T>();
    const auto run = [&]<class Element>(const Element* all_panels, const auto& causal_conv1d) {
      for_each_window<Element>(
          Input<T>(call, in, before, scale, eps), longest,
          [&](int64_t row, int64_t rows, int64_t g, const auto& conv, const Element* window, T* convs) {
            const Element* const panels = all_panels + g * packed.size(1);
            const int64_t ins = call.conv.in;
            // Asks for the same rows of the next block.
            const int64_t next = rows * call.width;
            for (int64_t r = 0; r < rows; r += kPiece<Element>) {
              const int64_t count = std::min(kPiece<Element>, rows - r),
                            at = (row + r) * call.width + g * ins;
              prefetch(all_x + at + next, count, ins, call.width);
              prefetch(all_y + at + next, count, ins, call.width);
              causal_conv1d(conv, count, window + r * conv.in, conv.in, panels, convs, conv.out);
              if (all_slopes != nullptr) {
                uint16_t* const to = slopes_at(call, all_slopes, row + r, g);
                prefetch(to + rows * conv.out, count, conv.out, conv.out);
                table.gated_conv_slopes(count, ins, all_x + at, call.width, convs, all_y + at, to);
              } else {
                table.gated_conv(count, ins, all_x + at, call.width, convs, all_y + at);
              }
            }
          });
    };
    if (is_rounded) {
      run(packed.const_data_ptr<int32_t>(), table.causal_conv1d_bf16);
    } else {
      run(packed.const_data_ptr<T>(), table.causal_conv1d);
    }
  });
  y = out.to(y.scalar_type());
  return outputs;
}

Gradients new_gradients(const at::Tensor& grad_y, const at::Tensor& slopes, const at::Tensor& x,
                        const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                        const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                        int64_t dilation, int64_t groups, double eps) {
  check_arguments(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps);
  check_grad_y("_gated_conv_backward", grad_y, x);
  TORCH_CHECK(slopes.scalar_type() == at::kBFloat16, "_gated_conv_backward: slopes must be bfloat16, got ",
              slopes.scalar_type());
  if (slopes.dim() != 1) {  // else there are none
    const auto want = slopes_shape(x, groups);
    TORCH_CHECK(compute_dtype(x) == at::kFloat, "_gated_conv_backward: float64 has no slopes");
    check_dim("_gated_conv_backward", "slopes", slopes, 4);
    for (int64_t d = 0; d < 4; ++d) {
      check_size("_gated_conv_backward", "slopes' size", slopes.sym_size(d), want[d]);
    }
  }
  return {x.new_empty_symint(x.sym_sizes()), norm_scale.new_empty_symint(norm_scale.sym_sizes()),
          gate_weight.new_empty_symint(gate_weight.sym_sizes()),
          value_weight.new_empty_symint(value_weight.sym_sizes()), new_history_gradient(history, x)};
}

/// conv_backward with products of bfloat16 and sums in float32, where bf16_panel > 0.
///   w                        side_by_side's weights
///   fill(row, rows, g, grad) writes the convolutions' gradient in bfloat16
///   soon(b, g, t, rows)      asks for what is needed after time steps t .. t + rows of group g
/// The sum over time is one over pairs of time steps. The two of a pair lie half a sequence apart, so that a
/// tap shifts pairs whatever its shift is.
template <class Fill, class Soon, class Finish>
at::Tensor conv_backward_bf16(const Input<float>& input, const at::Tensor& w, const at::Tensor& grad_h,
                              const Fill& fill, const Soon& soon, const Finish& finish) {
  const ConvCall& call = input.call;
  const kernels::Table<float>& table = kernels::table<float>();
  const int64_t in = call.conv.in, outs = call.conv.out, taps = call.conv.taps;
  const int64_t panel = table.bf16_panel, half = (call.time + 1) / 2, edge = zero_rows(call);
  // Rows before the first that any pair reads.
  const int64_t before = call.lead > 0 ? call.lead : std::min(call.reach, call.time);

  const at::Tensor packed = pack_conv_bf16(call, w, /*back=*/true);
  const int32_t* const all_panels = packed.const_data_ptr<int32_t>();
  float* const all_grad = grad_h.mutable_data_ptr<float>();

  const auto new_group = [&] {
    return [&, h_padded = Scratch<float>((before + 2 * half) * in),
            grads_padded = Scratch<int32_t>((edge + 2 * half + edge) * (outs / 2)),
            h_pairs = Scratch<int32_t>((before + half) * round_up(in, panel)),
            grad_pairs = Scratch<int32_t>(half * round_up(outs, panel))](
               int64_t b, int64_t g, const float* rstd, float* grad_weight) {
      float* const h = h_padded.data + before * in;
      int32_t* const grads = grads_padded.data + edge * (outs / 2);
      const auto rounded = [&](int64_t row) { return reinterpret_cast<uint16_t*>(grads + row * (outs / 2)); };
      std::fill(h_padded.data, h - call.lead * in, 0.0f);
      std::fill(h + call.time * in, h + 2 * half * in, 0.0f);
      std::fill(grads_padded.data, grads, 0);
      std::fill(grads + call.time * (outs / 2), grads_padded.data + grads_padded.size, 0);
      input.columns(b, g, -call.lead, call.lead + call.time, rstd, h - call.lead * in);
      table.bf16_zip(before + half, in, h_padded.data, h_padded.data + half * in, in, h_pairs.data);
      for_blocks(call.time, [&](int64_t begin, int64_t count) {
        fill(b * call.time + begin, count, g, rounded(begin));
      });
      table.bf16_zip_rounded(half, outs, rounded(0), rounded(half), outs, grad_pairs.data);
      at::parallel_for(0, taps, 1, [&](int64_t k, int64_t last) {
        for (; k < last; ++k) {
          const int64_t first = before - call.reach + k * call.conv.dilation;
          if (first < 0) continue;  // beyond all rows
          table.gemm_bf16(in, outs, 2 * half,
                          {h_pairs.data + first * panel, /*row=*/1, panel, (before + half) * panel},
                          grad_pairs.data, /*alpha=*/1, grad_weight + k * in * outs, outs,
                          /*accumulate=*/true);
        }
      });
      float* const group_grad = all_grad + b * (call.lead + call.time) * call.width + g * in;
      input_gradient(call, [&](kernels::Conv1d cut, int64_t count, int64_t from, int64_t to) {
        cut.in /= 2;
        for (int64_t r = 0; r < count; r += kPiece<int32_t>) {
          const int64_t piece = std::min(kPiece<int32_t>, count - r);
          float* const grad = group_grad + (to + r) * call.width;
          soon(b, g, to + r - call.lead, piece);
          prefetch(grad + in, piece, in, call.width);
          table.causal_conv1d_bf16(cut, piece, grads + (from + r) * cut.in, cut.in,
                                   all_panels + g * packed.size(1), grad, call.width);
        }
      });
    };
  };
  return sum_over_sequences(input, new_group, finish);
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
    if constexpr (std::is_same_v<T, float>) {
      if (slopes.dim() > 1) {
        const at::Tensor contiguous = slopes.contiguous();
        const auto* const all_slopes = static_cast<const uint16_t*>(contiguous.const_data_ptr());
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
                prefetch(grad_y_at(row, g + 1), rows, ins, call.width);
                prefetch(slopes_at(call, all_slopes, row, g + 1), rows, 2 * ins, 2 * ins);
              }
              if (b + 1 < call.batch) {
                prefetch(input.x + (row + call.time) * call.width + g * ins, rows, ins, call.width);
              }
            },
            finish);
      }
    }
    if (!grad_weights.defined()) {
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
    const auto [grad_x, grad_history] = split_gradient(call, grad, std::get<0>(out), std::get<4>(out));
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
                                                int64_t groups, double eps, std::string_view precision,
                                                bool with_slopes) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, slopes] = flashlm::forward(x, norm_scale, gate_weight, value_weight, history, dilation,
                                              groups, eps, precision, with_slopes);
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
    if (!grads[0].defined()) return torch::autograd::variable_list(10);
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, grad_scale, grad_gate, grad_value, grad_history] =
        flashlm::backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], if_defined(saved[5]),
                          ctx->saved_data["dilation"].toInt(), ctx->saved_data["groups"].toInt(),
                          ctx->saved_data["eps"].toDouble());
    return {grad_x,    grad_scale, grad_gate, grad_value, saved[5].defined() ? grad_history : no_grad(),
            no_grad(), no_grad(),  no_grad(), no_grad(),  no_grad()};
  }
};

Outputs forward_autograd(const at::Tensor& x, const at::Tensor& norm_scale, const at::Tensor& gate_weight,
                         const at::Tensor& value_weight, const std::optional<at::Tensor>& history,
                         int64_t dilation, int64_t groups, double eps, std::string_view precision,
                         bool with_slopes) {
  auto out = GatedConv::apply(x, norm_scale, gate_weight, value_weight, history, dilation, groups, eps,
                              precision, with_slopes);
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
