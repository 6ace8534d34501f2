// SPDX-License-Identifier: Apache-2.0
// The public operator is a composite over _linear_cross_entropy_forward, which also returns the log-sum-exp
// that the backward pass needs. Both passes walk over blocks of logits, kBlockRows positions by kBlockWords
// words, that never leave the cache.
#include "ops/linear_cross_entropy.h"

#include <cmath>
#include <limits>
#include <string>

#include "ops/common.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "linear_cross_entropy(Tensor h, Tensor weight, Tensor? bias, Tensor target, *, "
      "float label_smoothing=0., float z_loss=0., int ignore_index=-100, str reduction=\"mean\") "
      "-> (Tensor loss, Tensor nll)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_linear_cross_entropy_forward(Tensor h, Tensor weight, Tensor? bias, Tensor target, "
      "float label_smoothing, float z_loss, int ignore_index, str reduction) "
      "-> (Tensor loss, Tensor nll, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_linear_cross_entropy_backward(Tensor grad_loss, Tensor h, Tensor weight, Tensor? bias, Tensor "
      "target, "
      "Tensor lse, float label_smoothing, float z_loss, int ignore_index, str reduction, bool[3] "
      "output_mask) "
      "-> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

std::tuple<at::Tensor, at::Tensor> linear_cross_entropy(const at::Tensor& h, const at::Tensor& weight,
                                                        const std::optional<at::Tensor>& bias,
                                                        const at::Tensor& target, double label_smoothing,
                                                        double z_loss, int64_t ignore_index,
                                                        c10::string_view reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::linear_cross_entropy", "")
                             .typed<decltype(linear_cross_entropy)>();
  return op.call(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction);
}

namespace {

using Tensor = at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;
using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

ThreeTensors forward(const Tensor& h, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
                     double label_smoothing, double z_loss, int64_t ignore_index,
                     c10::string_view reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_linear_cross_entropy_forward", "")
                             .typed<decltype(forward)>();
  return op.call(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction);
}

ThreeTensors backward(const Tensor& grad_loss, const Tensor& h, const Tensor& weight,
                      const OptionalTensor& bias, const Tensor& target, const Tensor& lse,
                      double label_smoothing, double z_loss, int64_t ignore_index, c10::string_view reduction,
                      std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_linear_cross_entropy_backward", "")
                             .typed<decltype(backward)>();
  return op.call(grad_loss, h, weight, bias, target, lse, label_smoothing, z_loss, ignore_index, reduction,
                 output_mask);
}

TwoTensors composite(const Tensor& h, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
                     double label_smoothing, double z_loss, int64_t ignore_index,
                     c10::string_view reduction) {
  auto [loss, nll, lse] = forward(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction);
  return {loss, nll};
}

// ---- checks and shapes: the Meta kernels, and the CPU kernels' first lines ----

void check_shape(const char* rule, const Tensor& t, c10::SymIntArrayRef want) {
  TORCH_CHECK(t.dim() == static_cast<int64_t>(want.size()), "linear_cross_entropy: ", rule, " ", want,
              ", got ", t.sym_sizes());
  for (int64_t d = 0; d < t.dim(); ++d) {
    TORCH_SYM_CHECK(t.sym_size(d).sym_eq(want[d]), "linear_cross_entropy: ", rule, " ", want, ", got ",
                    t.sym_sizes());
  }
}

void check_dtype_of_h(const char* name, const Tensor& t, const Tensor& h) {
  TORCH_CHECK(t.scalar_type() == h.scalar_type(), "linear_cross_entropy: ", name, " must have h's dtype ",
              h.scalar_type(), ", got ", t.scalar_type());
}

ThreeTensors new_outputs(const Tensor& h, const Tensor& weight, const OptionalTensor& bias,
                         const Tensor& target, double label_smoothing, double z_loss,
                         int64_t /*ignore_index*/, c10::string_view reduction) {
  const char* op = "linear_cross_entropy";
  check_floating(op, "h", h);
  check_dtype_of_h("weight", weight, h);
  TORCH_CHECK(h.dim() >= 1, "linear_cross_entropy: h must have at least 1 dimension, got 0");
  check_dim(op, "weight", weight, 2);
  check_size(op, "weight's last dimension", weight.sym_size(1), h.sym_size(-1));
  TORCH_SYM_CHECK(weight.sym_size(0).sym_gt(0),
                  "linear_cross_entropy: weight must have at least 1 row, got 0");
  if (bias) {
    check_dtype_of_h("bias", *bias, h);
    check_dim(op, "bias", *bias, 1);
    check_size(op, "bias's size", bias->sym_size(0), weight.sym_size(0));
  }
  TORCH_CHECK(target.scalar_type() == at::kLong, "linear_cross_entropy: target must be int64, got ",
              target.scalar_type());
  check_shape("target's shape must be h's leading dimensions", target, h.sym_sizes().slice(0, h.dim() - 1));
  TORCH_CHECK(label_smoothing >= 0 && label_smoothing < 1,
              "linear_cross_entropy: label_smoothing must be in [0, 1), got ", label_smoothing);
  TORCH_CHECK(z_loss >= 0, "linear_cross_entropy: z_loss must be >= 0, got ", z_loss);
  TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none",
              "linear_cross_entropy: reduction must be mean, sum or none, got '", reduction, "'");
  const auto options = h.options().dtype(compute_dtype(h));
  const auto positions = target.sym_sizes();
  const auto reduced = reduction == "none" ? positions : c10::SymIntArrayRef();
  return {at::empty_symint(reduced, options), at::empty_symint(reduced, options),
          at::empty_symint(positions, options)};
}

ThreeTensors new_gradients(const Tensor& grad_loss, const Tensor& h, const Tensor& weight,
                           const OptionalTensor& bias, const Tensor& target, const Tensor& lse,
                           double label_smoothing, double z_loss, int64_t ignore_index,
                           c10::string_view reduction, std::array<bool, 3> output_mask) {
  new_outputs(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction);
  check_shape("grad_loss's shape must be the loss's", grad_loss,
              reduction == "none" ? target.sym_sizes() : c10::SymIntArrayRef());
  check_shape("lse's shape must be target's", lse, target.sym_sizes());
  TORCH_CHECK(bias || !output_mask[2], "linear_cross_entropy: no gradient of a bias that is not given");
  return {output_mask[0] ? h.new_empty_symint(h.sym_sizes()) : no_grad(),
          output_mask[1] ? weight.new_empty_symint(weight.sym_sizes()) : no_grad(),
          output_mask[2] ? bias->new_empty_symint(bias->sym_sizes()) : no_grad()};
}

// ---- what both passes work on ----

constexpr int64_t kBlockRows = 256;
constexpr int64_t kBlockWords = 256;
// A row of a block in memory: 16 more, so that a column does not fall on a handful of the cache's sets.
constexpr int64_t kBlockStride = kBlockWords + 16;
// Rows that the backward pass takes at a time: bounds the slabs' partial gradients of h.
constexpr int64_t kChunkRows = 2 * kBlockRows;

/// The vocabulary in blocks of words, and these in slabs of consecutive blocks. A slab is a task for one
/// thread; they are cut by V alone, and what they find is combined in their order.
struct Slabs {
  explicit Slabs(int64_t vocabulary)
      : words(vocabulary),
        blocks((vocabulary + kBlockWords - 1) / kBlockWords),
        count(std::min<int64_t>(32, blocks)) {}

  int64_t first_word(int64_t slab) const { return slab * blocks / count * kBlockWords; }

  /// body(first word, words) for each block of the slab.
  template <class Body>
  void for_each_block(int64_t slab, const Body& body) const {
    const int64_t end = std::min(words, first_word(slab + 1));
    for (int64_t word = first_word(slab); word < end; word += kBlockWords) {
      body(word, std::min(kBlockWords, end - word));
    }
  }

  int64_t words, blocks, count;
};

/// body(first row, rows) for each block of rows in [begin, end).
template <class Body>
void for_each_row_block(int64_t begin, int64_t end, const Body& body) {
  for (int64_t row = begin; row < end; row += kBlockRows) body(row, std::min(kBlockRows, end - row));
}

/// The arguments as the kernels read them, without the positions that are ignored.
struct Problem {
  Problem(const Tensor& h_in, const Tensor& weight_in, const OptionalTensor& bias_in, const Tensor& target,
          int64_t ignore_index)
      : slabs(weight_in.size(0)), width(h_in.size(-1)) {
    const Tensor y = target.contiguous();
    const int64_t* word = y.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < y.numel(); ++i) {
      if (word[i] == ignore_index) continue;
      TORCH_CHECK(word[i] >= 0 && word[i] < slabs.words,
                  "linear_cross_entropy: target must be in [0, V) = [0, ", slabs.words, ") or ignore_index ",
                  ignore_index, ", got ", word[i], " at position ", i);
      positions.push_back(i);
      targets.push_back(word[i]);
    }
    rows = static_cast<int64_t>(positions.size());
    const Tensor all = h_in.reshape({y.numel(), width});
    h = kernel_input(rows == y.numel() ? all : all.index_select(0, at::tensor(positions)), h_in);
    weight = kernel_input(weight_in, h_in);
    if (bias_in) bias = kernel_input(*bias_in, h_in);
  }

  /// values[rows] at their positions in a tensor of the target's shape, the rest zero.
  template <class T>
  Tensor scatter(const std::vector<T>& values, at::IntArrayRef shape) const {
    Tensor out = at::zeros(shape, h.options());
    T* to = out.mutable_data_ptr<T>();
    for (int64_t r = 0; r < rows; ++r) to[positions[r]] = values[r];
    return out;
  }

  Slabs slabs;
  int64_t rows, width;
  std::vector<int64_t> positions, targets;  // (rows)
  Tensor h;                                 // (rows, width)
  Tensor weight;                            // (V, width)
  Tensor bias;                              // (V), or undefined
};

template <class T>
int64_t packed_width(int64_t n) {
  const int64_t panel = kernels::table<T>().gemm_panel;
  return (n + panel - 1) / panel * panel;
}

/// Logits of a block of rows by the words whose weights are packed.
template <class T>
void block_logits(const Problem& p, int64_t row, int64_t rows, int64_t word, int64_t words,
                  const T* packed_weight, T* z) {
  if (p.bias.defined()) {
    const T* bias = p.bias.const_data_ptr<T>() + word;
    for (int64_t r = 0; r < rows; ++r) std::copy(bias, bias + words, z + r * kBlockStride);
  }
  kernels::table<T>().gemm(rows, words, p.width, p.h.const_data_ptr<T>() + row * p.width, p.width, 1,
                           packed_weight, z, kBlockStride, p.bias.defined());
}

/// body(r, z of its target) for each of the block's rows whose target is one of the block's words.
template <class T, class Body>
void for_each_target(const Problem& p, int64_t row, int64_t rows, int64_t word, int64_t words, T* z,
                     const Body& body) {
  for (int64_t r = row; r < row + rows; ++r) {
    const int64_t column = p.targets[r] - word;
    if (column >= 0 && column < words) body(r, z[(r - row) * kBlockStride + column]);
  }
}

// ---- forward ----

/// What a pass over the vocabulary leaves for each row; the first three once for each slab.
template <class T>
struct Statistics {
  explicit Statistics(const Problem& p)
      : max(p.slabs.count * p.rows),
        sum_exp(p.slabs.count * p.rows),
        sum_z(p.slabs.count * p.rows),
        z_target(p.rows) {}
  Scratch<T> max, sum_exp, sum_z, z_target;
};

template <class T>
Statistics<T> scan_vocabulary(const Problem& p) {
  const auto& table = kernels::table<T>();
  Statistics<T> s(p);
  at::parallel_for(0, p.slabs.count, 1, [&](int64_t first, int64_t last) {
    Scratch<T> packed(p.width * packed_width<T>(kBlockWords)), z(kBlockRows * kBlockStride);
    for (int64_t slab = first; slab < last; ++slab) {
      T* max = s.max.data + slab * p.rows;
      T* sum_exp = s.sum_exp.data + slab * p.rows;
      T* sum_z = s.sum_z.data + slab * p.rows;
      std::fill(max, max + p.rows, std::numeric_limits<T>::lowest());
      std::fill(sum_exp, sum_exp + p.rows, T(0));
      std::fill(sum_z, sum_z + p.rows, T(0));
      p.slabs.for_each_block(slab, [&](int64_t word, int64_t words) {
        table.gemm_pack(p.width, words, p.weight.const_data_ptr<T>() + word * p.width, 1, p.width,
                        packed.data);
        for_each_row_block(0, p.rows, [&](int64_t row, int64_t rows) {
          block_logits(p, row, rows, word, words, packed.data, z.data);
          table.cross_entropy(rows, words, z.data, kBlockStride, max + row, sum_exp + row, sum_z + row);
          for_each_target(p, row, rows, word, words, z.data,
                          [&](int64_t r, T z_target) { s.z_target.data[r] = z_target; });
        });
      });
    }
  });
  return s;
}

template <class T>
ThreeTensors forward_as(const Problem& p, at::IntArrayRef shape, double label_smoothing, double z_loss,
                        c10::string_view reduction) {
  const Statistics<T> s = scan_vocabulary<T>(p);
  std::vector<T> losses(p.rows), nlls(p.rows), lses(p.rows);
  double loss_sum = 0, nll_sum = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    double max = -std::numeric_limits<double>::infinity(), sum_exp = 0, sum_z = 0;
    for (int64_t i = r; i < p.slabs.count * p.rows; i += p.rows) max = std::max<double>(max, s.max.data[i]);
    for (int64_t i = r; i < p.slabs.count * p.rows; i += p.rows) {
      sum_exp += s.sum_exp.data[i] * std::exp(s.max.data[i] - max);
      sum_z += s.sum_z.data[i];
    }
    const double lse = max + std::log(sum_exp), z_target = s.z_target.data[r], nll = lse - z_target;
    double loss = nll + z_loss * lse * lse;
    // Not 0 * infinity when words are masked by a bias of -inf.
    if (label_smoothing > 0)
      loss += label_smoothing * (z_target - sum_z / static_cast<double>(p.slabs.words));
    lses[r] = static_cast<T>(lse);
    losses[r] = static_cast<T>(loss);
    nlls[r] = static_cast<T>(nll);
    loss_sum += loss;
    nll_sum += nll;
  }
  const Tensor lse = p.scatter(lses, shape);
  if (reduction == "none") return {p.scatter(losses, shape), p.scatter(nlls, shape), lse};
  const double count = reduction == "mean" ? static_cast<double>(p.rows) : 1;
  return {at::full({}, loss_sum / count, lse.options()), at::full({}, nll_sum / count, lse.options()), lse};
}

ThreeTensors forward_cpu(const Tensor& h, const Tensor& weight, const OptionalTensor& bias,
                         const Tensor& target, double label_smoothing, double z_loss, int64_t ignore_index,
                         c10::string_view reduction) {
  new_outputs(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction);
  const Problem p(h, weight, bias, target, ignore_index);
  ThreeTensors out;
  dispatch(h, [&](auto t) {
    out = forward_as<decltype(t)>(p, target.sizes(), label_smoothing, z_loss, reduction);
  });
  return out;
}

// ---- backward ----

/// The gradient of row r's logits is factor p - shift - [at the target] hit.
template <class T>
struct RowGradients {
  RowGradients(const Problem& p, const Tensor& grad_loss, const Tensor& lse_in, double label_smoothing,
               double z_loss, c10::string_view reduction) {
    const double scale = reduction == "mean" ? 1 / static_cast<double>(p.rows) : 1;
    const Tensor g = kernel_input(grad_loss, p.h), l = kernel_input(lse_in, p.h);
    for (int64_t r = 0; r < p.rows; ++r) {
      const double lse_r = l.const_data_ptr<T>()[p.positions[r]];
      const double grad = g.const_data_ptr<T>()[reduction == "none" ? p.positions[r] : 0] * scale;
      lse.push_back(static_cast<T>(lse_r));
      factor.push_back(static_cast<T>(grad * (1 + 2 * z_loss * lse_r)));
      shift.push_back(static_cast<T>(grad * label_smoothing / static_cast<double>(p.slabs.words)));
      hit.push_back(static_cast<T>(grad * (1 - label_smoothing)));
    }
  }
  std::vector<T> lse, factor, shift, hit;
};

template <class T>
void add_column_sums(int64_t rows, int64_t words, const T* z, T* sum) {
  for (int64_t r = 0; r < rows; ++r, z += kBlockStride) {
    for (int64_t i = 0; i < words; ++i) sum[i] += z[i];
  }
}

/// to[n] = the sum of `count` rows of parts (count, n), in order.
template <class T>
void sum_parts(int64_t count, int64_t n, const T* parts, T* to) {
  at::parallel_for(0, n, row_grain(count), [&](int64_t begin, int64_t end) {
    std::copy(parts + begin, parts + end, to + begin);
    for (int64_t part = 1; part < count; ++part) {
      for (int64_t i = begin; i < end; ++i) to[i] += parts[part * n + i];
    }
  });
}

/// Adds the gradients from the rows in [begin, end), a chunk; gradients not wanted are null.
template <class T>
void backward_chunk(const Problem& p, const RowGradients<T>& g, int64_t begin, int64_t end, T* grad_h,
                    T* grad_weight, T* grad_bias) {
  const auto& table = kernels::table<T>();
  const int64_t width = p.width, rows_in_chunk = end - begin, packed_row = packed_width<T>(width);
  Scratch<T> packed_h(grad_weight ? rows_in_chunk * packed_row : 0);
  if (grad_weight) {
    for_each_row_block(begin, end, [&](int64_t row, int64_t rows) {
      table.gemm_pack(rows, width, p.h.const_data_ptr<T>() + row * width, width, 1,
                      packed_h.data + (row - begin) * packed_row);
    });
  }
  Scratch<T> slab_grad_h(grad_h ? p.slabs.count * rows_in_chunk * width : 0);
  at::parallel_for(0, p.slabs.count, 1, [&](int64_t first, int64_t last) {
    Scratch<T> z(kBlockRows * kBlockStride), columns(width * packed_width<T>(kBlockWords)),
        rows_of_weight(grad_h ? kBlockWords * packed_row : 0);
    for (int64_t slab = first; slab < last; ++slab) {
      T* part = slab_grad_h.data + slab * rows_in_chunk * width;
      p.slabs.for_each_block(slab, [&](int64_t word, int64_t words) {
        const T* weight = p.weight.const_data_ptr<T>() + word * width;
        table.gemm_pack(width, words, weight, 1, width, columns.data);
        if (grad_h) table.gemm_pack(words, width, weight, width, 1, rows_of_weight.data);
        for_each_row_block(begin, end, [&](int64_t row, int64_t rows) {
          block_logits(p, row, rows, word, words, columns.data, z.data);
          table.cross_entropy_backward(rows, words, z.data, kBlockStride, g.lse.data() + row,
                                       g.factor.data() + row, g.shift.data() + row);
          for_each_target(p, row, rows, word, words, z.data, [&](int64_t r, T& grad) { grad -= g.hit[r]; });
          if (grad_h) {
            table.gemm(rows, width, words, z.data, kBlockStride, 1, rows_of_weight.data,
                       part + (row - begin) * width, width, word > p.slabs.first_word(slab));
          }
          if (grad_weight) {
            table.gemm(words, width, rows, z.data, 1, kBlockStride,
                       packed_h.data + (row - begin) * packed_row, grad_weight + word * width, width, true);
          }
          if (grad_bias) add_column_sums(rows, words, z.data, grad_bias + word);
        });
      });
    }
  });
  if (grad_h) sum_parts(p.slabs.count, rows_in_chunk * width, slab_grad_h.data, grad_h + begin * width);
}

template <class T>
ThreeTensors backward_as(const Problem& p, const RowGradients<T>& g, std::array<bool, 3> output_mask) {
  const Tensor grad_h = output_mask[0] ? at::empty_like(p.h) : no_grad();
  const Tensor grad_weight = output_mask[1] ? at::zeros_like(p.weight) : no_grad();
  const Tensor grad_bias = output_mask[2] ? at::zeros_like(p.bias) : no_grad();
  const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
  for (int64_t row = 0; row < p.rows; row += kChunkRows) {
    backward_chunk(p, g, row, std::min(p.rows, row + kChunkRows), data(grad_h), data(grad_weight),
                   data(grad_bias));
  }
  return {grad_h, grad_weight, grad_bias};
}

/// grad (rows, D) at the positions it belongs to in a tensor like h, the rest zero.
Tensor grad_of_all_rows(const Problem& p, const Tensor& grad, const Tensor& h) {
  if (grad.numel() == h.numel()) return grad.view(h.sizes());
  Tensor out = at::zeros({h.numel() / p.width, p.width}, grad.options());
  return out.index_copy_(0, at::tensor(p.positions), grad).view(h.sizes());
}

ThreeTensors backward_cpu(const Tensor& grad_loss, const Tensor& h, const Tensor& weight,
                          const OptionalTensor& bias, const Tensor& target, const Tensor& lse,
                          double label_smoothing, double z_loss, int64_t ignore_index,
                          c10::string_view reduction, std::array<bool, 3> output_mask) {
  new_gradients(grad_loss, h, weight, bias, target, lse, label_smoothing, z_loss, ignore_index, reduction,
                output_mask);
  const Problem p(h, weight, bias, target, ignore_index);
  ThreeTensors grads;
  dispatch(h, [&](auto t) {
    const RowGradients<decltype(t)> g(p, grad_loss, lse, label_smoothing, z_loss, reduction);
    grads = backward_as(p, g, output_mask);
  });
  const auto as_input = [&](const Tensor& t) { return t.defined() ? t.to(h.scalar_type()) : t; };
  auto& [grad_h, grad_weight, grad_bias] = grads;
  if (grad_h.defined()) grad_h = grad_of_all_rows(p, grad_h, h);
  return {as_input(grad_h), as_input(grad_weight), as_input(grad_bias)};
}

// ---- autograd ----

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& h,
                                                const Tensor& weight, const OptionalTensor& bias,
                                                const Tensor& target, double label_smoothing, double z_loss,
                                                int64_t ignore_index, const std::string& reduction) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, nll, lse] =
        flashlm::forward(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction);
    ctx->mark_non_differentiable({nll, lse});
    ctx->save_for_backward({h, weight, bias.value_or(Tensor()), target, lse});
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->saved_data["z_loss"] = z_loss;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["reduction"] = reduction;
    return {loss, nll, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor bias = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    auto& data = ctx->saved_data;
    // Inputs that are not tensors, a missing bias too, are not counted by needs_input_grad.
    auto [grad_h, grad_weight, grad_bias] = flashlm::backward(
        grads[0], saved[0], saved[1], bias, saved[3], saved[4], data["label_smoothing"].toDouble(),
        data["z_loss"].toDouble(), data["ignore_index"].toInt(), data["reduction"].toStringRef(),
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), bias && ctx->needs_input_grad(2)});
    return {grad_h, grad_weight, grad_bias, no_grad(), no_grad(), no_grad(), no_grad(), no_grad()};
  }
};

ThreeTensors forward_autograd(const Tensor& h, const Tensor& weight, const OptionalTensor& bias,
                              const Tensor& target, double label_smoothing, double z_loss,
                              int64_t ignore_index, c10::string_view reduction) {
  auto out = LinearCrossEntropy::apply(h, weight, bias, target, label_smoothing, z_loss, ignore_index,
                                       std::string(reduction));
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CompositeImplicitAutograd, m) { m.impl("linear_cross_entropy", composite); }
TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("_linear_cross_entropy_forward", forward_cpu);
  m.impl("_linear_cross_entropy_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("_linear_cross_entropy_forward", new_outputs);
  m.impl("_linear_cross_entropy_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("_linear_cross_entropy_forward", forward_autograd);
  m.impl("_linear_cross_entropy_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm
