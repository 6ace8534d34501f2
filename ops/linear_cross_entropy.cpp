// SPDX-License-Identifier: Apache-2.0
// The public operator is a composite over _linear_cross_entropy_forward, which also returns the log-sum-exp.
// All passes walk over blocks of logits, kBlockRows positions by kBlockWords words. Under autograd, a loss
// that is a scalar gets its gradients at once, up to a factor, by _linear_cross_entropy_forward_backward, and
// all that is left to the backward pass is that factor. Losses that are not reduced need the gradient of each
// position first: _linear_cross_entropy_backward computes the logits again.
#include "ops/linear_cross_entropy.h"

#include <ATen/TensorSubclassLikeUtils.h>

#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <string>

#include "ops/common.h"
#include "ops/products.h"
#include "ops/scalar_loss.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "linear_cross_entropy(Tensor h, Tensor weight, Tensor? bias, Tensor target, *, "
      "float label_smoothing=0., float z_loss=0., int ignore_index=-100, str reduction=\"mean\", "
      "str precision=\"float32\") -> (Tensor loss, Tensor nll)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_linear_cross_entropy_forward(Tensor h, Tensor weight, Tensor? bias, Tensor target, "
      "float label_smoothing, float z_loss, int ignore_index, str reduction, str precision) "
      "-> (Tensor loss, Tensor nll, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_linear_cross_entropy_backward(Tensor grad_loss, Tensor h, Tensor weight, Tensor? bias, "
      "Tensor target, Tensor lse, float label_smoothing, float z_loss, int ignore_index, str reduction, "
      "str precision, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_linear_cross_entropy_forward_backward(Tensor h, Tensor weight, Tensor? bias, Tensor target, "
      "float label_smoothing, float z_loss, int ignore_index, str reduction, str precision, "
      "bool[3] output_mask) -> (Tensor loss, Tensor nll, Tensor lse, Tensor grad_h, Tensor grad_weight, "
      "Tensor grad_bias)",
      {at::Tag::pt2_compliant_tag});
  m.def("_scale_gradient(Tensor gradient, Tensor grad_loss, Tensor h, Tensor weight, Tensor? bias) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

std::tuple<at::Tensor, at::Tensor> linear_cross_entropy(const at::Tensor& h, const at::Tensor& weight,
                                                        const std::optional<at::Tensor>& bias,
                                                        const at::Tensor& target, double label_smoothing,
                                                        double z_loss, int64_t ignore_index,
                                                        c10::string_view reduction,
                                                        c10::string_view precision) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::linear_cross_entropy", "")
                             .typed<decltype(linear_cross_entropy)>();
  return op.call(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction, precision);
}

namespace {

using Tensor = at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;
using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ThreeTensors forward(const Tensor& h, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
                     double label_smoothing, double z_loss, int64_t ignore_index, c10::string_view reduction,
                     c10::string_view precision) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_linear_cross_entropy_forward", "")
                             .typed<decltype(forward)>();
  return op.call(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction, precision);
}

ThreeTensors backward(const Tensor& grad_loss, const Tensor& h, const Tensor& weight,
                      const OptionalTensor& bias, const Tensor& target, const Tensor& lse,
                      double label_smoothing, double z_loss, int64_t ignore_index, c10::string_view reduction,
                      c10::string_view precision, std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_linear_cross_entropy_backward", "")
                             .typed<decltype(backward)>();
  return op.call(grad_loss, h, weight, bias, target, lse, label_smoothing, z_loss, ignore_index, reduction,
                 precision, output_mask);
}

SixTensors forward_backward(const Tensor& h, const Tensor& weight, const OptionalTensor& bias,
                            const Tensor& target, double label_smoothing, double z_loss, int64_t ignore_index,
                            c10::string_view reduction, c10::string_view precision,
                            std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_linear_cross_entropy_forward_backward", "")
                             .typed<decltype(forward_backward)>();
  return op.call(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction, precision,
                 output_mask);
}

TwoTensors composite(const Tensor& h, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
                     double label_smoothing, double z_loss, int64_t ignore_index, c10::string_view reduction,
                     c10::string_view precision) {
  auto [loss, nll, lse] =
      forward(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction, precision);
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
                         int64_t /*ignore_index*/, c10::string_view reduction, c10::string_view precision) {
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
  TORCH_CHECK(precision == "float32" || precision == "bfloat16",
              "linear_cross_entropy: precision must be float32 or bfloat16, got '", precision, "'");
  const auto options = h.options().dtype(compute_dtype(h));
  const auto positions = target.sym_sizes();
  const auto reduced = reduction == "none" ? positions : c10::SymIntArrayRef();
  return {at::empty_symint(reduced, options), at::empty_symint(reduced, options),
          at::empty_symint(positions, options)};
}

ThreeTensors new_gradients(const Tensor& grad_loss, const Tensor& h, const Tensor& weight,
                           const OptionalTensor& bias, const Tensor& target, const Tensor& lse,
                           double label_smoothing, double z_loss, int64_t ignore_index,
                           c10::string_view reduction, c10::string_view precision,
                           std::array<bool, 3> output_mask) {
  new_outputs(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction, precision);
  check_shape("grad_loss's shape must be the loss's", grad_loss,
              reduction == "none" ? target.sym_sizes() : c10::SymIntArrayRef());
  check_shape("lse's shape must be target's", lse, target.sym_sizes());
  TORCH_CHECK(bias || !output_mask[2], "linear_cross_entropy: no gradient of a bias that is not given");
  return {output_mask[0] ? h.new_empty_symint(h.sym_sizes()) : no_grad(),
          output_mask[1] ? weight.new_empty_symint(weight.sym_sizes()) : no_grad(),
          output_mask[2] ? bias->new_empty_symint(bias->sym_sizes()) : no_grad()};
}

/// Gradients in the compute dtype, of a loss that is a scalar; empty where not wanted.
SixTensors new_outputs_and_gradients(const Tensor& h, const Tensor& weight, const OptionalTensor& bias,
                                     const Tensor& target, double label_smoothing, double z_loss,
                                     int64_t ignore_index, c10::string_view reduction,
                                     c10::string_view precision, std::array<bool, 3> output_mask) {
  TORCH_CHECK(reduction != "none",
              "linear_cross_entropy: gradients of 'none' need those of its losses first");
  TORCH_CHECK(bias || !output_mask[2], "linear_cross_entropy: no gradient of a bias that is not given");
  auto [loss, nll, lse] =
      new_outputs(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction, precision);
  const auto like = [&](size_t i, const Tensor& t) {
    return output_mask[i] ? at::empty_symint(t.sym_sizes(), loss.options()) : at::empty({0}, loss.options());
  };
  return {loss, nll, lse, like(0, h), like(1, weight), like(2, bias.value_or(h))};
}

Tensor new_scaled(const Tensor& gradient, const Tensor& /*grad_loss*/, const Tensor& h,
                  const Tensor& /*weight*/, const OptionalTensor& /*bias*/) {
  return h.new_empty_symint(gradient.sym_sizes());
}

// ---- what all passes work on ----

constexpr int64_t kBlockRows = 256;
constexpr int64_t kBlockWords = 256;
// A row of a block in memory: 16 more, so that a column does not fall on a handful of the cache's sets.
constexpr int64_t kBlockStride = kBlockWords + 16;
// Rows of a task of the backward pass: bounds the slabs' partial gradients of h.
constexpr int64_t kTaskRows = 2 * kBlockRows;
// Bytes of what is kept of the logits at once, as long as they are kBlockRows positions' at least.
constexpr int64_t kKeptBytes = 1 << 26;

/// The work is cut by its shape alone, and what tasks find is combined in their order. The vocabulary: into
/// blocks of words, and these into slabs of consecutive blocks. The rows: into groups, as many as make 16
/// tasks of a few slabs.
struct Cut {
  Cut(int64_t vocabulary, int64_t n)
      : words(vocabulary),
        rows(n),
        blocks((vocabulary + kBlockWords - 1) / kBlockWords),
        slabs(std::min<int64_t>(32, blocks)),
        groups(std::clamp<int64_t>((n + kTaskRows - 1) / kTaskRows, 1, std::max<int64_t>(1, 16 / slabs))) {}

  int64_t first_word(int64_t slab) const { return slab * blocks / slabs * kBlockWords; }

  /// Into how many groups a chunk of rows is cut.
  int64_t groups_of(int64_t n) const {
    return std::clamp<int64_t>((n + kTaskRows - 1) / kTaskRows, 1, groups);
  }

  /// body(first word, words) for each block of the slab.
  template <class Body>
  void for_each_block(int64_t slab, const Body& body) const {
    const int64_t end = std::min(words, first_word(slab + 1));
    for (int64_t word = first_word(slab); word < end; word += kBlockWords) {
      body(word, std::min(kBlockWords, end - word));
    }
  }

  int64_t words, rows, blocks, slabs, groups;
};

/// What decides the loss, given the logits.
struct Options {
  double label_smoothing, z_loss;
  c10::string_view reduction;
};

/// body(first row, rows) for each block of rows in [begin, end), in order.
template <class Body>
void for_each_row_block(int64_t begin, int64_t end, const Body& body) {
  for (int64_t row = begin; row < end; row += kBlockRows) body(row, std::min(kBlockRows, end - row));
}

/// The same on several threads, in any order.
template <class Body>
void for_each_row_block_in_parallel(int64_t begin, int64_t end, const Body& body) {
  at::parallel_for(0, (end - begin + kBlockRows - 1) / kBlockRows, 1, [&](int64_t first, int64_t last) {
    for_each_row_block(begin + first * kBlockRows, std::min(end, begin + last * kBlockRows), body);
  });
}

/// body(slab, group, first row, end of rows) for each slab and each of `groups` groups of the blocks of rows
/// in [begin, end): the tasks of one thread, tasks first .. last - 1.
template <class Body>
void for_each_task(int64_t first, int64_t last, int64_t groups, int64_t begin, int64_t end,
                   const Body& body) {
  const int64_t blocks = (end - begin + kBlockRows - 1) / kBlockRows;
  const auto row_of = [&](int64_t group) {
    return std::min(end, begin + group * blocks / groups * kBlockRows);
  };
  for (int64_t task = first; task < last; ++task) {
    const int64_t slab = task / groups, group = task % groups;
    body(slab, group, row_of(group), row_of(group + 1));
  }
}

/// The arguments as the kernels read them, without the positions that are ignored.
struct Problem {
  Problem(const Tensor& h_in, const Tensor& weight_in, const OptionalTensor& bias_in, const Tensor& target,
          int64_t ignore_index)
      : words(weight_in.size(0)), width(h_in.size(-1)) {
    const Tensor y = target.contiguous();
    const int64_t* word = y.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < y.numel(); ++i) {
      if (word[i] == ignore_index) continue;
      TORCH_CHECK(word[i] >= 0 && word[i] < words, "linear_cross_entropy: target must be in [0, V) = [0, ",
                  words, ") or ignore_index ", ignore_index, ", got ", word[i], " at position ", i);
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
  Tensor scatter(const std::vector<double>& values, at::IntArrayRef shape) const {
    Tensor out = at::zeros(shape, h.options());
    T* to = out.mutable_data_ptr<T>();
    for (int64_t r = 0; r < rows; ++r) to[positions[r]] = static_cast<T>(values[r]);
    return out;
  }

  int64_t words, rows, width;
  std::vector<int64_t> positions, targets;  // (rows)
  Tensor h;                                 // (rows, width)
  Tensor weight;                            // (V, width)
  Tensor bias;                              // (V), or undefined
};

/// h as the left operand of the logits, made once in a pass.
template <class P>
struct LeftOfLogits {
  explicit LeftOfLogits(const Problem& p)
      : memory((p.rows + kBlockRows - 1) / kBlockRows * P::left_size(kBlockRows, p.width)),
        blocks((p.rows + kBlockRows - 1) / kBlockRows) {
    const auto* h = p.h.template const_data_ptr<typename P::Value>();
    for_each_row_block_in_parallel(0, p.rows, [&](int64_t row, int64_t rows) {
      const int64_t block = row / kBlockRows;
      blocks[block] = P::left(rows, p.width, h + row * p.width, p.width,
                              memory.data + block * P::left_size(kBlockRows, p.width));
    });
  }
  Scratch<typename P::Packed> memory;
  std::vector<typename P::Left> blocks;  // by row / kBlockRows
};

/// Logits of a block of rows by the words whose weights are packed.
template <class P, class T = typename P::Value>
void block_logits(const Problem& p, const typename P::Left& h, int64_t rows, int64_t word, int64_t words,
                  const typename P::Packed* packed_weight, T* z) {
  if (p.bias.defined()) {
    const T* bias = p.bias.template const_data_ptr<T>() + word;
    for (int64_t r = 0; r < rows; ++r) std::copy(bias, bias + words, z + r * kBlockStride);
  }
  P::multiply(rows, words, p.width, h, packed_weight, z, kBlockStride, p.bias.defined());
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

/// Memory that stays for the next call, unless another call has it just now or it is a lot. Fresh from the
/// system it would cost up to a third of a call's time, where other operators took and gave back memory
/// since.
class StandingMemory {
 public:
  explicit StandingMemory(int64_t bytes)
      : lock_(mutex(), std::defer_lock),
        memory_(bytes <= kKeptBytes && lock_.try_lock() ? standing() : own_) {
    memory_.resize(bytes);
  }
  uint8_t* data() const { return memory_.data; }

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static Scratch<uint8_t>& standing() {
    static auto& memory = *new Scratch<uint8_t>();  // outlives every other static
    return memory;
  }
  std::unique_lock<std::mutex> lock_;
  Scratch<uint8_t> own_;
  Scratch<uint8_t>& memory_;
};

/// What the forward pass leaves to the backward pass of the logits of a chunk of rows, block by block: the
/// logits themselves, or where their gradients will be rounded to bfloat16 anyhow, e^(z - max) in bfloat16,
/// with max as it was after the block. A p(y) near 1 loses nothing to that: its word is the max, its e 1.
template <class P>
struct KeptLogits {
  using T = typename P::Value;
  using Kept = std::conditional_t<std::is_same_v<P, Bfloat16Products>, uint16_t, T>;
  static constexpr bool kRounded = !std::is_same_v<Kept, T>;
  /// Whether logits and their gradients are made where they are kept.
  static bool in_place(const KeptLogits* kept) { return kept != nullptr && !kRounded; }

  KeptLogits(const Cut& cut, int64_t rows)
      : capacity(rows),
        memory(rows * cut.blocks * kBlockStride * static_cast<int64_t>(sizeof(Kept))),
        max(kRounded ? rows * cut.blocks : 0) {}

  /// Number of a block's row, for `max`, and in rows of kBlockStride values for the memory. Rows are counted
  /// from the chunk's first.
  int64_t offset(int64_t row, int64_t word) const { return word / kBlockWords * capacity + row; }
  Kept* block(int64_t row, int64_t word) const {
    return reinterpret_cast<Kept*>(memory.data()) + offset(row, word) * kBlockStride;
  }

  /// Where the logits of a block are to be computed.
  T* logits(int64_t row, int64_t word, T* scratch) const {
    if constexpr (kRounded) {
      return scratch;
    } else {
      return block(row, word);
    }
  }

  /// Takes them in z into the rows' statistics, and keeps them.
  void add(int64_t row, int64_t rows, int64_t word, int64_t words, const T* z, T* row_max, T* sum_exp,
           T* sum_z) const {
    if constexpr (kRounded) {
      P::table().cross_entropy_bf16(rows, words, z, kBlockStride, row_max, sum_exp, sum_z, block(row, word),
                                    kBlockStride);
      std::copy_n(row_max, rows, max.data + offset(row, word));
    } else {
      P::table().cross_entropy(rows, words, z, kBlockStride, row_max, sum_exp, sum_z);
    }
  }

  /// factor p - shift, in place or in scratch.
  T* gradient(int64_t row, int64_t rows, int64_t word, int64_t words, const T* lse, const T* factor,
              const T* shift, T* scratch) const {
    if constexpr (kRounded) {
      P::table().cross_entropy_bf16_backward(rows, words, block(row, word), kBlockStride,
                                             max.data + offset(row, word), lse, factor, shift, scratch,
                                             kBlockStride);
      return scratch;
    } else {
      P::table().cross_entropy_backward(rows, words, block(row, word), kBlockStride, lse, factor, shift);
      return block(row, word);
    }
  }

  int64_t capacity;
  StandingMemory memory;
  Scratch<T> max;
};

// ---- forward ----

/// What a pass over the vocabulary leaves for each row; the first three once for each slab.
template <class T>
struct Statistics {
  Statistics(int64_t slabs, int64_t rows)
      : max(slabs * rows), sum_exp(slabs * rows), sum_z(slabs * rows), z_target(rows) {}
  Scratch<T> max, sum_exp, sum_z, z_target;
};

/// The rows in [begin, end), all words.
template <class P, class T = typename P::Value>
void scan_vocabulary(const Problem& p, const Cut& cut, const LeftOfLogits<P>& h, int64_t begin, int64_t end,
                     Statistics<T>& s, const KeptLogits<P>* kept) {
  const int64_t groups = cut.groups_of(end - begin);
  at::parallel_for(0, cut.slabs * groups, 1, [&](int64_t first, int64_t last) {
    Scratch<typename P::Packed> packed(P::right_size(p.width, kBlockWords));
    Scratch<T> scratch(KeptLogits<P>::in_place(kept) ? 0 : kBlockRows * kBlockStride);
    for_each_task(first, last, groups, begin, end, [&](int64_t slab, int64_t, int64_t from, int64_t to) {
      T* max = s.max.data + slab * p.rows;
      T* sum_exp = s.sum_exp.data + slab * p.rows;
      T* sum_z = s.sum_z.data + slab * p.rows;
      std::fill(max + from, max + to, std::numeric_limits<T>::lowest());
      std::fill(sum_exp + from, sum_exp + to, T(0));
      std::fill(sum_z + from, sum_z + to, T(0));
      cut.for_each_block(slab, [&](int64_t word, int64_t words) {
        P::right_transposed(p.width, words, p.weight.template const_data_ptr<T>() + word * p.width,
                            packed.data);
        for_each_row_block(from, to, [&](int64_t row, int64_t rows) {
          T* z = kept ? kept->logits(row - begin, word, scratch.data) : scratch.data;
          block_logits<P>(p, h.blocks[row / kBlockRows], rows, word, words, packed.data, z);
          if (kept) {
            kept->add(row - begin, rows, word, words, z, max + row, sum_exp + row, sum_z + row);
          } else {
            P::table().cross_entropy(rows, words, z, kBlockStride, max + row, sum_exp + row, sum_z + row);
          }
          for_each_target(p, row, rows, word, words, z,
                          [&](int64_t r, T z_target) { s.z_target.data[r] = z_target; });
        });
      });
    });
  });
}

/// What each row comes to, in double.
struct Losses {
  explicit Losses(const Problem& p) : loss(p.rows), nll(p.rows), lse(p.rows) {}

  template <class T>
  void finish(const Problem& p, const Cut& cut, const Options& o, int64_t begin, int64_t end,
              const Statistics<T>& s) {
    at::parallel_for(begin, end, kBlockRows, [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) {
        double max = -std::numeric_limits<double>::infinity(), sum_exp = 0, sum_z = 0;
        for (int64_t i = r; i < cut.slabs * p.rows; i += p.rows) max = std::max<double>(max, s.max.data[i]);
        for (int64_t i = r; i < cut.slabs * p.rows; i += p.rows) {
          sum_exp += s.sum_exp.data[i] * std::exp(s.max.data[i] - max);
          sum_z += s.sum_z.data[i];
        }
        const double z_target = s.z_target.data[r];
        lse[r] = max + std::log(sum_exp);
        nll[r] = lse[r] - z_target;
        loss[r] = nll[r] + o.z_loss * lse[r] * lse[r];
        // Not 0 * infinity when words are masked by a bias of -inf.
        if (o.label_smoothing > 0) {
          loss[r] += o.label_smoothing * (z_target - sum_z / static_cast<double>(p.words));
        }
      }
    });
    for (int64_t r = begin; r < end; ++r) {
      TORCH_CHECK_VALUE(lse[r] < std::numeric_limits<double>::infinity(),
                        "linear_cross_entropy: logits must be finite, got a log-sum-exp of ",
                        std::isnan(lse[r]) ? "nan" : "inf", " at position ", p.positions[r],
                        " (h, weight or bias has a NaN or an infinity)");
    }
  }

  /// {loss, nll, lse} as the operator returns them.
  template <class T>
  ThreeTensors reduced(const Problem& p, const Options& o, at::IntArrayRef shape) const {
    const Tensor lses = p.scatter<T>(lse, shape);
    if (o.reduction == "none") return {p.scatter<T>(loss, shape), p.scatter<T>(nll, shape), lses};
    const auto scalar = [&](const std::vector<double>& values) {
      const double sum = std::accumulate(values.begin(), values.end(), 0.0);
      return at::full({}, o.reduction == "mean" ? sum / static_cast<double>(p.rows) : sum, lses.options());
    };
    return {scalar(loss), scalar(nll), lses};
  }

  std::vector<double> loss, nll, lse;
};

template <class P, class T = typename P::Value>
ThreeTensors forward_as(const Problem& p, const Options& o, at::IntArrayRef shape) {
  const Cut cut(p.words, p.rows);
  const LeftOfLogits<P> h(p);
  Statistics<T> s(cut.slabs, p.rows);
  Losses losses(p);
  scan_vocabulary<P>(p, cut, h, 0, p.rows, s, /*kept=*/nullptr);
  losses.finish(p, cut, o, 0, p.rows, s);
  return losses.reduced<T>(p, o, shape);
}

ThreeTensors forward_cpu(const Tensor& h, const Tensor& weight, const OptionalTensor& bias,
                         const Tensor& target, double label_smoothing, double z_loss, int64_t ignore_index,
                         c10::string_view reduction, c10::string_view precision) {
  new_outputs(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction, precision);
  const Problem p(h, weight, bias, target, ignore_index);
  ThreeTensors out;
  dispatch_products(h, precision, [&](auto products) {
    out = forward_as<decltype(products)>(p, {label_smoothing, z_loss, reduction}, target.sizes());
  });
  return out;
}

// ---- backward ----

/// The gradient of row r's logits is factor p - shift - [at the target] hit.
template <class T>
struct RowGradients {
  explicit RowGradients(const Problem& p) : lse(p.rows), factor(p.rows), shift(p.rows), hit(p.rows) {}

  /// grad: of the row's loss, before the mean is taken.
  void set(const Problem& p, const Options& o, int64_t r, double lse_r, double grad) {
    if (o.reduction == "mean") grad /= static_cast<double>(p.rows);
    lse[r] = static_cast<T>(lse_r);
    factor[r] = static_cast<T>(grad * (1 + 2 * o.z_loss * lse_r));
    shift[r] = static_cast<T>(grad * o.label_smoothing / static_cast<double>(p.words));
    hit[r] = static_cast<T>(grad * (1 - o.label_smoothing));
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

/// Where a pass adds its gradients; null if not wanted. Those of weight and bias once for each group of rows,
/// (groups, V, D) and (groups, V), as groups meet the same words at the same time.
template <class T>
struct Gradients {
  T *h, *weight_parts, *bias_parts;
};

/// The gradients from the rows in [begin, end), a chunk. Logits that were not kept are computed again.
template <class P, class T = typename P::Value>
void backward_chunk(const Problem& p, const Cut& cut, const LeftOfLogits<P>& h, const RowGradients<T>& g,
                    int64_t begin, int64_t end, const Gradients<T>& grad, const KeptLogits<P>* kept) {
  const int64_t width = p.width, rows_in_chunk = end - begin;
  const int64_t right_block = P::right_size(kBlockRows, width);
  Scratch<typename P::Packed> right_h(
      grad.weight_parts ? (rows_in_chunk + kBlockRows - 1) / kBlockRows * right_block : 0);
  if (grad.weight_parts) {
    for_each_row_block_in_parallel(begin, end, [&](int64_t row, int64_t rows) {
      P::right(rows, width, p.h.template const_data_ptr<T>() + row * width,
               right_h.data + (row - begin) / kBlockRows * right_block);
    });
  }
  // A single slab has no other to be added to.
  Scratch<T> slab_grad_h(grad.h && cut.slabs > 1 ? cut.slabs * rows_in_chunk * width : 0);
  const auto grad_h_of = [&](int64_t slab, int64_t row) {
    return cut.slabs > 1 ? slab_grad_h.data + (slab * rows_in_chunk + row - begin) * width
                         : grad.h + row * width;
  };
  const int64_t groups = cut.groups_of(rows_in_chunk);
  at::parallel_for(0, cut.slabs * groups, 1, [&](int64_t first, int64_t last) {
    Scratch<T> scratch(KeptLogits<P>::in_place(kept) ? 0 : kBlockRows * kBlockStride);
    Scratch<typename P::Packed> columns(kept ? 0 : P::right_size(width, kBlockWords)),
        rows_of_weight(grad.h ? P::right_size(kBlockWords, width) : 0),
        left(P::left_size(kBlockRows, kBlockWords));
    for_each_task(
        first, last, groups, begin, end, [&](int64_t slab, int64_t group, int64_t from, int64_t to) {
          cut.for_each_block(slab, [&](int64_t word, int64_t words) {
            const T* weight = p.weight.template const_data_ptr<T>() + word * width;
            if (!kept) P::right_transposed(width, words, weight, columns.data);
            if (grad.h) P::right(words, width, weight, rows_of_weight.data);
            for_each_row_block(from, to, [&](int64_t row, int64_t rows) {
              const T *lse = g.lse.data() + row, *factor = g.factor.data() + row,
                      *shift = g.shift.data() + row;
              T* z = scratch.data;
              if (kept) {
                z = kept->gradient(row - begin, rows, word, words, lse, factor, shift, z);
              } else {
                block_logits<P>(p, h.blocks[row / kBlockRows], rows, word, words, columns.data, z);
                P::table().cross_entropy_backward(rows, words, z, kBlockStride, lse, factor, shift);
              }
              for_each_target(p, row, rows, word, words, z, [&](int64_t r, T& dz) { dz -= g.hit[r]; });
              if (grad.h) {
                P::multiply(rows, width, words, P::left(rows, words, z, kBlockStride, left.data),
                            rows_of_weight.data, grad_h_of(slab, row), width,
                            /*accumulate=*/word > cut.first_word(slab));
              }
              if (grad.weight_parts) {
                P::multiply(words, width, rows, P::left_transposed(words, rows, z, kBlockStride, left.data),
                            right_h.data + (row - begin) / kBlockRows * right_block,
                            grad.weight_parts + (group * p.words + word) * width, width,
                            /*accumulate=*/begin > 0 || row > from);
              }
              if (grad.bias_parts) {
                add_column_sums(rows, words, z, grad.bias_parts + group * p.words + word);
              }
            });
          });
        });
  });
  if (grad.h && cut.slabs > 1) {
    sum_parts(cut.slabs, rows_in_chunk * width, slab_grad_h.data, grad.h + begin * width);
  }
}

/// The gradients of a pass, in tensors.
template <class T>
struct GradientTensors {
  GradientTensors(const Problem& p, const Cut& cut, std::array<bool, 3> wanted) {
    const auto options = p.h.options();
    if (wanted[0]) h = at::empty({p.rows, p.width}, options);
    // Every group writes the whole of its part before it adds to it, if there are rows at all.
    if (wanted[1]) {
      weight_parts = at::empty({cut.groups, p.words, p.width}, options);
      prefer_huge_pages(weight_parts);
      if (p.rows == 0) weight_parts.zero_();
    }
    if (wanted[2]) bias_parts = at::zeros({cut.groups, p.words}, options);
  }

  Gradients<T> pointers() const {
    const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
    return {data(h), data(weight_parts), data(bias_parts)};
  }

  static Tensor sum(const Tensor& parts) {
    if (!parts.defined() || parts.size(0) == 1) return parts.defined() ? parts[0] : parts;
    const Tensor total = at::empty(parts.sizes().slice(1), parts.options());
    sum_parts(parts.size(0), total.numel(), parts.const_data_ptr<T>(), total.mutable_data_ptr<T>());
    return total;
  }

  ThreeTensors sums() const { return {h, sum(weight_parts), sum(bias_parts)}; }

  Tensor h, weight_parts, bias_parts;
};

template <class P, class T = typename P::Value>
ThreeTensors backward_as(const Problem& p, const RowGradients<T>& g, std::array<bool, 3> output_mask) {
  const Cut cut(p.words, p.rows);
  const LeftOfLogits<P> h(p);
  const GradientTensors<T> grads(p, cut, output_mask);
  const int64_t chunk = cut.groups * kTaskRows;
  for (int64_t row = 0; row < p.rows; row += chunk) {
    backward_chunk<P>(p, cut, h, g, row, std::min(p.rows, row + chunk), grads.pointers(), /*kept=*/nullptr);
  }
  return grads.sums();
}

/// All at once, chunk by chunk of rows: logits, their statistics, their gradients.
template <class P, class T = typename P::Value>
std::tuple<ThreeTensors, ThreeTensors> forward_backward_as(const Problem& p, const Options& o,
                                                           at::IntArrayRef shape,
                                                           std::array<bool, 3> output_mask) {
  const Cut cut(p.words, p.rows);
  const LeftOfLogits<P> h(p);
  const GradientTensors<T> grads(p, cut, output_mask);
  const int64_t bytes_of_row =
      cut.blocks * kBlockStride * static_cast<int64_t>(sizeof(typename KeptLogits<P>::Kept));
  const int64_t affordable = kKeptBytes / bytes_of_row / kBlockRows * kBlockRows;
  const int64_t chunk =
      std::min({std::clamp(affordable, kBlockRows, cut.groups * kTaskRows), round_up(p.rows, kBlockRows)});
  const KeptLogits<P> kept(cut, chunk);
  Statistics<T> s(cut.slabs, p.rows);
  Losses losses(p);
  RowGradients<T> g(p);
  for (int64_t row = 0; row < p.rows; row += chunk) {
    const int64_t end = std::min(p.rows, row + chunk);
    scan_vocabulary<P>(p, cut, h, row, end, s, &kept);
    losses.finish(p, cut, o, row, end, s);
    for (int64_t r = row; r < end; ++r) g.set(p, o, r, losses.lse[r], /*grad=*/1);
    backward_chunk<P>(p, cut, h, g, row, end, grads.pointers(), &kept);
  }
  return {losses.reduced<T>(p, o, shape), grads.sums()};
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
                          c10::string_view reduction, c10::string_view precision,
                          std::array<bool, 3> output_mask) {
  new_gradients(grad_loss, h, weight, bias, target, lse, label_smoothing, z_loss, ignore_index, reduction,
                precision, output_mask);
  const Problem p(h, weight, bias, target, ignore_index);
  ThreeTensors grads;
  dispatch_products(h, precision, [&](auto products) {
    using P = decltype(products);
    using T = typename P::Value;
    const Tensor grad = kernel_input(grad_loss, p.h), lses = kernel_input(lse, p.h);
    RowGradients<T> g(p);
    for (int64_t r = 0; r < p.rows; ++r) {
      g.set(p, {label_smoothing, z_loss, reduction}, r, lses.const_data_ptr<T>()[p.positions[r]],
            grad.const_data_ptr<T>()[reduction == "none" ? p.positions[r] : 0]);
    }
    grads = backward_as<P>(p, g, output_mask);
  });
  const auto as_input = [&](const Tensor& t) { return t.defined() ? t.to(h.scalar_type()) : t; };
  auto& [grad_h, grad_weight, grad_bias] = grads;
  if (grad_h.defined()) grad_h = grad_of_all_rows(p, grad_h, h);
  return {as_input(grad_h), as_input(grad_weight), as_input(grad_bias)};
}

SixTensors forward_backward_cpu(const Tensor& h, const Tensor& weight, const OptionalTensor& bias,
                                const Tensor& target, double label_smoothing, double z_loss,
                                int64_t ignore_index, c10::string_view reduction, c10::string_view precision,
                                std::array<bool, 3> output_mask) {
  new_outputs_and_gradients(h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction,
                            precision, output_mask);
  const Problem p(h, weight, bias, target, ignore_index);
  std::tuple<ThreeTensors, ThreeTensors> out;
  dispatch_products(h, precision, [&](auto products) {
    out = forward_backward_as<decltype(products)>(p, {label_smoothing, z_loss, reduction}, target.sizes(),
                                                  output_mask);
  });
  auto& [loss, nll, lse] = std::get<0>(out);
  auto& [grad_h, grad_weight, grad_bias] = std::get<1>(out);
  if (grad_h.defined()) grad_h = grad_of_all_rows(p, grad_h, h);
  const auto or_empty = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, lse.options()); };
  return {loss, nll, lse, or_empty(grad_h), or_empty(grad_weight), or_empty(grad_bias)};
}

Tensor scale_cpu(const Tensor& gradient, const Tensor& grad_loss, const Tensor& h, const Tensor& /*weight*/,
                 const OptionalTensor& /*bias*/) {
  return at::mul(gradient, grad_loss).to(h.scalar_type());
}

// ---- autograd ----

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& h,
                                                const Tensor& weight, const OptionalTensor& bias,
                                                const Tensor& target, double label_smoothing, double z_loss,
                                                int64_t ignore_index, const std::string& reduction,
                                                const std::string& precision) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, nll, lse] = flashlm::forward(h, weight, bias, target, label_smoothing, z_loss, ignore_index,
                                             reduction, precision);
    ctx->mark_non_differentiable({nll, lse});
    ctx->save_for_backward({h, weight, bias.value_or(Tensor()), target, lse});
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->saved_data["z_loss"] = z_loss;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["precision"] = precision;
    return {loss, nll, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor bias = if_defined(saved[2]);
    auto& data = ctx->saved_data;
    // Inputs that are not tensors, a missing bias too, are not counted by needs_input_grad.
    auto [grad_h, grad_weight, grad_bias] = flashlm::backward(
        grads[0], saved[0], saved[1], bias, saved[3], saved[4], data["label_smoothing"].toDouble(),
        data["z_loss"].toDouble(), data["ignore_index"].toInt(), data["reduction"].toStringRef(),
        data["precision"].toStringRef(),
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), bias && ctx->needs_input_grad(2)});
    return {grad_h, grad_weight, grad_bias, no_grad(), no_grad(), no_grad(), no_grad(), no_grad(), no_grad()};
  }
};

/// The same for a loss that is a scalar: the forward pass computes the gradients, for the loss's own of 1.
struct ScalarLinearCrossEntropy : torch::autograd::Function<ScalarLinearCrossEntropy> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& h,
                                                const Tensor& weight, const OptionalTensor& bias,
                                                const Tensor& target, double label_smoothing, double z_loss,
                                                int64_t ignore_index, const std::string& reduction,
                                                const std::string& precision, std::array<bool, 3> wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, nll, lse, grad_h, grad_weight, grad_bias] = forward_backward(
        h, weight, bias, target, label_smoothing, z_loss, ignore_index, reduction, precision, wanted);
    ctx->mark_non_differentiable({nll, lse});
    const auto if_wanted = [&](size_t i, const Tensor& t) { return wanted[i] ? t : Tensor(); };
    ctx->save_for_backward({if_wanted(0, grad_h), if_wanted(1, grad_weight), if_wanted(2, grad_bias), h,
                            weight, bias.value_or(Tensor())});
    return {loss, nll, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    return scaled_gradients(ctx->get_saved_variables(), grads[0], /*arguments=*/10);
  }
};

ThreeTensors forward_autograd(const Tensor& h, const Tensor& weight, const OptionalTensor& bias,
                              const Tensor& target, double label_smoothing, double z_loss,
                              int64_t ignore_index, c10::string_view reduction, c10::string_view precision) {
  const std::array<bool, 3> wanted = {h.requires_grad(), weight.requires_grad(),
                                      bias && bias->requires_grad()};
  if (reduction != "none" && at::GradMode::is_enabled() && (wanted[0] || wanted[1] || wanted[2])) {
    auto out = ScalarLinearCrossEntropy::apply(h, weight, bias, target, label_smoothing, z_loss, ignore_index,
                                               std::string(reduction), std::string(precision), wanted);
    return {out[0], out[1], out[2]};
  }
  auto out = LinearCrossEntropy::apply(h, weight, bias, target, label_smoothing, z_loss, ignore_index,
                                       std::string(reduction), std::string(precision));
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CompositeImplicitAutograd, m) { m.impl("linear_cross_entropy", composite); }
TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("_linear_cross_entropy_forward", forward_cpu);
  m.impl("_linear_cross_entropy_backward", backward_cpu);
  m.impl("_linear_cross_entropy_forward_backward", forward_backward_cpu);
  m.impl("_scale_gradient", scale_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("_linear_cross_entropy_forward", new_outputs);
  m.impl("_linear_cross_entropy_backward", new_gradients);
  m.impl("_linear_cross_entropy_forward_backward", new_outputs_and_gradients);
  m.impl("_scale_gradient", new_scaled);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("_linear_cross_entropy_forward", forward_autograd);
  for (const char* op :
       {"_linear_cross_entropy_backward", "_linear_cross_entropy_forward_backward", "_scale_gradient"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace flashlm
