// SPDX-License-Identifier: Apache-2.0
// The loss is linear_cross_entropy over the classes plus _hierarchical_words_forward, which takes the classes
// as tasks: it gathers a class's positions and words, and then works on blocks of logits that never leave the
// cache. log p of all words is a composite of ATen; top_k and sample go row by row and read the words of a
// class only where its bounds do not settle the matter.
#include "ops/hierarchical_cross_entropy.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/DistributionsHelper.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <numeric>
#include <string>

#include "ops/common.h"
#include "ops/linear_cross_entropy.h"
#include "ops/products.h"
#include "ops/scalar_loss.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "hierarchical_cross_entropy(Tensor h, Tensor class_weight, Tensor? class_bias, Tensor word_weight, "
      "Tensor? word_bias, Tensor class_words, Tensor class_offsets, Tensor target, *, "
      "float label_smoothing=0., float z_loss=0., int ignore_index=-100, str reduction=\"mean\", "
      "str precision=\"float32\") -> (Tensor loss, Tensor nll)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "hierarchical_log_prob(Tensor h, Tensor class_weight, Tensor? class_bias, Tensor word_weight, "
      "Tensor? word_bias, Tensor class_words, Tensor class_offsets) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "hierarchical_top_k(Tensor h, Tensor class_weight, Tensor? class_bias, Tensor word_weight, "
      "Tensor? word_bias, Tensor class_words, Tensor class_offsets, int k) -> (Tensor log_prob, Tensor word)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "hierarchical_sample(Tensor h, Tensor class_weight, Tensor? class_bias, Tensor word_weight, "
      "Tensor? word_bias, Tensor class_words, Tensor class_offsets, *, float temperature=1., int top_k=0, "
      "float top_p=1., Generator? generator=None) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded});
  m.def(
      "_hierarchical_places(str op, Tensor class_words, Tensor class_offsets, Tensor word, int ignore_index) "
      "-> (Tensor class_index, Tensor place)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_hierarchical_words_forward(Tensor h, Tensor word_weight, Tensor? word_bias, Tensor class_words, "
      "Tensor class_offsets, Tensor place, float label_smoothing, float z_loss, str reduction, "
      "str precision) -> (Tensor loss, Tensor nll, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_hierarchical_words_forward_backward(Tensor h, Tensor word_weight, Tensor? word_bias, "
      "Tensor class_words, Tensor class_offsets, Tensor place, float label_smoothing, float z_loss, "
      "str reduction, str precision, bool[3] output_mask) -> (Tensor loss, Tensor nll, Tensor lse, "
      "Tensor grad_h, Tensor grad_weight, Tensor grad_bias)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_hierarchical_words_backward(Tensor grad_loss, Tensor h, Tensor word_weight, Tensor? word_bias, "
      "Tensor class_words, Tensor class_offsets, Tensor place, Tensor lse, float label_smoothing, "
      "float z_loss, str reduction, str precision, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

std::tuple<at::Tensor, at::Tensor> hierarchical_cross_entropy(
    const at::Tensor& h, const at::Tensor& class_weight, const std::optional<at::Tensor>& class_bias,
    const at::Tensor& word_weight, const std::optional<at::Tensor>& word_bias, const at::Tensor& class_words,
    const at::Tensor& class_offsets, const at::Tensor& target, double label_smoothing, double z_loss,
    int64_t ignore_index, c10::string_view reduction, c10::string_view precision) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::hierarchical_cross_entropy", "")
                             .typed<decltype(hierarchical_cross_entropy)>();
  return op.call(h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets, target,
                 label_smoothing, z_loss, ignore_index, reduction, precision);
}

at::Tensor hierarchical_log_prob(const at::Tensor& h, const at::Tensor& class_weight,
                                 const std::optional<at::Tensor>& class_bias, const at::Tensor& word_weight,
                                 const std::optional<at::Tensor>& word_bias, const at::Tensor& class_words,
                                 const at::Tensor& class_offsets) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::hierarchical_log_prob", "")
                             .typed<decltype(hierarchical_log_prob)>();
  return op.call(h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets);
}

std::tuple<at::Tensor, at::Tensor> hierarchical_top_k(const at::Tensor& h, const at::Tensor& class_weight,
                                                      const std::optional<at::Tensor>& class_bias,
                                                      const at::Tensor& word_weight,
                                                      const std::optional<at::Tensor>& word_bias,
                                                      const at::Tensor& class_words,
                                                      const at::Tensor& class_offsets, int64_t k) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::hierarchical_top_k", "")
                             .typed<decltype(hierarchical_top_k)>();
  return op.call(h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets, k);
}

at::Tensor hierarchical_sample(const at::Tensor& h, const at::Tensor& class_weight,
                               const std::optional<at::Tensor>& class_bias, const at::Tensor& word_weight,
                               const std::optional<at::Tensor>& word_bias, const at::Tensor& class_words,
                               const at::Tensor& class_offsets, double temperature, int64_t top_k,
                               double top_p, std::optional<at::Generator> generator) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::hierarchical_sample", "")
                             .typed<decltype(hierarchical_sample)>();
  return op.call(h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets, temperature,
                 top_k, top_p, std::move(generator));
}

namespace {

using Tensor = at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;
using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr const char* kLoss = "hierarchical_cross_entropy";

// ---- checks ----

void check_h(const char* op, const Tensor& h) {
  check_floating(op, "h", h);
  TORCH_CHECK(h.dim() >= 1, op, ": h must have at least 1 dimension, got 0");
}

void check_dtype_of_h(const char* op, const std::string& name, const Tensor& t, const Tensor& h) {
  TORCH_CHECK(t.scalar_type() == h.scalar_type(), op, ": ", name, " must have h's dtype ", h.scalar_type(),
              ", got ", t.scalar_type());
}

/// One level's weight and bias: "class_weight" and "class_bias", or the words'.
void check_level(const char* op, const std::string& level, const Tensor& weight, const OptionalTensor& bias,
                 const Tensor& h) {
  const std::string weight_name = level + "_weight", bias_name = level + "_bias";
  check_dtype_of_h(op, weight_name, weight, h);
  check_dim(op, weight_name.c_str(), weight, 2);
  check_size(op, (weight_name + "'s last dimension").c_str(), weight.sym_size(1), h.sym_size(-1));
  TORCH_SYM_CHECK(weight.sym_size(0).sym_gt(0), op, ": ", weight_name, " must have at least 1 row, got 0");
  if (!bias) return;
  check_dtype_of_h(op, bias_name, *bias, h);
  check_dim(op, bias_name.c_str(), *bias, 1);
  check_size(op, (bias_name + "'s size").c_str(), bias->sym_size(0), weight.sym_size(0));
}

void check_indices(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kLong, op, ": ", name, " must be int64, got ", t.scalar_type());
  check_dim(op, name, t, 1);
}

/// What is known of the classes without reading them; the rest is for Classes.
void check_classes(const char* op, const Tensor& class_words, const Tensor& class_offsets,
                   const Tensor& word_weight) {
  check_indices(op, "class_words", class_words);
  check_size(op, "class_words' size", class_words.sym_size(0), word_weight.sym_size(0));
  check_indices(op, "class_offsets", class_offsets);
}

void check_all(const char* op, const Tensor& h, const Tensor& class_weight, const OptionalTensor& class_bias,
               const Tensor& word_weight, const OptionalTensor& word_bias, const Tensor& class_words,
               const Tensor& class_offsets) {
  check_h(op, h);
  check_level(op, "class", class_weight, class_bias, h);
  check_level(op, "word", word_weight, word_bias, h);
  check_classes(op, class_words, class_offsets, word_weight);
  check_size(op, "class_offsets' size, C + 1,", class_offsets.sym_size(0), class_weight.sym_size(0) + 1);
}

void check_shape(const char* rule, const Tensor& t, c10::SymIntArrayRef want) {
  TORCH_CHECK(t.dim() == static_cast<int64_t>(want.size()), kLoss, ": ", rule, " ", want, ", got ",
              t.sym_sizes());
  for (int64_t d = 0; d < t.dim(); ++d) {
    TORCH_SYM_CHECK(t.sym_size(d).sym_eq(want[d]), kLoss, ": ", rule, " ", want, ", got ", t.sym_sizes());
  }
}

/// class_words and class_offsets, read and checked but for words that are named twice.
struct Classes {
  Classes(const char* op, const Tensor& class_words, const Tensor& class_offsets)
      : words_tensor(class_words.contiguous()),
        offsets_tensor(class_offsets.contiguous()),
        words(words_tensor.const_data_ptr<int64_t>()),
        offsets(offsets_tensor.const_data_ptr<int64_t>()),
        count(class_offsets.numel() - 1),
        vocabulary(class_words.numel()) {
    TORCH_CHECK(count >= 1, op, ": class_offsets must have at least 2 values, got ", count + 1);
    TORCH_CHECK(offsets[0] == 0 && offsets[count] == vocabulary, op,
                ": class_offsets must go from 0 to V = ", vocabulary, ", got ", offsets[0], " to ",
                offsets[count]);
    for (int64_t c = 0; c < count; ++c) {
      TORCH_CHECK(offsets[c] < offsets[c + 1], op, ": class_offsets must rise, got ", offsets[c + 1],
                  " after ", offsets[c], " at ", c + 1);
    }
    for (int64_t i = 0; i < vocabulary; ++i) {
      TORCH_CHECK(words[i] >= 0 && words[i] < vocabulary, op, ": class_words must be in [0, V) = [0, ",
                  vocabulary, "), got ", words[i], " at ", i);
    }
  }

  int64_t size(int64_t c) const { return offsets[c + 1] - offsets[c]; }
  /// The class of class_words[place].
  int64_t of_place(int64_t place) const {
    return std::upper_bound(offsets, offsets + count + 1, place) - offsets - 1;
  }

  Tensor words_tensor, offsets_tensor;
  const int64_t *words, *offsets;
  int64_t count, vocabulary;
};

// ---- where words stand: their classes, and their places in class_words ----

TwoTensors places(c10::string_view name, const Tensor& class_words, const Tensor& class_offsets,
                  const Tensor& word, int64_t ignore_index) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_hierarchical_places", "")
                             .typed<decltype(places)>();
  return op.call(name, class_words, class_offsets, word, ignore_index);
}

TwoTensors new_places(c10::string_view /*name*/, const Tensor& class_words, const Tensor& class_offsets,
                      const Tensor& word, int64_t /*ignore_index*/) {
  check_indices(kLoss, "class_words", class_words);
  check_indices(kLoss, "class_offsets", class_offsets);
  TORCH_CHECK(word.scalar_type() == at::kLong, kLoss, ": target must be int64, got ", word.scalar_type());
  const auto shape = word.sym_sizes();
  return {at::empty_symint(shape, word.options()), at::empty_symint(shape, word.options())};
}

/// -1 and -1 for an ignored word: any other ignore_index may be a class.
TwoTensors places_cpu(c10::string_view name, const Tensor& class_words, const Tensor& class_offsets,
                      const Tensor& word, int64_t ignore_index) {
  const std::string op(name);
  auto [class_index, place] = new_places(name, class_words, class_offsets, word, ignore_index);
  const Classes classes(op.c_str(), class_words, class_offsets);
  std::vector<int64_t> place_of(classes.vocabulary, -1);
  for (int64_t i = 0; i < classes.vocabulary; ++i) {
    int64_t& at = place_of[classes.words[i]];
    TORCH_CHECK(at < 0, op, ": class_words must name each word once, got word ", classes.words[i], " at ", at,
                " and at ", i);
    at = i;
  }
  const Tensor words = word.contiguous();
  const int64_t* w = words.const_data_ptr<int64_t>();
  int64_t* to_class = class_index.mutable_data_ptr<int64_t>();
  int64_t* to_place = place.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < words.numel(); ++i) {
    if (w[i] == ignore_index) {
      to_class[i] = to_place[i] = -1;
      continue;
    }
    TORCH_CHECK(w[i] >= 0 && w[i] < classes.vocabulary, op, ": target must be in [0, V) = [0, ",
                classes.vocabulary, ") or ignore_index ", ignore_index, ", got ", w[i], " at position ", i);
    to_place[i] = place_of[w[i]];
    to_class[i] = classes.of_place(to_place[i]);
  }
  return {class_index, place};
}

// ---- the loss's second level: shapes ----

ThreeTensors words_forward(const Tensor& h, const Tensor& word_weight, const OptionalTensor& word_bias,
                           const Tensor& class_words, const Tensor& class_offsets, const Tensor& place,
                           double label_smoothing, double z_loss, c10::string_view reduction,
                           c10::string_view precision) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_hierarchical_words_forward", "")
                             .typed<decltype(words_forward)>();
  return op.call(h, word_weight, word_bias, class_words, class_offsets, place, label_smoothing, z_loss,
                 reduction, precision);
}

ThreeTensors words_backward(const Tensor& grad_loss, const Tensor& h, const Tensor& word_weight,
                            const OptionalTensor& word_bias, const Tensor& class_words,
                            const Tensor& class_offsets, const Tensor& place, const Tensor& lse,
                            double label_smoothing, double z_loss, c10::string_view reduction,
                            c10::string_view precision, std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_hierarchical_words_backward", "")
                             .typed<decltype(words_backward)>();
  return op.call(grad_loss, h, word_weight, word_bias, class_words, class_offsets, place, lse,
                 label_smoothing, z_loss, reduction, precision, output_mask);
}

SixTensors words_forward_backward(const Tensor& h, const Tensor& word_weight, const OptionalTensor& word_bias,
                                  const Tensor& class_words, const Tensor& class_offsets, const Tensor& place,
                                  double label_smoothing, double z_loss, c10::string_view reduction,
                                  c10::string_view precision, std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_hierarchical_words_forward_backward", "")
                             .typed<decltype(words_forward_backward)>();
  return op.call(h, word_weight, word_bias, class_words, class_offsets, place, label_smoothing, z_loss,
                 reduction, precision, output_mask);
}

ThreeTensors new_outputs(const Tensor& h, const Tensor& word_weight, const OptionalTensor& word_bias,
                         const Tensor& class_words, const Tensor& class_offsets, const Tensor& place,
                         double label_smoothing, double z_loss, c10::string_view reduction,
                         c10::string_view precision) {
  check_h(kLoss, h);
  check_level(kLoss, "word", word_weight, word_bias, h);
  check_classes(kLoss, class_words, class_offsets, word_weight);
  check_shape("target's shape must be h's leading dimensions", place, h.sym_sizes().slice(0, h.dim() - 1));
  TORCH_CHECK(label_smoothing >= 0 && label_smoothing < 1, kLoss, ": label_smoothing must be in [0, 1), got ",
              label_smoothing);
  TORCH_CHECK(z_loss >= 0, kLoss, ": z_loss must be >= 0, got ", z_loss);
  TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none", kLoss,
              ": reduction must be mean, sum or none, got '", reduction, "'");
  TORCH_CHECK(precision == "float32" || precision == "bfloat16", kLoss,
              ": precision must be float32 or bfloat16, got '", precision, "'");
  const auto options = h.options().dtype(compute_dtype(h));
  const auto positions = place.sym_sizes();
  const auto reduced = reduction == "none" ? positions : c10::SymIntArrayRef();
  return {at::empty_symint(reduced, options), at::empty_symint(reduced, options),
          at::empty_symint(positions, options)};
}

ThreeTensors new_gradients(const Tensor& grad_loss, const Tensor& h, const Tensor& word_weight,
                           const OptionalTensor& word_bias, const Tensor& class_words,
                           const Tensor& class_offsets, const Tensor& place, const Tensor& lse,
                           double label_smoothing, double z_loss, c10::string_view reduction,
                           c10::string_view precision, std::array<bool, 3> output_mask) {
  new_outputs(h, word_weight, word_bias, class_words, class_offsets, place, label_smoothing, z_loss,
              reduction, precision);
  check_shape("grad_loss's shape must be the loss's", grad_loss,
              reduction == "none" ? place.sym_sizes() : c10::SymIntArrayRef());
  check_shape("lse's shape must be target's", lse, place.sym_sizes());
  TORCH_CHECK(word_bias || !output_mask[2], kLoss, ": no gradient of a bias that is not given");
  return {output_mask[0] ? h.new_empty_symint(h.sym_sizes()) : no_grad(),
          output_mask[1] ? word_weight.new_empty_symint(word_weight.sym_sizes()) : no_grad(),
          output_mask[2] ? word_bias->new_empty_symint(word_bias->sym_sizes()) : no_grad()};
}

/// Gradients in the compute dtype, of a loss that is a scalar; empty where not wanted.
SixTensors new_outputs_and_gradients(const Tensor& h, const Tensor& word_weight,
                                     const OptionalTensor& word_bias, const Tensor& class_words,
                                     const Tensor& class_offsets, const Tensor& place, double label_smoothing,
                                     double z_loss, c10::string_view reduction, c10::string_view precision,
                                     std::array<bool, 3> output_mask) {
  TORCH_CHECK(reduction != "none", kLoss, ": gradients of 'none' need those of its losses first");
  TORCH_CHECK(word_bias || !output_mask[2], kLoss, ": no gradient of a bias that is not given");
  auto [loss, nll, lse] = new_outputs(h, word_weight, word_bias, class_words, class_offsets, place,
                                      label_smoothing, z_loss, reduction, precision);
  const auto like = [&](size_t i, const Tensor& t) {
    return output_mask[i] ? at::empty_symint(t.sym_sizes(), loss.options()) : at::empty({0}, loss.options());
  };
  return {loss, nll, lse, like(0, h), like(1, word_weight), like(2, word_bias.value_or(h))};
}

// ---- what all passes work on ----

constexpr int64_t kBlockRows = 256;
constexpr int64_t kBlockWords = 256;
// A row of a block in memory: 16 more, so that a column does not fall on a handful of the cache's sets.
constexpr int64_t kBlockStride = kBlockWords + 16;
// The most logits of a class that a thread keeps from its forward to its backward pass.
constexpr int64_t kKeptLogits = 1 << 20;

struct Options {
  double label_smoothing, z_loss;
  c10::string_view reduction;
};

/// The arguments as the kernels read them, and the positions grouped by class.
struct Problem {
  Problem(const Tensor& h_in, const Tensor& weight_in, const OptionalTensor& bias_in,
          const Tensor& class_words, const Tensor& class_offsets, const Tensor& place_in)
      : classes(kLoss, class_words, class_offsets),
        width(h_in.size(-1)),
        h(kernel_input(h_in, h_in)),
        weight(kernel_input(weight_in, h_in)),
        bias(bias_in ? kernel_input(*bias_in, h_in) : Tensor()),
        first(classes.count + 1),
        dearest(classes.count) {
    const Tensor all = place_in.contiguous();
    const int64_t* place_of = all.const_data_ptr<int64_t>();
    std::vector<int64_t> class_of(all.numel());
    for (int64_t i = 0; i < all.numel(); ++i) {
      class_of[i] = place_of[i] < 0 ? -1 : classes.of_place(place_of[i]);
      if (place_of[i] < 0) {
        ignored.push_back(i);
      } else {
        ++first[class_of[i] + 1];
      }
    }
    std::partial_sum(first.begin(), first.end(), first.begin());
    positions.resize(first.back());
    places.resize(first.back());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < all.numel(); ++i) {
      if (place_of[i] < 0) continue;
      const int64_t row = next[class_of[i]]++;
      positions[row] = i;
      places[row] = place_of[i];
    }
    std::iota(dearest.begin(), dearest.end(), 0);
    const auto cost = [&](int64_t c) { return (rows(c) + 1) * classes.size(c); };
    std::sort(dearest.begin(), dearest.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  }

  int64_t rows(int64_t c) const { return first[c + 1] - first[c]; }

  Classes classes;
  int64_t width;
  Tensor h;                        // (..., width)
  Tensor weight;                   // (V, width)
  Tensor bias;                     // (V), or undefined
  std::vector<int64_t> first;      // class c has the rows first[c] .. first[c + 1]
  std::vector<int64_t> dearest;    // the classes, by falling cost
  std::vector<int64_t> positions;  // of each row
  std::vector<int64_t> places;     // of each row's target
  std::vector<int64_t> ignored;    // positions that are not among the rows
};

/// Hands the classes out, the dearest first so that threads end together. Each is one thread's whole work and
/// writes results of its own, so that who gets which does not matter.
class Tasks {
 public:
  explicit Tasks(const Problem& p) : classes_(p.dearest) {}

  /// The next class, or -1.
  int64_t next() {
    const size_t i = next_++;
    return i < classes_.size() ? classes_[i] : -1;
  }

 private:
  const std::vector<int64_t>& classes_;
  std::atomic<size_t> next_{0};
};

/// body() on every thread.
template <class Body>
void on_all_threads(const Body& body) {
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { body(); });
}

/// Rows here and there in memory: no processor guesses the next one, so it is asked for ahead.
template <class T>
void gather_rows(const T* from, int64_t rows, int64_t width, const int64_t* index, T* to) {
  constexpr int64_t kAhead = 4, kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r) {
    if (r + kAhead < rows) {
      const T* next = from + index[r + kAhead] * width;
      for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(next + i);
    }
    std::copy_n(from + index[r] * width, width, to + r * width);
  }
}

template <class T>
void scatter_rows(const T* from, int64_t rows, int64_t width, const int64_t* index, T* to) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * width, width, to + index[r] * width);
}

/// body(begin, size) for each block of n.
template <class Body>
void for_each_block(int64_t n, int64_t block, const Body& body) {
  for (int64_t begin = 0; begin < n; begin += block) body(begin, std::min(block, n - begin));
}

/// One thread's view of the class that it works on: its rows of h and, a block at a time, its words.
template <class P, class T = typename P::Value>
struct ClassBlocks {
  explicit ClassBlocks(const Problem& problem)
      : p(problem),
        weight(kBlockWords * p.width),
        bias(kBlockWords),
        z(kBlockRows * kBlockStride),
        columns(P::right_size(p.width, kBlockWords)) {}

  void start(int64_t c) {
    first_row = p.first[c];
    rows = p.rows(c);
    first_place = p.classes.offsets[c];
    words = p.classes.size(c);
    kept = false;
    loaded = -1;
    h.resize(rows * p.width);
    gather_rows(p.h.template const_data_ptr<T>(), rows, p.width, p.positions.data() + first_row, h.data);
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows, size = P::left_size(kBlockRows, p.width);
    left_memory.resize(blocks * size);
    left_h.resize(blocks);
    for_each_block(rows, kBlockRows, [&](int64_t row, int64_t row_count) {
      const int64_t i = row / kBlockRows;
      left_h[i] = P::left(row_count, p.width, h.data + row * p.width, p.width, left_memory.data + i * size);
    });
  }

  /// From now on the class's logits stay, each block in a place of its own, if that is not too much.
  void keep() {
    const int64_t all = (words + kBlockWords - 1) / kBlockWords * rows * kBlockStride;
    kept = all <= kKeptLogits;
    if (kept) z.resize(all);
  }

  T* block(int64_t row, int64_t word) const {
    return z.data + (kept ? (word / kBlockWords * rows + row) * kBlockStride : 0);
  }

  /// The numbers of the class's words from its word-th on.
  const int64_t* numbers(int64_t word) const { return p.classes.words + first_place + word; }

  void load_words(int64_t word, int64_t count) {
    if (loaded == word) return;
    loaded = word;
    gather_rows(p.weight.template const_data_ptr<T>(), count, p.width, numbers(word), weight.data);
  }

  void pack_columns(int64_t word, int64_t count) {
    P::right_transposed(p.width, count, weight.data, columns.data);
    if (!p.bias.defined()) return;
    gather_rows(p.bias.template const_data_ptr<T>(), count, 1, numbers(word), bias.data);
  }

  /// The logits of a block of the class's rows by the words that are loaded and packed.
  T* logits(int64_t row, int64_t row_count, int64_t word, int64_t count) {
    T* const to = block(row, word);
    if (p.bias.defined()) {
      for (int64_t r = 0; r < row_count; ++r) std::copy_n(bias.data, count, to + r * kBlockStride);
    }
    P::multiply(row_count, count, p.width, left_h[row / kBlockRows], columns.data, to, kBlockStride,
                p.bias.defined());
    return to;
  }

  /// body(r, z of its target) for each of the block's rows whose target is among the block's words.
  template <class Body>
  void for_each_target(int64_t row, int64_t row_count, int64_t word, int64_t count, T* z_block,
                       const Body& body) const {
    for (int64_t r = row; r < row + row_count; ++r) {
      const int64_t column = p.places[first_row + r] - first_place - word;
      if (column >= 0 && column < count) body(r, z_block[(r - row) * kBlockStride + column]);
    }
  }

  const Problem& p;
  int64_t first_row, rows, first_place, words;
  int64_t loaded = -1;  // the first of the words in `weight`
  bool kept = false;
  Scratch<T> h;       // (rows, width)
  Scratch<T> weight;  // a block of words, (words, width)
  Scratch<T> bias, z;
  Scratch<typename P::Packed> columns, left_memory;
  std::vector<typename P::Left> left_h;  // h as the left operand of the logits, by row / kBlockRows
};

// ---- forward ----

/// What each position comes to.
template <class T>
struct Losses {
  Losses(const Problem& p, at::IntArrayRef shape)
      : loss(at::zeros(shape, p.h.options())), nll(at::zeros_like(loss)), lse(at::zeros_like(loss)) {}

  /// {loss, nll, lse} as the operator returns them.
  ThreeTensors reduced(const Problem& p, const Options& o) const {
    const T* lses = lse.const_data_ptr<T>();
    for (int64_t i = 0; i < lse.numel(); ++i) {
      TORCH_CHECK_VALUE(std::isfinite(lses[i]), kLoss,
                        ": logits must be finite, got a log-sum-exp over a class's words of ", lses[i],
                        " at position ", i);
    }
    if (o.reduction == "none") return {loss, nll, lse};
    const auto scalar = [&](const Tensor& values) {
      const T* v = values.const_data_ptr<T>();
      const double sum = std::accumulate(v, v + values.numel(), 0.0);
      const auto count = static_cast<double>(p.positions.size());
      return at::full({}, o.reduction == "mean" ? sum / count : sum, lse.options());
    };
    return {scalar(loss), scalar(nll), lse};
  }

  Tensor loss, nll, lse;
};

/// A thread's scan of one class after the other.
template <class P, class T = typename P::Value>
struct Scan {
  void operator()(ClassBlocks<P>& b, const Options& o, const Losses<T>& losses) {
    for (Scratch<T>* s : {&max, &sum_exp, &sum_z, &z_target}) s->resize(b.rows);
    std::fill_n(max.data, b.rows, std::numeric_limits<T>::lowest());
    std::fill_n(sum_exp.data, b.rows, T(0));
    std::fill_n(sum_z.data, b.rows, T(0));
    for_each_block(b.words, kBlockWords, [&](int64_t word, int64_t words) {
      b.load_words(word, words);
      b.pack_columns(word, words);
      for_each_block(b.rows, kBlockRows, [&](int64_t row, int64_t rows) {
        T* const z = b.logits(row, rows, word, words);
        P::table().cross_entropy(rows, words, z, kBlockStride, max.data + row, sum_exp.data + row,
                                 sum_z.data + row);
        b.for_each_target(row, rows, word, words, z, [&](int64_t r, T z_r) { z_target.data[r] = z_r; });
      });
    });
    T* const to_loss = losses.loss.template mutable_data_ptr<T>();
    T* const to_nll = losses.nll.template mutable_data_ptr<T>();
    T* const to_lse = losses.lse.template mutable_data_ptr<T>();
    for (int64_t r = 0; r < b.rows; ++r) {
      const double lse = max.data[r] + std::log(static_cast<double>(sum_exp.data[r]));
      const double nll = lse - z_target.data[r];
      double loss = nll + o.z_loss * lse * lse;
      // Not 0 * infinity when words are masked by a bias of -inf.
      if (o.label_smoothing > 0) {
        loss += o.label_smoothing * (z_target.data[r] - sum_z.data[r] / static_cast<double>(b.words));
      }
      const int64_t position = b.p.positions[b.first_row + r];
      to_lse[position] = static_cast<T>(lse);
      to_nll[position] = static_cast<T>(nll);
      to_loss[position] = static_cast<T>(loss);
    }
  }

  Scratch<T> max, sum_exp, sum_z, z_target;
};

template <class P, class T = typename P::Value>
ThreeTensors forward_as(const Problem& p, const Options& o, at::IntArrayRef shape) {
  const Losses<T> losses(p, shape);
  Tasks tasks(p);
  on_all_threads([&] {
    ClassBlocks<P> b(p);
    Scan<P> scan;
    for (int64_t c; (c = tasks.next()) >= 0;) {
      if (p.rows(c) == 0) continue;
      b.start(c);
      scan(b, o, losses);
    }
  });
  return losses.reduced(p, o);
}

ThreeTensors forward_cpu(const Tensor& h, const Tensor& word_weight, const OptionalTensor& word_bias,
                         const Tensor& class_words, const Tensor& class_offsets, const Tensor& place,
                         double label_smoothing, double z_loss, c10::string_view reduction,
                         c10::string_view precision) {
  new_outputs(h, word_weight, word_bias, class_words, class_offsets, place, label_smoothing, z_loss,
              reduction, precision);
  const Problem p(h, word_weight, word_bias, class_words, class_offsets, place);
  ThreeTensors out;
  dispatch_products(h, precision, [&](auto products) {
    out = forward_as<decltype(products)>(p, {label_smoothing, z_loss, reduction}, place.sizes());
  });
  return out;
}

// ---- backward ----

template <class T>
void add_column_sums(int64_t rows, int64_t words, const T* z, T* sum) {
  for (int64_t r = 0; r < rows; ++r, z += kBlockStride) {
    for (int64_t i = 0; i < words; ++i) sum[i] += z[i];
  }
}

/// The gradients of a pass, those not wanted undefined. All of them is written.
template <class T>
struct Gradients {
  Gradients(const Problem& p, std::array<bool, 3> wanted) {
    if (wanted[0]) h = at::empty_like(p.h);
    if (wanted[1]) weight = at::empty_like(p.weight);
    if (wanted[2]) bias = at::empty_like(p.bias);
    const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
    to_h = data(h);
    to_weight = data(weight);
    to_bias = data(bias);
    if (!to_h) return;
    for (const int64_t i : p.ignored) std::fill_n(to_h + i * p.width, p.width, T(0));
  }

  Tensor h, weight, bias;
  T *to_h, *to_weight, *to_bias;
};

/// A thread's backward pass over one class after the other. Logits that were kept become their gradients;
/// others are computed again.
template <class P, class T = typename P::Value>
struct Backward {
  /// grad_of(position): of its loss, after any mean.
  template <class GradOf>
  void operator()(ClassBlocks<P>& b, const Options& o, const T* lse_of, const GradOf& grad_of,
                  const Gradients<T>& to) {
    const int64_t width = b.p.width, right_size = P::right_size(kBlockRows, width);
    // The gradient of row r's logits is factor p - shift - [at the target] hit.
    for (Scratch<T>* s : {&lse, &factor, &shift, &hit}) s->resize(b.rows);
    for (int64_t r = 0; r < b.rows; ++r) {
      const int64_t position = b.p.positions[b.first_row + r];
      const double lse_r = lse_of[position], grad = grad_of(position);
      lse.data[r] = static_cast<T>(lse_r);
      factor.data[r] = static_cast<T>(grad * (1 + 2 * o.z_loss * lse_r));
      shift.data[r] = static_cast<T>(grad * o.label_smoothing / static_cast<double>(b.words));
      hit.data[r] = static_cast<T>(grad * (1 - o.label_smoothing));
    }
    if (to.to_h) {
      rows_of_weight.resize(P::right_size(kBlockWords, width));
      grad_h.resize(b.rows * width);
    }
    if (to.to_weight) {
      grad_weight.resize(kBlockWords * width);
      right_h.resize((b.rows + kBlockRows - 1) / kBlockRows * right_size);
      for_each_block(b.rows, kBlockRows, [&](int64_t row, int64_t rows) {
        P::right(rows, width, b.h.data + row * width, right_h.data + row / kBlockRows * right_size);
      });
    }
    left.resize(P::left_size(kBlockRows, kBlockWords));
    grad_bias.resize(kBlockWords);
    for_each_block(b.words, kBlockWords, [&](int64_t word, int64_t words) {
      if (b.rows == 0) {
        std::fill_n(grad_weight.data, to.to_weight ? words * width : 0, T(0));
      } else if (to.to_h || !b.kept) {
        b.load_words(word, words);
        if (!b.kept) b.pack_columns(word, words);
        if (to.to_h) P::right(words, width, b.weight.data, rows_of_weight.data);
      }
      std::fill_n(grad_bias.data, words, T(0));
      for_each_block(b.rows, kBlockRows, [&](int64_t row, int64_t rows) {
        T* const z = b.kept ? b.block(row, word) : b.logits(row, rows, word, words);
        P::table().cross_entropy_backward(rows, words, z, kBlockStride, lse.data + row, factor.data + row,
                                          shift.data + row);
        b.for_each_target(row, rows, word, words, z, [&](int64_t r, T& grad) { grad -= hit.data[r]; });
        if (to.to_h) {
          P::multiply(rows, width, words, P::left(rows, words, z, kBlockStride, left.data),
                      rows_of_weight.data, grad_h.data + row * width, width, /*accumulate=*/word > 0);
        }
        if (to.to_weight) {
          P::multiply(words, width, rows, P::left_transposed(words, rows, z, kBlockStride, left.data),
                      right_h.data + row / kBlockRows * right_size, grad_weight.data, width,
                      /*accumulate=*/row > 0);
        }
        if (to.to_bias) add_column_sums(rows, words, z, grad_bias.data);
      });
      if (to.to_weight) {
        P::table().stream_rows(words, width, grad_weight.data, b.numbers(word), to.to_weight);
      }
      if (to.to_bias) scatter_rows(grad_bias.data, words, 1, b.numbers(word), to.to_bias);
    });
    if (to.to_h) scatter_rows(grad_h.data, b.rows, width, b.p.positions.data() + b.first_row, to.to_h);
  }

  Scratch<T> lse, factor, shift, hit;
  Scratch<typename P::Packed> right_h, rows_of_weight, left;
  Scratch<T> grad_h;
  Scratch<T> grad_weight, grad_bias;  // of a block of words
};

/// What a position's gradient is divided by.
double divisor(const Problem& p, const Options& o) {
  return o.reduction == "mean" ? static_cast<double>(p.positions.size()) : 1;
}

ThreeTensors backward_cpu(const Tensor& grad_loss, const Tensor& h, const Tensor& word_weight,
                          const OptionalTensor& word_bias, const Tensor& class_words,
                          const Tensor& class_offsets, const Tensor& place, const Tensor& lse,
                          double label_smoothing, double z_loss, c10::string_view reduction,
                          c10::string_view precision, std::array<bool, 3> output_mask) {
  new_gradients(grad_loss, h, word_weight, word_bias, class_words, class_offsets, place, lse, label_smoothing,
                z_loss, reduction, precision, output_mask);
  const Problem p(h, word_weight, word_bias, class_words, class_offsets, place);
  const Options o = {label_smoothing, z_loss, reduction};
  ThreeTensors grads;
  dispatch_products(h, precision, [&](auto products) {
    using P = decltype(products);
    using T = typename P::Value;
    const Gradients<T> to(p, output_mask);
    const Tensor lses = kernel_input(lse, p.h), grad = kernel_input(grad_loss, p.h);
    const T* grads_of = grad.const_data_ptr<T>();
    const double each = 1 / divisor(p, o);
    Tasks tasks(p);
    on_all_threads([&] {
      ClassBlocks<P> b(p);
      Backward<P> class_backward;
      for (int64_t c; (c = tasks.next()) >= 0;) {
        b.start(c);
        class_backward(
            b, o, lses.const_data_ptr<T>(),
            [&](int64_t i) { return grads_of[o.reduction == "none" ? i : 0] * each; }, to);
      }
    });
    grads = {to.h, to.weight, to.bias};
  });
  const auto as_input = [&](const Tensor& t) { return t.defined() ? t.to(h.scalar_type()) : t; };
  auto& [grad_h, grad_weight, grad_bias] = grads;
  return {as_input(grad_h), as_input(grad_weight), as_input(grad_bias)};
}

// ---- both at once: a class's words are read once, and its logits computed once if they can be kept ----

SixTensors forward_backward_cpu(const Tensor& h, const Tensor& word_weight, const OptionalTensor& word_bias,
                                const Tensor& class_words, const Tensor& class_offsets, const Tensor& place,
                                double label_smoothing, double z_loss, c10::string_view reduction,
                                c10::string_view precision, std::array<bool, 3> output_mask) {
  new_outputs_and_gradients(h, word_weight, word_bias, class_words, class_offsets, place, label_smoothing,
                            z_loss, reduction, precision, output_mask);
  const Problem p(h, word_weight, word_bias, class_words, class_offsets, place);
  const Options o = {label_smoothing, z_loss, reduction};
  SixTensors out;
  dispatch_products(h, precision, [&](auto products) {
    using P = decltype(products);
    using T = typename P::Value;
    const Losses<T> losses(p, place.sizes());
    const Gradients<T> to(p, output_mask);
    const double each = 1 / divisor(p, o);
    Tasks tasks(p);
    on_all_threads([&] {
      ClassBlocks<P> b(p);
      Scan<P> scan;
      Backward<P> class_backward;
      for (int64_t c; (c = tasks.next()) >= 0;) {
        b.start(c);
        b.keep();
        if (b.rows > 0) scan(b, o, losses);
        class_backward(
            b, o, losses.lse.template const_data_ptr<T>(), [&](int64_t) { return each; }, to);
      }
    });
    const auto or_empty = [&](const Tensor& g) { return g.defined() ? g : at::empty({0}, p.h.options()); };
    const auto [loss, nll, lse] = losses.reduced(p, o);
    out = {loss, nll, lse, or_empty(to.h), or_empty(to.weight), or_empty(to.bias)};
  });
  return out;
}

// ---- autograd ----

struct HierarchicalWords : torch::autograd::Function<HierarchicalWords> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& h,
                                                const Tensor& word_weight, const OptionalTensor& word_bias,
                                                const Tensor& class_words, const Tensor& class_offsets,
                                                const Tensor& place, double label_smoothing, double z_loss,
                                                const std::string& reduction, const std::string& precision) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, nll, lse] = words_forward(h, word_weight, word_bias, class_words, class_offsets, place,
                                          label_smoothing, z_loss, reduction, precision);
    ctx->mark_non_differentiable({nll, lse});
    ctx->save_for_backward(
        {h, word_weight, word_bias.value_or(Tensor()), class_words, class_offsets, place, lse});
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->saved_data["z_loss"] = z_loss;
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["precision"] = precision;
    return {loss, nll, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor word_bias = if_defined(saved[2]);
    auto& data = ctx->saved_data;
    // Inputs that are not tensors, a missing bias too, are not counted by needs_input_grad.
    auto [grad_h, grad_weight, grad_bias] = words_backward(
        grads[0], saved[0], saved[1], word_bias, saved[3], saved[4], saved[5], saved[6],
        data["label_smoothing"].toDouble(), data["z_loss"].toDouble(), data["reduction"].toStringRef(),
        data["precision"].toStringRef(),
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), word_bias && ctx->needs_input_grad(2)});
    return {grad_h,    grad_weight, grad_bias, no_grad(), no_grad(),
            no_grad(), no_grad(),   no_grad(), no_grad(), no_grad()};
  }
};

/// The same for a loss that is a scalar: the forward pass computes the gradients, for the loss's own of 1.
struct ScalarHierarchicalWords : torch::autograd::Function<ScalarHierarchicalWords> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& h,
                                                const Tensor& word_weight, const OptionalTensor& word_bias,
                                                const Tensor& class_words, const Tensor& class_offsets,
                                                const Tensor& place, double label_smoothing, double z_loss,
                                                const std::string& reduction, const std::string& precision,
                                                std::array<bool, 3> wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, nll, lse, grad_h, grad_weight, grad_bias] =
        words_forward_backward(h, word_weight, word_bias, class_words, class_offsets, place, label_smoothing,
                               z_loss, reduction, precision, wanted);
    ctx->mark_non_differentiable({nll, lse});
    const auto if_wanted = [&](size_t i, const Tensor& t) { return wanted[i] ? t : Tensor(); };
    ctx->save_for_backward({if_wanted(0, grad_h), if_wanted(1, grad_weight), if_wanted(2, grad_bias), h,
                            word_weight, word_bias.value_or(Tensor())});
    return {loss, nll, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    return scaled_gradients(ctx->get_saved_variables(), grads[0], /*arguments=*/11);
  }
};

ThreeTensors forward_autograd(const Tensor& h, const Tensor& word_weight, const OptionalTensor& word_bias,
                              const Tensor& class_words, const Tensor& class_offsets, const Tensor& place,
                              double label_smoothing, double z_loss, c10::string_view reduction,
                              c10::string_view precision) {
  const std::array<bool, 3> wanted = {h.requires_grad(), word_weight.requires_grad(),
                                      word_bias && word_bias->requires_grad()};
  if (reduction != "none" && at::GradMode::is_enabled() && (wanted[0] || wanted[1] || wanted[2])) {
    auto out = ScalarHierarchicalWords::apply(h, word_weight, word_bias, class_words, class_offsets, place,
                                              label_smoothing, z_loss, std::string(reduction),
                                              std::string(precision), wanted);
    return {out[0], out[1], out[2]};
  }
  auto out =
      HierarchicalWords::apply(h, word_weight, word_bias, class_words, class_offsets, place, label_smoothing,
                               z_loss, std::string(reduction), std::string(precision));
  return {out[0], out[1], out[2]};
}

// ---- composites ----

TwoTensors loss_composite(const Tensor& h, const Tensor& class_weight, const OptionalTensor& class_bias,
                          const Tensor& word_weight, const OptionalTensor& word_bias,
                          const Tensor& class_words, const Tensor& class_offsets, const Tensor& target,
                          double label_smoothing, double z_loss, int64_t ignore_index,
                          c10::string_view reduction, c10::string_view precision) {
  check_all(kLoss, h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets);
  const auto [class_index, place] = places(kLoss, class_words, class_offsets, target, ignore_index);
  const auto [word_loss, word_nll, lse] = words_forward(h, word_weight, word_bias, class_words, class_offsets,
                                                        place, label_smoothing, z_loss, reduction, precision);
  const auto [class_loss, class_nll] =
      linear_cross_entropy(h, class_weight, class_bias, class_index, label_smoothing, z_loss,
                           /*ignore_index=*/-1, reduction, precision);
  return {class_loss + word_loss, class_nll + word_nll};
}

Tensor log_prob_composite(const Tensor& h_in, const Tensor& class_weight, const OptionalTensor& class_bias,
                          const Tensor& word_weight, const OptionalTensor& word_bias,
                          const Tensor& class_words, const Tensor& class_offsets) {
  const char* op = "hierarchical_log_prob";
  check_all(op, h_in, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets);
  const auto dtype = compute_dtype(h_in);
  const auto linear = [&](const Tensor& weight, const OptionalTensor& bias) {
    return at::linear(h_in.to(dtype), weight.to(dtype), bias ? OptionalTensor(bias->to(dtype)) : bias);
  };
  const Tensor log_class = linear(class_weight, class_bias).log_softmax(-1),
               z = linear(word_weight, word_bias);
  const Tensor words = at::arange(class_words.sym_size(0), class_words.options());
  const Tensor class_of = std::get<0>(places(op, class_words, class_offsets, words, /*ignore_index=*/-1));
  // A class's log-sum-exp, from differences with its largest logit.
  const Tensor max = at::zeros_like(log_class).detach().scatter_reduce(-1, class_of.expand_as(z), z.detach(),
                                                                       "amax", /*include_self=*/false);
  const Tensor sum =
      at::zeros_like(log_class).index_add(-1, class_of, (z - max.index_select(-1, class_of)).exp());
  return z + (log_class - max - sum.log()).index_select(-1, class_of);
}

// ---- words one by one: the likeliest, and drawn ones ----

double log_sum_exp(const std::vector<double>& z) {
  const double max = *std::max_element(z.begin(), z.end());
  if (std::isinf(max)) return max;
  double sum = 0;
  for (const double value : z) sum += std::exp(value - max);
  return max + std::log(sum);
}

/// What is known of p(w | h) for one h. A class's words are read when they are asked for, once. Everything is
/// in double from the logits on.
class Distribution {
 public:
  Distribution(const char* op, const Classes& division, const Tensor& h, const Tensor& class_weight,
               const OptionalTensor& class_bias, const Tensor& word_weight, const OptionalTensor& word_bias,
               int64_t position)
      : classes(division),
        op_(op),
        h_(h),
        word_weight_(word_weight),
        word_bias_(word_bias),
        position_(position),
        words_(division.count) {
    log_class = log_softmax(class_weight, class_bias, "the classes");
  }

  /// log p(w | h) of class c's words, in their order in class_words.
  const std::vector<double>& words(int64_t c) {
    if (words_[c].empty()) {
      const Tensor numbers = classes.words_tensor.slice(0, classes.offsets[c], classes.offsets[c + 1]);
      words_[c] =
          log_softmax(word_weight_.index_select(0, numbers),
                      word_bias_ ? OptionalTensor(word_bias_->index_select(0, numbers)) : std::nullopt,
                      "a class's words");
      for (double& log_p : words_[c]) log_p += log_class[c];
    }
    return words_[c];
  }
  bool is_read(int64_t c) const { return !words_[c].empty(); }

  const Classes& classes;
  std::vector<double> log_class;  // log p(c | h)

 private:
  std::vector<double> log_softmax(const Tensor& weight, const OptionalTensor& bias, const char* what) const {
    const auto dtype = h_.scalar_type();
    Tensor z = at::mv(weight.to(dtype), h_);
    if (bias) z += *bias;
    z = z.to(at::kDouble);
    std::vector<double> log_p(z.const_data_ptr<double>(), z.const_data_ptr<double>() + z.numel());
    const double lse = log_sum_exp(log_p);
    TORCH_CHECK_VALUE(std::isfinite(lse), op_, ": logits must be finite, got a log-sum-exp over ", what,
                      " of ", lse, " at position ", position_);
    for (double& value : log_p) value -= lse;
    return log_p;
  }

  const char* op_;
  Tensor h_;
  const Tensor& word_weight_;
  const OptionalTensor& word_bias_;
  int64_t position_;
  std::vector<std::vector<double>> words_;
};

/// The words by falling probability, as many as are asked for. Classes are read in the order of p(c); a word
/// has its final rank once no class that is left is likelier than it: no word is likelier than its class.
class Ranking {
 public:
  struct Word {
    double log_p;
    int64_t number;
    /// Of two equals the one with the smaller number is ahead.
    bool operator<(const Word& other) const {
      return log_p != other.log_p ? log_p < other.log_p : number > other.number;
    }
  };

  explicit Ranking(Distribution& distribution) : d_(distribution), order_(distribution.classes.count) {
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return d_.log_class[a] > d_.log_class[b]; });
  }

  /// Ranks k words at least, of as many as there are.
  void rank(int64_t k) {
    while (static_cast<int64_t>(ranked.size()) < k) read_next_class();
  }

  void read_next_class() {
    const int64_t c = order_[read_++];
    const std::vector<double>& log_p = d_.words(c);
    const int64_t* numbers = d_.classes.words + d_.classes.offsets[c];
    for (size_t i = 0; i < log_p.size(); ++i) {
      waiting_.push_back({log_p[i], numbers[i]});
      std::push_heap(waiting_.begin(), waiting_.end());
    }
    while (!waiting_.empty() && waiting_.front().log_p >= log_bound()) {
      std::pop_heap(waiting_.begin(), waiting_.end());
      ranked.push_back(waiting_.back());
      waiting_.pop_back();
    }
  }

  /// No word that is not ranked has a larger log p.
  double log_bound() const {
    return is_complete() ? -std::numeric_limits<double>::infinity() : d_.log_class[order_[read_]];
  }

  bool is_complete() const { return read_ == order_.size(); }

  std::vector<Word> ranked;

 private:
  Distribution& d_;
  std::vector<int64_t> order_;
  size_t read_ = 0;
  std::vector<Word> waiting_;  // a heap
};

/// log_prob and word of shape (..., k).
TwoTensors new_top_k(const Tensor& h, const Tensor& class_weight, const OptionalTensor& class_bias,
                     const Tensor& word_weight, const OptionalTensor& word_bias, const Tensor& class_words,
                     const Tensor& class_offsets, int64_t k) {
  const char* op = "hierarchical_top_k";
  check_all(op, h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets);
  TORCH_CHECK(k >= 1, op, ": k must be >= 1, got ", k);
  TORCH_SYM_CHECK(word_weight.sym_size(0).sym_ge(k), op, ": k must be at most V = ", word_weight.sym_size(0),
                  ", got ", k);
  auto shape = h.sym_sizes().vec();
  shape.back() = k;
  return {at::empty_symint(shape, h.options().dtype(compute_dtype(h))),
          at::empty_symint(shape, h.options().dtype(at::kLong))};
}

/// body(distribution, i) for each of the rows of h.
template <class Body>
void for_each_row(const char* op, const Tensor& h, const Tensor& class_weight,
                  const OptionalTensor& class_bias, const Tensor& word_weight,
                  const OptionalTensor& word_bias, const Tensor& class_words, const Tensor& class_offsets,
                  const Body& body) {
  const Classes classes(op, class_words, class_offsets);
  const Tensor rows = kernel_input(h, h).reshape({-1, h.size(-1)});
  for (int64_t i = 0; i < rows.size(0); ++i) {
    Distribution d(op, classes, rows[i], class_weight, class_bias, word_weight, word_bias, i);
    body(d, i);
  }
}

TwoTensors top_k_cpu(const Tensor& h, const Tensor& class_weight, const OptionalTensor& class_bias,
                     const Tensor& word_weight, const OptionalTensor& word_bias, const Tensor& class_words,
                     const Tensor& class_offsets, int64_t k) {
  auto [log_prob, word] =
      new_top_k(h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets, k);
  const Tensor log_p = at::empty(log_prob.sizes(), at::kDouble);
  double* to_log_p = log_p.mutable_data_ptr<double>();
  int64_t* to_word = word.mutable_data_ptr<int64_t>();
  for_each_row("hierarchical_top_k", h, class_weight, class_bias, word_weight, word_bias, class_words,
               class_offsets, [&](Distribution& d, int64_t i) {
                 Ranking ranking(d);
                 ranking.rank(k);
                 for (int64_t j = 0; j < k; ++j) {
                   to_log_p[i * k + j] = ranking.ranked[j].log_p;
                   to_word[i * k + j] = ranking.ranked[j].number;
                 }
               });
  return {log_prob.copy_(log_p), word};
}

/// Random numbers in [0, 1).
using Uniform = std::function<double()>;

/// The first index where the running sum of masses exceeds u times their sum.
int64_t draw(const std::vector<double>& masses, double u) {
  double left = u * std::accumulate(masses.begin(), masses.end(), 0.0);
  for (size_t i = 0; i < masses.size(); ++i) {
    left -= masses[i];
    if (left < 0) return static_cast<int64_t>(i);
  }
  // Rounding has left a little over.
  return std::find_if(masses.rbegin(), masses.rend(), [](double m) { return m > 0; }).base() -
         masses.begin() - 1;
}

/// e^(x - max x).
std::vector<double> exp_of_differences(std::vector<double> x) {
  const double max = *std::max_element(x.begin(), x.end());
  for (double& value : x) value = std::exp(value - max);
  return x;
}

std::vector<double> times(double a, std::vector<double> x) {
  for (double& value : x) value *= a;
  return x;
}

/// Bounds of the sum over a class's n words of p(w | c)^a, in logarithms: it is 1 for one word alone and
/// n^(1-a) for equal ones, and between for all others.
struct LogBounds {
  LogBounds(double a, int64_t n) {
    const double equal = (1 - a) * std::log(static_cast<double>(n));
    low = std::min(0.0, equal);
    high = std::max(0.0, equal);
  }
  double low, high;
};

/// Of all words, in proportion to p^a. A class is proposed in proportion to the bound of its words' sum, and
/// then kept with the probability sum / bound; a class that is not kept has the sum itself for its bound from
/// then on. What is kept is in proportion to the sums, whatever was turned down before.
int64_t draw_of_all(Distribution& d, double a, const Uniform& uniform) {
  std::vector<double> log_mass(d.classes.count);
  for (int64_t c = 0; c < d.classes.count; ++c) {
    log_mass[c] = a * d.log_class[c] + LogBounds(a, d.classes.size(c)).high;
  }
  while (true) {
    const int64_t c = draw(exp_of_differences(log_mass), uniform());
    const bool is_bound = !d.is_read(c);
    const std::vector<double> log_p = times(a, d.words(c));
    const double log_sum = log_sum_exp(log_p), log_bound = log_mass[c];
    if (!is_bound || uniform() < std::exp(log_sum - log_bound)) {
      return d.classes.words[d.classes.offsets[c] + draw(exp_of_differences(log_p), uniform())];
    }
    log_mass[c] = log_sum;
  }
}

/// Of the k likeliest words, and of these the fewest that have top_p of their mass.
int64_t draw_of_likeliest(Distribution& d, double a, int64_t k, double top_p, const Uniform& uniform) {
  Ranking ranking(d);
  ranking.rank(k);
  std::vector<double> masses;
  for (int64_t i = 0; i < k; ++i) {
    masses.push_back(std::exp(a * (ranking.ranked[i].log_p - ranking.ranked[0].log_p)));
  }
  const double total = std::accumulate(masses.begin(), masses.end(), 0.0);
  double sum = 0;
  size_t kept = 0;
  while (kept < masses.size() && sum < top_p * total) sum += masses[kept++];
  masses.resize(kept);
  return ranking.ranked[draw(masses, uniform())].number;
}

/// Of the fewest words that have top_p of the mass. Where the mass ends, and so which word a random number
/// falls on, is known between two bounds, which close in as classes are read: until they agree on the word.
int64_t draw_of_mass(Distribution& d, double a, double top_p, const Uniform& uniform) {
  Ranking ranking(d);
  ranking.rank(1);
  const double unit = ranking.ranked[0].log_p, u = uniform();  // masses in units of the largest word's
  const auto mass = [&](double log_p) { return std::exp(a * (log_p - unit)); };
  std::vector<double> sums;  // of the ranked words' masses
  std::vector<double> class_mass(d.classes.count, -1);
  // The first ranked word at which the sum exceeds, or reaches, a mass.
  const auto exceeds = [&](double m) { return std::upper_bound(sums.begin(), sums.end(), m) - sums.begin(); };
  const auto reaches = [&](double m) { return std::lower_bound(sums.begin(), sums.end(), m) - sums.begin(); };
  while (true) {
    for (size_t i = sums.size(); i < ranking.ranked.size(); ++i) {
      sums.push_back((sums.empty() ? 0 : sums.back()) + mass(ranking.ranked[i].log_p));
    }
    const auto ranked = static_cast<int64_t>(sums.size());
    double low = 0, high = 0;  // of all masses
    for (int64_t c = 0; c < d.classes.count; ++c) {
      if (d.is_read(c)) {
        if (class_mass[c] < 0) class_mass[c] = std::exp(log_sum_exp(times(a, d.words(c))) - a * unit);
        low += class_mass[c];
        high += class_mass[c];
      } else {
        const LogBounds bounds(a, d.classes.size(c));
        low += std::exp(a * (d.log_class[c] - unit) + bounds.low);
        high += std::exp(a * (d.log_class[c] - unit) + bounds.high);
      }
    }
    // The words kept end with the first whose sum reaches top_p of all. Past what is ranked, that sum is at
    // most one word's mass beyond.
    const int64_t first_end = reaches(top_p * low), last_end = reaches(top_p * high);
    const double least = first_end < ranked ? sums[first_end] : top_p * low;
    const double most = last_end < ranked ? sums[last_end] : top_p * high + mass(ranking.log_bound());
    const int64_t word = exceeds(u * least);
    if (word < ranked && word == exceeds(u * most)) return ranking.ranked[word].number;
    if (ranking.is_complete()) return ranking.ranked.back().number;  // rounding
    ranking.read_next_class();
  }
}

/// (...)
Tensor new_sample(const Tensor& h, const Tensor& class_weight, const OptionalTensor& class_bias,
                  const Tensor& word_weight, const OptionalTensor& word_bias, const Tensor& class_words,
                  const Tensor& class_offsets, double temperature, int64_t top_k, double top_p,
                  std::optional<at::Generator> /*generator*/) {
  const char* op = "hierarchical_sample";
  check_all(op, h, class_weight, class_bias, word_weight, word_bias, class_words, class_offsets);
  TORCH_CHECK(temperature >= 0, op, ": temperature must be >= 0, got ", temperature);
  TORCH_CHECK(top_k >= 0, op, ": top_k must be >= 0, got ", top_k);
  TORCH_CHECK(top_p > 0 && top_p <= 1, op, ": top_p must be in (0, 1], got ", top_p);
  return at::empty_symint(h.sym_sizes().slice(0, h.dim() - 1), h.options().dtype(at::kLong));
}

Tensor sample_cpu(const Tensor& h, const Tensor& class_weight, const OptionalTensor& class_bias,
                  const Tensor& word_weight, const OptionalTensor& word_bias, const Tensor& class_words,
                  const Tensor& class_offsets, double temperature, int64_t top_k, double top_p,
                  std::optional<at::Generator> generator_in) {
  const Tensor word = new_sample(h, class_weight, class_bias, word_weight, word_bias, class_words,
                                 class_offsets, temperature, top_k, top_p, generator_in);
  auto* generator =
      at::get_generator_or_default<at::CPUGeneratorImpl>(generator_in, at::detail::getDefaultCPUGenerator());
  const std::scoped_lock lock(generator->mutex_);
  at::uniform_real_distribution<double> distribution(0, 1);
  const Uniform uniform = [&] { return distribution(generator); };
  // Below this no two words that differ in double are both drawn.
  constexpr double kCold = 1e-30;
  const int64_t k = temperature < kCold ? 1 : std::min(top_k, word_weight.size(0));
  const double a = 1 / std::max(temperature, kCold);
  int64_t* to = word.mutable_data_ptr<int64_t>();
  for_each_row("hierarchical_sample", h, class_weight, class_bias, word_weight, word_bias, class_words,
               class_offsets, [&](Distribution& d, int64_t i) {
                 to[i] = k > 0       ? draw_of_likeliest(d, a, k, top_p, uniform)
                         : top_p < 1 ? draw_of_mass(d, a, top_p, uniform)
                                     : draw_of_all(d, a, uniform);
               });
  return word;
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CompositeImplicitAutograd, m) {
  m.impl("hierarchical_cross_entropy", loss_composite);
  m.impl("hierarchical_log_prob", log_prob_composite);
}
TORCH_LIBRARY_IMPL(flashlm, CPU, m) {
  m.impl("hierarchical_top_k", top_k_cpu);
  m.impl("hierarchical_sample", sample_cpu);
  m.impl("_hierarchical_places", places_cpu);
  m.impl("_hierarchical_words_forward", forward_cpu);
  m.impl("_hierarchical_words_forward_backward", forward_backward_cpu);
  m.impl("_hierarchical_words_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(flashlm, Meta, m) {
  m.impl("hierarchical_top_k", new_top_k);
  m.impl("hierarchical_sample", new_sample);
  m.impl("_hierarchical_places", new_places);
  m.impl("_hierarchical_words_forward", new_outputs);
  m.impl("_hierarchical_words_forward_backward", new_outputs_and_gradients);
  m.impl("_hierarchical_words_backward", new_gradients);
}
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("_hierarchical_words_forward", forward_autograd);
  for (const char* op : {"hierarchical_top_k", "hierarchical_sample", "_hierarchical_places",
                         "_hierarchical_words_forward_backward", "_hierarchical_words_backward"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace flashlm
