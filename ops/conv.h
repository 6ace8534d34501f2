// SPDX-License-Identifier: Apache-2.0
// What causal_conv1d and gated_conv share: their argument checks, weights in the kernels' order, the cut of
// time into blocks, and the backward pass of a convolution. Not installed.
// Names: reach = (K-1)*dilation, the rows before a row that its output reads; lead, those of them that
// `history` gives (all or none). `outs` channels of a group: D/G for each weight that stands side by side.
// Rows of channels-last tensors are D wide: a power of two, as a rule, so that the rows of one group fall on
// few sets of a cache. Between input and output a group's rows are therefore kept by themselves, contiguous.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "ops/common.h"

namespace flashlm {

using Tensors = std::vector<at::Tensor>;

// ---- checks ----

inline std::string shape_text(c10::SymIntArrayRef shape) {
  std::ostringstream text;
  for (size_t i = 0; i < shape.size(); ++i) text << (i == 0 ? "(" : ", ") << shape[i];
  return text.str() + ")";
}

/// x (B, T, D), dilation and groups.
inline void check_conv_input(const char* op, const at::Tensor& x, int64_t dilation, int64_t groups) {
  check_floating(op, "x", x);
  check_dim(op, "x", x, 3);
  // The upper limit keeps (K-1)*dilation from overflowing.
  TORCH_CHECK(dilation >= 1 && dilation <= INT32_MAX, op, ": dilation must be in 1..2147483647, got ",
              dilation);
  TORCH_CHECK(groups >= 1, op, ": groups must be >= 1, got ", groups);
  TORCH_SYM_CHECK((x.sym_size(2) % groups).sym_eq(0), op, ": groups must divide D = ", x.sym_size(2),
                  ", got ", groups);
}

/// weight (D, D/groups, K), where K is any if `taps` is null.
inline void check_conv_weight(const char* op, const char* name, const at::Tensor& weight, const at::Tensor& x,
                              int64_t groups, const c10::SymInt* taps = nullptr) {
  check_same_dtype(op, name, weight, x);
  const c10::SymInt outs = x.sym_size(2), ins = outs / groups;
  const auto rule = [&] {
    std::ostringstream text;
    text << op << ": " << name << " must be (D, D/groups, K) = (" << outs << ", " << ins << ", ";
    if (taps == nullptr) {
      text << "any";
    } else {
      text << *taps;
    }
    text << "), got " << shape_text(weight.sym_sizes());
    return text.str();
  };
  TORCH_CHECK(weight.dim() == 3, rule());
  TORCH_SYM_CHECK(weight.sym_size(0).sym_eq(outs), rule());
  TORCH_SYM_CHECK(weight.sym_size(1).sym_eq(ins), rule());
  if (taps != nullptr) TORCH_SYM_CHECK(weight.sym_size(2).sym_eq(*taps), rule());
  TORCH_SYM_CHECK(weight.sym_size(2).sym_ge(1), op, ": ", name, " must have K >= 1 taps, got ",
                  weight.sym_size(2));
}

/// history (B, reach, D), if given.
inline void check_history(const char* op, const std::optional<at::Tensor>& history, const at::Tensor& x,
                          const c10::SymInt& taps, int64_t dilation) {
  if (!history.has_value()) return;
  check_same_dtype(op, "history", *history, x);
  const std::vector<c10::SymInt> want = {x.sym_size(0), (taps - 1) * dilation, x.sym_size(2)};
  const auto rule = [&] {
    return std::string(op) + ": history must be (B, (K-1)*dilation, D) = " + shape_text(want) + ", got " +
           shape_text(history->sym_sizes());
  };
  TORCH_CHECK(history->dim() == 3, rule());
  for (int64_t d = 0; d < 3; ++d) TORCH_SYM_CHECK(history->sym_size(d).sym_eq(want[d]), rule());
}

inline void check_grad_y(const char* op, const at::Tensor& grad_y, const at::Tensor& x) {
  check_same_dtype(op, "grad_y", grad_y, x);
  check_dim(op, "grad_y", grad_y, 3);
  for (int64_t d = 0; d < 3; ++d) check_size(op, "grad_y's size", grad_y.sym_size(d), x.sym_size(d));
}

/// The gradient of `history`: its shape, or size 0 where it is absent.
inline at::Tensor new_history_gradient(const std::optional<at::Tensor>& history, const at::Tensor& x) {
  return history.has_value() ? history->new_empty_symint(history->sym_sizes()) : x.new_empty({0});
}

// ---- shapes and weights as the kernels take them ----

/// Time steps of a block: its rows of one group stay in a level-1 cache, those of all groups in a level-2.
constexpr int64_t kBlock = 64;

/// The sizes of one call.
struct ConvCall {
  /// `weights` weights (1 or 2) like `weight`, side by side. Without history, taps that reach beyond the
  /// start read zeros however far they reach, so the dilation is cut to what can matter.
  ConvCall(const at::Tensor& x, const at::Tensor& weight, bool has_history, int64_t dilation, int64_t groups_,
           int64_t weights)
      : conv{weight.size(1), weights * weight.size(1), weight.size(2),
             has_history ? dilation : std::min(dilation, std::max<int64_t>(1, x.size(1)))},
        groups(groups_),
        batch(x.size(0)),
        time(x.size(1)),
        width(x.size(2)),
        reach((conv.taps - 1) * conv.dilation),
        lead(has_history ? reach : 0) {}

  kernels::Conv1d conv;
  int64_t groups, batch, time, width, reach, lead;
};

/// The correlation that turns the gradient of conv's output into that of its input.
inline kernels::Conv1d transposed(const kernels::Conv1d& conv) {
  return {conv.out, conv.in, conv.taps, conv.dilation};
}

/// One or two torch weights (D, D/G, K) side by side: (G, outs, D/G, K).
inline at::Tensor side_by_side(const ConvCall& call, at::TensorList weights) {
  Tensors parts;
  for (const at::Tensor& w : weights) {
    parts.push_back(w.view({call.groups, call.conv.in, call.conv.in, call.conv.taps}));
  }
  return at::cat(parts, 1).contiguous();
}

/// (G, elements) of w (G, outs, D/G, K) packed for conv, which is call.conv or, if `back`, its transposed,
/// whose taps are reversed.
inline at::Tensor pack_conv(const ConvCall& call, const at::Tensor& w, bool back = false) {
  const kernels::Conv1d conv = back ? transposed(call.conv) : call.conv;
  at::Tensor packed;
  dispatch(w, [&](auto t) {
    using T = decltype(t);
    const kernels::Table<T>& table = kernels::table<T>();
    const int64_t panel = table.gemm_panel, panels = (conv.out + panel - 1) / panel;
    packed = at::empty({call.groups, panels, conv.taps, conv.in * panel}, w.options());
    const int64_t out_stride = back ? w.stride(2) : w.stride(1), in_stride = back ? w.stride(1) : w.stride(2);
    T* to = packed.mutable_data_ptr<T>();
    for (int64_t g = 0; g < call.groups; ++g) {
      for (int64_t o = 0; o < conv.out; o += panel) {
        for (int64_t k = 0; k < conv.taps; ++k, to += conv.in * panel) {
          const T* from =
              w.const_data_ptr<T>() + g * w.stride(0) + o * out_stride + (back ? conv.taps - 1 - k : k);
          table.gemm_pack(conv.in, std::min(panel, conv.out - o), from, in_stride, out_stride, to);
        }
      }
    }
  });
  return packed.view({call.groups, -1});
}

// ---- time in blocks ----

/// `batch` sequences of `rows` >= 1 rows, each cut into blocks of equal length, `longest` at most.
struct Blocks {
  Blocks(int64_t batch_, int64_t rows_, int64_t longest)
      : batch(batch_),
        rows(rows_),
        per_sequence((rows + longest - 1) / longest),
        length((rows + per_sequence - 1) / per_sequence) {}

  struct Block {
    int64_t sequence, begin, rows;
  };
  Block operator[](int64_t i) const {
    const int64_t begin = i % per_sequence * length;
    return {i / per_sequence, begin, std::min(length, rows - begin)};
  }
  int64_t count() const { return batch * per_sequence; }

  int64_t batch, rows, per_sequence, length;
};

/// Blocks that make a task worth a thread: about 256k multiply-adds.
inline int64_t block_grain(const ConvCall& call, const Blocks& blocks) {
  return std::max<int64_t>(1, 262144 / (blocks.length * call.width * call.conv.taps * call.conv.out));
}

/// Calls body(begin, rows) for the blocks of rows 0 .. rows, in parallel.
template <class Body>
void for_blocks(int64_t rows, const Body& body) {
  const Blocks blocks(1, rows, kBlock);
  at::parallel_for(0, blocks.count(), 1, [&](int64_t i, int64_t last) {
    for (; i < last; ++i) body(blocks[i].begin, blocks[i].rows);
  });
}

/// conv without the taps that meet nothing but zeros when its first tap reads rows begin .. begin + rows of
/// a sequence that holds rows 0 .. end only.
inline kernels::Conv1d without_zeros(kernels::Conv1d conv, int64_t begin, int64_t rows, int64_t end) {
  const auto ceil_div = [&](int64_t n) { return n <= 0 ? 0 : (n + conv.dilation - 1) / conv.dilation; };
  conv.last = std::min(conv.taps, ceil_div(end - begin));
  conv.first = std::min(conv.last, ceil_div(1 - begin - rows));
  return conv;
}

/// The rows that a call reads, in the kernels' dtype: x (B, T, D), before it history (B, reach, D) or zeros,
/// all normalised by `scale` (D) if there is one. Rows are numbered from x's first; history's are negative.
template <class T>
struct Input {
  Input(const ConvCall& call_, const at::Tensor& x_, const at::Tensor& history_,
        const at::Tensor& scale_ = {}, double eps_ = 0)
      : call(call_),
        x(x_.const_data_ptr<T>()),
        history(history_.defined() ? history_.const_data_ptr<T>() : nullptr),
        scale(scale_.defined() ? scale_.const_data_ptr<T>() : nullptr),
        eps(static_cast<T>(eps_)) {}

  /// Calls body(from, i, n) for those of rows first + i, 0 <= i < count, of sequence b that there are.
  template <class Body>
  void for_rows(int64_t b, int64_t first, int64_t count, const Body& body) const {
    const int64_t before = std::clamp<int64_t>(-first, 0, count);
    if (before > 0 && history != nullptr) {
      body(history + ((b + 1) * call.reach + first) * call.width, 0, before);
    }
    if (before < count) body(x + (b * call.time + first + before) * call.width, before, count - before);
  }

  /// rstd (count), for `columns`.
  void statistics(int64_t b, int64_t first, int64_t count, T* rstd) const {
    if (scale == nullptr) return;
    for_rows(b, first, count, [&](const T* from, int64_t i, int64_t n) {
      kernels::table<T>().inverse_rms(n, call.width, from, eps, rstd + i);
    });
  }

  /// The columns of group g, (count, D/G), normalised.
  void columns(int64_t b, int64_t g, int64_t first, int64_t count, const T* rstd, T* to) const {
    const int64_t in = call.conv.in;
    if (history == nullptr) std::fill_n(to, std::clamp<int64_t>(-first, 0, count) * in, T(0));
    for_rows(b, first, count, [&](const T* from, int64_t i, int64_t n) {
      from += g * in;
      if (scale != nullptr) {
        kernels::table<T>().scale_rows(n, in, from, call.width, rstd + i, scale + g * in, to + i * in);
      } else {
        for (int64_t r = i; r < i + n; ++r, from += call.width) std::copy_n(from, in, to + r * in);
      }
    });
  }

  /// The same rounded to pairs of bfloat16, (count, (D/G + 1) / 2), where bf16_panel > 0. There is a scale.
  void columns(int64_t b, int64_t g, int64_t first, int64_t count, const T* rstd, int32_t* to) const {
    const int64_t in = call.conv.in, pairs = row_length<int32_t>();
    if (history == nullptr) std::fill_n(to, std::clamp<int64_t>(-first, 0, count) * pairs, 0);
    for_rows(b, first, count, [&](const T* from, int64_t i, int64_t n) {
      kernels::table<T>().scale_rows_bf16(n, in, from + g * in, call.width, rstd + i, scale + g * in,
                                          to + i * pairs);
    });
  }

  /// Of a row of `columns` in T, or in pairs.
  template <class Element>
  int64_t row_length() const {
    return std::is_same_v<Element, T> ? call.conv.in : (call.conv.in + 1) / 2;
  }

  const ConvCall& call;
  const T *x, *history, *scale;
  T eps;
};

/// Lays out a window on what outputs begin .. begin + rows of one sequence read: put(first, count, at) is to
/// bring rows first .. first + count to row `at` of the window. Without history, taps that would meet only
/// zeros are left out; if taps are further apart than `rows`, so are the rows between. Returns the
/// convolution to run over the window.
template <class Put>
kernels::Conv1d lay_window(const ConvCall& call, int64_t begin, int64_t rows, const Put& put) {
  kernels::Conv1d cut = call.conv;
  if (call.lead == 0) cut = without_zeros(cut, begin - call.reach, rows, call.time);
  const int64_t start = begin - call.reach + cut.first * cut.dilation, taps = cut.last - cut.first;
  if (cut.dilation <= rows) {
    put(start, (taps - 1) * cut.dilation + rows, 0);
  } else {
    for (int64_t k = 0; k < taps; ++k) put(start + k * cut.dilation, rows, k * rows);
    cut.dilation = rows;
  }
  return cut;
}

/// Calls body(row, rows, g, conv, window, scratch) for each block of time, rows row .. row + rows of all B*T,
/// and in it for each group: conv is to run over the window, rows of `columns` in T or in pairs, whatever
/// Element is; scratch (rows, outs).
template <class Element, class T, class Body>
void for_each_window(const Input<T>& input, int64_t longest, const Body& body) {
  const ConvCall& call = input.call;
  const Blocks blocks(call.batch, call.time, longest);
  const int64_t window_rows =
      (call.conv.taps - 1) * std::min(call.conv.dilation, blocks.length) + blocks.length;
  at::parallel_for(0, blocks.count(), block_grain(call, blocks), [&](int64_t i, int64_t last) {
    const auto rstd = std::make_unique_for_overwrite<T[]>(window_rows);
    const int64_t row_length = input.template row_length<Element>();
    const auto window = std::make_unique_for_overwrite<Element[]>(window_rows * row_length);
    const auto scratch = std::make_unique_for_overwrite<T[]>(blocks.length * call.conv.out);
    for (; i < last; ++i) {
      const auto [b, begin, rows] = blocks[i];
      lay_window(call, begin, rows, [&, b = b](int64_t first, int64_t count, int64_t at) {
        input.statistics(b, first, count, rstd.get() + at);
      });
      for (int64_t g = 0; g < call.groups; ++g) {
        kernels::Conv1d conv =
            lay_window(call, begin, rows, [&, b = b](int64_t first, int64_t count, int64_t at) {
              input.columns(b, g, first, count, rstd.get() + at, window.get() + at * row_length);
            });
        conv.in = row_length;
        body(b * call.time + begin, rows, g, conv, window.get(), scratch.get());
      }
    }
  });
}

// ---- backward ----

/// The sum over the first dimension, in order whatever the number of threads; overwrites `parts`.
template <class T>
at::Tensor sum_in_order(const at::Tensor& parts) {
  T* const sum = parts.mutable_data_ptr<T>();
  const int64_t size = parts.numel() / parts.size(0);
  for (int64_t p = 1; p < parts.size(0); ++p) {
    const T* part = sum + p * size;
    for (int64_t i = 0; i < size; ++i) sum[i] += part[i];
  }
  return parts[0].clone();
}

/// What a backward pass of convolutions is made of: for a sequence after the other, in it for a group after
/// the other, so that all that lies between input and output stays in a level-2 cache,
///   group(b, g, rstd, grad_weight)  adds to its group's grad_weight (K, D/G, outs); rstd (lead + T) is for
///                                   input.columns. new_group() makes a group with its scratch memory
///   finish(b)                       sees sequence b once all its groups are done
/// Returns the gradient of the weights, (G, K, D/G, outs).
template <class T, class NewGroup, class Finish>
at::Tensor sum_over_sequences(const Input<T>& input, const NewGroup& new_group, const Finish& finish) {
  const ConvCall& call = input.call;
  const int64_t rows = call.lead + call.time;
  // The sum is over chunks of the batch, a partial sum each: as many as make enough tasks without much
  // memory, whatever the number of threads. Threads share chunks if there is one for each, else the groups of
  // a sequence, else its time; loops inside a parallel one are serial.
  const int64_t weight = call.conv.taps * call.conv.in * call.conv.out, all_weights = call.groups * weight;
  const int64_t chunks = std::clamp<int64_t>(std::min<int64_t>(4, (1 << 22) / all_weights), 1, call.batch);
  const at::Tensor partial = at::zeros({chunks, call.groups, call.conv.taps, call.conv.in, call.conv.out},
                                       at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  const auto run_chunks = [&](int64_t chunk, int64_t last) {
    const auto rstd = std::make_unique_for_overwrite<T[]>(rows);
    for (; chunk < last; ++chunk) {
      T* const sums = partial.mutable_data_ptr<T>() + chunk * all_weights;
      for (int64_t b = chunk * call.batch / chunks; b < (chunk + 1) * call.batch / chunks; ++b) {
        for_blocks(rows, [&](int64_t begin, int64_t count) {
          input.statistics(b, begin - call.lead, count, rstd.get() + begin);
        });
        const auto run_groups = [&](int64_t g, int64_t end) {
          const auto group = new_group();
          for (; g < end; ++g) group(b, g, rstd.get(), sums + g * weight);
        };
        if (call.groups > 1) {
          at::parallel_for(0, call.groups, 1, run_groups);
        } else {
          run_groups(0, 1);
        }
        finish(b);
      }
    }
  };
  if (chunks >= at::get_num_threads()) {
    at::parallel_for(0, chunks, 1, run_chunks);
  } else {
    run_chunks(0, chunks);
  }
  return sum_in_order<T>(partial);
}

/// Rows of zeros that the gradient of a sequence's convolutions needs on either side for `input_gradient`: as
/// many as a block reaches into with taps that meet anything else.
inline int64_t zero_rows(const ConvCall& call) { return std::min(call.reach, kBlock); }

/// The transposed convolution of one group: run(conv, rows, from, to) convolves a block from the gradients'
/// row `from` on, their first being 0, into row `to` of (lead + T).
template <class Run>
void input_gradient(const ConvCall& call, const Run& run) {
  for_blocks(call.lead + call.time, [&](int64_t at, int64_t rows) {
    const int64_t begin = at - call.lead;
    const kernels::Conv1d cut = without_zeros(transposed(call.conv), begin, rows, call.time);
    run(cut, rows, begin + cut.first * cut.dilation, at);
  });
}

/// The backward pass of the convolutions of h = the rows of `input`.
///   back                     pack_conv(call, w, true)
///   grad_h (B, lead + T, D)  is written
///   fill(row, rows, g, conv, h, grad)
///                            writes the convolutions' gradient (rows, outs) for rows row .. row + rows of
///                            all B*T; their output, if it is needed, is conv run over h
///   finish(b)                sees sequence b of grad_h once it is complete
/// Returns the gradient of the weights, (G, K, D/G, outs).
template <class T, class Fill, class Finish>
at::Tensor conv_backward(const Input<T>& input, const at::Tensor& back, const at::Tensor& grad_h,
                         const Fill& fill, const Finish& finish) {
  const ConvCall& call = input.call;
  const kernels::Table<T>& table = kernels::table<T>();
  const kernels::Conv1d conv = call.conv;
  const int64_t in = conv.in, outs = conv.out, rows = call.lead + call.time, edge = zero_rows(call);

  const auto new_group = [&] {
    return [&, h_padded = Scratch<T>((edge + rows) * in),
            grads_padded = Scratch<T>((edge + call.time + edge) * outs)](int64_t b, int64_t g, const T* rstd,
                                                                         T* grad_weight) {
      T *const h = h_padded.data + edge * in, *const grads = grads_padded.data + edge * outs;
      std::fill_n(h_padded.data, edge * in, T(0));
      std::fill_n(grads_padded.data, edge * outs, T(0));
      std::fill_n(grads + call.time * outs, edge * outs, T(0));
      input.columns(b, g, -call.lead, rows, rstd, h);
      for_blocks(call.time, [&](int64_t begin, int64_t count) {
        const int64_t start = call.lead - call.reach + begin;
        const kernels::Conv1d cut = without_zeros(conv, start, count, rows);
        fill(b * call.time + begin, count, g, cut, h + (start + cut.first * cut.dilation) * in,
             grads + begin * outs);
      });
      at::parallel_for(0, conv.taps, 1, [&](int64_t k, int64_t last) {
        for (; k < last; ++k) {
          const int64_t shift = call.lead - call.reach + k * conv.dilation, t = std::max<int64_t>(0, -shift);
          if (t >= call.time) continue;
          table.causal_conv1d_backward_weight(in, outs, call.time - t, h + (t + shift) * in, in,
                                              grads + t * outs, outs, grad_weight + k * in * outs);
        }
      });
      input_gradient(call, [&](const kernels::Conv1d& cut, int64_t count, int64_t from, int64_t to) {
        table.causal_conv1d(cut, count, grads + from * outs, outs,
                            back.const_data_ptr<T>() + g * back.size(1),
                            grad_h.mutable_data_ptr<T>() + (b * rows + to) * call.width + g * in, call.width);
      });
    };
  };
  return sum_over_sequences(input, new_group, finish);
}

/// The gradient of the i-th weight (D, D/G, K) out of conv_backward's.
inline at::Tensor weight_gradient(const ConvCall& call, const at::Tensor& grad, int64_t i) {
  return grad.narrow(3, i * call.conv.in, call.conv.in)
      .permute({0, 3, 2, 1})
      .clone(at::MemoryFormat::Contiguous)
      .view({call.width, call.conv.in, call.conv.taps});
}

/// For the gradient of [history, x] (B, lead + T, D): grad_x's own memory if it will do.
inline at::Tensor new_padded_gradient(const ConvCall& call, const at::Tensor& grad_x) {
  if (call.lead == 0) return kernel_output(grad_x);
  return at::empty({call.batch, call.lead + call.time, call.width},
                   grad_x.options().dtype(compute_dtype(grad_x)));
}

/// The gradients of x and of history (size 0 if absent) out of that of [history, x] (B, lead + T, D), in the
/// tensors made for them.
inline std::tuple<at::Tensor, at::Tensor> split_gradient(const ConvCall& call, const at::Tensor& grad,
                                                         const at::Tensor& grad_x,
                                                         const at::Tensor& grad_history) {
  if (call.lead == 0) return {grad.to(grad_x.scalar_type()), grad_history};
  return {grad_x.copy_(grad.narrow(1, call.lead, call.time)),
          grad_history.copy_(grad.narrow(1, 0, call.lead))};
}

}  // namespace flashlm
