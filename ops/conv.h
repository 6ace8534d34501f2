// SPDX-License-Identifier: Apache-2.0
// What causal_conv1d and gated_conv share: their argument checks, weights in the kernels' order, and the cut
// of time into blocks. Not installed.
// Names: reach = (K-1)*dilation, the rows before a row that its output reads; lead, those of them that
// `history` gives (all or none).
#pragma once

#include <algorithm>
#include <cstdint>
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

/// The forward correlation of `weights` (1 or 2) weights side by side. Without history, taps that reach
/// beyond the start read zeros however far they reach, so the dilation is cut to what can matter.
inline kernels::Conv1d conv_of(const at::Tensor& x, const at::Tensor& weight, bool has_history,
                               int64_t dilation, int64_t groups, int64_t weights) {
  const int64_t in = weight.size(1), time = std::max<int64_t>(1, x.size(1));
  return {groups, in, weights * in, weight.size(2), has_history ? dilation : std::min(dilation, time)};
}

/// The correlation that turns the gradient of conv's output into that of its input.
inline kernels::Conv1d transposed(const kernels::Conv1d& conv) {
  return {conv.groups, conv.out, conv.in, conv.taps, conv.dilation};
}

inline int64_t reach_of(const kernels::Conv1d& conv) { return (conv.taps - 1) * conv.dilation; }

/// w (groups, taps, in, out), packed.
inline at::Tensor pack_conv(const kernels::Conv1d& conv, const at::Tensor& w) {
  at::Tensor packed;
  dispatch(w, [&](auto t) {
    using T = decltype(t);
    const kernels::Table<T>& table = kernels::table<T>();
    const int64_t depth = conv.taps * conv.in;
    const int64_t width = (conv.out + table.gemm_panel - 1) / table.gemm_panel * table.gemm_panel;
    const at::Tensor from = w.contiguous();
    packed = at::empty({conv.groups, depth * width}, w.options());
    for (int64_t g = 0; g < conv.groups; ++g) {
      table.gemm_pack(depth, conv.out, from.const_data_ptr<T>() + g * depth * conv.out, conv.out, 1,
                      packed.mutable_data_ptr<T>() + g * depth * width);
    }
  });
  return packed;
}

/// One or two torch weights (D, D/G, K) side by side, packed for conv.
inline at::Tensor pack_forward(const kernels::Conv1d& conv, at::TensorList weights) {
  Tensors parts;
  for (const at::Tensor& w : weights) {
    parts.push_back(w.view({conv.groups, conv.in, conv.in, conv.taps}).permute({0, 3, 2, 1}));
  }
  return pack_conv(conv, at::cat(parts, 3));
}

/// The same weights packed for transposed(conv): in and out exchanged, taps reversed.
inline at::Tensor pack_transposed(const kernels::Conv1d& conv, at::TensorList weights) {
  Tensors parts;
  for (const at::Tensor& w : weights) {
    parts.push_back(w.view({conv.groups, conv.in, conv.in, conv.taps}).flip(3).permute({0, 3, 1, 2}));
  }
  return pack_conv(transposed(conv), at::cat(parts, 2));
}

// ---- time in blocks ----

/// Time steps of a block whose rows stay in a level-2 cache.
constexpr int64_t kBlock = 64;

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
inline int64_t block_grain(const kernels::Conv1d& conv, const Blocks& blocks) {
  return std::max<int64_t>(1, 262144 / (blocks.length * conv.groups * conv.taps * conv.in * conv.out));
}

/// Rows of the largest window that gather_window makes for blocks of `rows` rows.
inline int64_t window_rows(const kernels::Conv1d& conv, int64_t rows) {
  return (conv.taps - 1) * std::min(conv.dilation, rows) + rows;
}

/// Writes into `window` what outputs begin .. begin + rows of one sequence read: put(count, from, to) for
/// rows of x and of the `reach` rows of history before it, zeros where history is null. Taps further apart
/// than `rows` read rows with gaps between them, which are left out: the result is conv with the window's
/// dilation.
template <class T, class Put>
kernels::Conv1d gather_window(const kernels::Conv1d& conv, const T* x, const T* history, int64_t begin,
                              int64_t rows, T* window, const Put& put) {
  const int64_t width = conv.groups * conv.in, reach = reach_of(conv);
  const auto put_rows = [&](int64_t first, int64_t count, T* to) {
    const int64_t before = std::clamp<int64_t>(-first, 0, count);
    if (before > 0 && history != nullptr) {
      put(before, history + (reach + first) * width, to);
    } else {
      std::fill_n(to, before * width, T(0));
    }
    if (count > before) put(count - before, x + (first + before) * width, to + before * width);
  };
  kernels::Conv1d cut = conv;
  if (conv.dilation <= rows) {
    put_rows(begin - reach, reach + rows, window);
  } else {
    cut.dilation = rows;
    for (int64_t k = 0; k < conv.taps; ++k) {
      put_rows(begin - reach + k * conv.dilation, rows, window + k * rows * width);
    }
  }
  return cut;
}

// ---- backward ----

/// Side by side, grad (groups, taps, in, out): the weights' gradient from x (B, reach + T, groups * in) and
/// grad_y (B, T, groups * out), rows contiguous. Each column of a group belongs to one thread, which adds
/// over all rows in order: the result is the same for any number of threads.
inline at::Tensor weight_gradients(const kernels::Conv1d& conv, const at::Tensor& x,
                                   const at::Tensor& grad_y) {
  at::Tensor grad = at::zeros({conv.groups, conv.taps, conv.in, conv.out}, x.options());
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const kernels::Table<T>& table = kernels::table<T>();
    const int64_t panels = (conv.out + table.gemm_panel - 1) / table.gemm_panel;
    at::parallel_for(0, conv.groups * panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        for (int64_t b = 0; b < x.size(0); ++b) {
          table.causal_conv1d_backward_weight(conv, i / panels, i % panels * table.gemm_panel, grad_y.size(1),
                                              x.const_data_ptr<T>() + b * x.stride(0),
                                              grad_y.const_data_ptr<T>() + b * grad_y.stride(0),
                                              grad.mutable_data_ptr<T>());
        }
      }
    });
  });
  return grad;
}

/// The gradient of the i-th weight (D, D/G, K) out of weight_gradients.
inline at::Tensor weight_gradient(const kernels::Conv1d& conv, const at::Tensor& grad, int64_t i) {
  return grad.narrow(3, i * conv.in, conv.in)
      .permute({0, 3, 2, 1})
      .clone(at::MemoryFormat::Contiguous)
      .view({conv.groups * conv.in, conv.in, conv.taps});
}

/// What save_for_backward kept of an optional history.
inline std::optional<at::Tensor> saved_history(const at::Tensor& history) {
  return history.defined() ? std::optional<at::Tensor>(history) : std::nullopt;
}

/// The gradients of x and of history (size 0 if absent) out of that of [history, x] (B, lead + T, D).
inline std::tuple<at::Tensor, at::Tensor> split_gradient(const at::Tensor& grad, const at::Tensor& x,
                                                         const std::optional<at::Tensor>& history) {
  if (!history.has_value()) return {grad.to(x.scalar_type()), x.new_empty({0})};
  const int64_t lead = history->size(1);
  const auto part = [&](int64_t begin, int64_t rows) {
    return grad.narrow(1, begin, rows).clone(at::MemoryFormat::Contiguous).to(x.scalar_type());
  };
  return {part(lead, x.size(1)), part(0, lead)};
}

}  // namespace flashlm
