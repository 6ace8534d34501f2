// SPDX-License-Identifier: Apache-2.0
// Composites: every level is a linear_cross_entropy over all positions, of which those without a target in it
// are ignored and so cost nothing there but a projection. No shape depends on the targets' values.
#include "ops/adaptive_cross_entropy.h"

#include <string>

#include "ops/common.h"
#include "ops/linear_cross_entropy.h"

namespace flashlm {

TORCH_LIBRARY_FRAGMENT(flashlm, m) {
  m.def(
      "adaptive_cross_entropy(Tensor h, Tensor head_weight, Tensor? head_bias, Tensor[] tail_projections, "
      "Tensor[] tail_weights, Tensor target, *, float label_smoothing=0., float z_loss=0., "
      "int ignore_index=-100, str reduction=\"mean\", str precision=\"float32\") -> (Tensor loss, Tensor "
      "nll)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "adaptive_log_prob(Tensor h, Tensor head_weight, Tensor? head_bias, Tensor[] tail_projections, "
      "Tensor[] tail_weights) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("_adaptive_targets(Tensor target, SymInt[] first, int ignore_index) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

std::tuple<at::Tensor, at::Tensor> adaptive_cross_entropy(
    const at::Tensor& h, const at::Tensor& head_weight, const std::optional<at::Tensor>& head_bias,
    at::TensorList tail_projections, at::TensorList tail_weights, const at::Tensor& target,
    double label_smoothing, double z_loss, int64_t ignore_index, c10::string_view reduction,
    c10::string_view precision) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::adaptive_cross_entropy", "")
                             .typed<decltype(adaptive_cross_entropy)>();
  return op.call(h, head_weight, head_bias, tail_projections, tail_weights, target, label_smoothing, z_loss,
                 ignore_index, reduction, precision);
}

at::Tensor adaptive_log_prob(const at::Tensor& h, const at::Tensor& head_weight,
                             const std::optional<at::Tensor>& head_bias, at::TensorList tail_projections,
                             at::TensorList tail_weights) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::adaptive_log_prob", "")
                             .typed<decltype(adaptive_log_prob)>();
  return op.call(h, head_weight, head_bias, tail_projections, tail_weights);
}

namespace {

using Tensor = at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;
using TwoTensors = std::tuple<Tensor, Tensor>;

// ---- checks ----

void check_dtype_of_h(const char* op, const std::string& name, const Tensor& t, const Tensor& h) {
  TORCH_CHECK(t.scalar_type() == h.scalar_type(), op, ": ", name, " must have h's dtype ", h.scalar_type(),
              ", got ", t.scalar_type());
}

void check_matrix(const char* op, const std::string& name, const Tensor& t, const Tensor& h,
                  const c10::SymInt& columns) {
  check_dtype_of_h(op, name, t, h);
  check_dim(op, name.c_str(), t, 2);
  check_size(op, (name + "'s last dimension").c_str(), t.sym_size(1), columns);
}

void check_all(const char* op, const Tensor& h, const Tensor& head_weight, const OptionalTensor& head_bias,
               at::TensorList tail_projections, at::TensorList tail_weights) {
  check_floating(op, "h", h);
  TORCH_CHECK(h.dim() >= 1, op, ": h must have at least 1 dimension, got 0");
  const size_t tails = tail_weights.size();
  TORCH_CHECK(tails > 0, op, ": tail_weights must have at least 1 tensor, got 0");
  TORCH_CHECK(tail_projections.size() == tails, op, ": tail_projections must be as many as tail_weights, ",
              tails, ", got ", tail_projections.size());
  check_matrix(op, "head_weight", head_weight, h, h.sym_size(-1));
  TORCH_SYM_CHECK(head_weight.sym_size(0).sym_gt(static_cast<int64_t>(tails)), op,
                  ": head_weight must have more rows than there are tails, ", tails, ", got ",
                  head_weight.sym_size(0));
  if (head_bias) {
    check_dtype_of_h(op, "head_bias", *head_bias, h);
    check_dim(op, "head_bias", *head_bias, 1);
    check_size(op, "head_bias's size", head_bias->sym_size(0), head_weight.sym_size(0));
  }
  for (size_t i = 0; i < tails; ++i) {
    const std::string weight = c10::str("tail_weights[", i, "]");
    check_matrix(op, c10::str("tail_projections[", i, "]"), tail_projections[i], h, h.sym_size(-1));
    check_matrix(op, weight, tail_weights[i], h, tail_projections[i].sym_size(0));
    TORCH_SYM_CHECK(tail_weights[i].sym_size(0).sym_gt(0), op, ": ", weight,
                    " must have at least 1 row, got 0");
  }
}

// ---- targets of each level ----

/// (n + 1, ...): the word's number in the head, and in each of the n tails; -1 where it is in another tail,
/// or ignored: any other ignore_index may be a number. Tail i has the words from first[i] to first[i + 1].
Tensor targets(const Tensor& target, c10::SymIntArrayRef first, int64_t ignore_index) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashlm::_adaptive_targets", "")
                             .typed<decltype(targets)>();
  return op.call(target, first, ignore_index);
}

Tensor new_targets(const Tensor& target, c10::SymIntArrayRef first, int64_t /*ignore_index*/) {
  TORCH_CHECK(target.scalar_type() == at::kLong, "adaptive_cross_entropy: target must be int64, got ",
              target.scalar_type());
  auto shape = target.sym_sizes().vec();
  shape.insert(shape.begin(), static_cast<int64_t>(first.size()));
  return at::empty_symint(shape, target.options());
}

Tensor targets_cpu(const Tensor& target, at::IntArrayRef first, int64_t ignore_index) {
  const Tensor out = new_targets(target, c10::fromIntArrayRefSlow(first), ignore_index).fill_(-1);
  const Tensor words = target.contiguous();
  const int64_t* word = words.const_data_ptr<int64_t>();
  int64_t* level = out.mutable_data_ptr<int64_t>();
  const int64_t n = words.numel(), shortlist = first.front();
  for (int64_t i = 0; i < n; ++i) {
    if (word[i] == ignore_index) continue;
    TORCH_CHECK(word[i] >= 0 && word[i] < first.back(),
                "adaptive_cross_entropy: target must be in [0, V) = [0, ", first.back(), ") or ignore_index ",
                ignore_index, ", got ", word[i], " at position ", i);
    if (word[i] < shortlist) {
      level[i] = word[i];
      continue;
    }
    const int64_t tail = std::upper_bound(first.begin(), first.end(), word[i]) - first.begin() - 1;
    level[i] = shortlist + tail;
    level[(tail + 1) * n + i] = word[i] - first[tail];
  }
  return out;
}

// ---- composites ----

TwoTensors loss_composite(const Tensor& h, const Tensor& head_weight, const OptionalTensor& head_bias,
                          at::TensorList tail_projections, at::TensorList tail_weights, const Tensor& target,
                          double label_smoothing, double z_loss, int64_t ignore_index,
                          c10::string_view reduction, c10::string_view precision) {
  const char* op = "adaptive_cross_entropy";
  check_all(op, h, head_weight, head_bias, tail_projections, tail_weights);
  TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none", op,
              ": reduction must be mean, sum or none, got '", reduction, "'");
  TORCH_CHECK(precision == "float32" || precision == "bfloat16", op,
              ": precision must be float32 or bfloat16, got '", precision, "'");
  std::vector<c10::SymInt> first = {head_weight.sym_size(0) - static_cast<int64_t>(tail_weights.size())};
  for (const Tensor& weight : tail_weights) first.push_back(first.back() + weight.sym_size(0));
  const Tensor levels = targets(target, first, ignore_index);
  const auto level = [&](const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t index) {
    return linear_cross_entropy(x, weight, bias, levels.select(0, index), label_smoothing, z_loss,
                                /*ignore_index=*/-1, reduction == "none" ? "none" : "sum", precision);
  };
  auto [loss, nll] = level(h, head_weight, head_bias, 0);
  const auto dtype = compute_dtype(h);
  for (size_t i = 0; i < tail_weights.size(); ++i) {
    // In float32 if h is bfloat16, as all else is: a projection is not rounded on its way.
    const Tensor projected = at::linear(h.to(dtype), tail_projections[i].to(dtype));
    const auto [tail_loss, tail_nll] =
        level(projected, tail_weights[i].to(dtype), std::nullopt, static_cast<int64_t>(i) + 1);
    loss = loss + tail_loss;
    nll = nll + tail_nll;
  }
  if (reduction != "mean") return {loss, nll};
  const Tensor count = target.ne(ignore_index).sum();
  return {loss / count, nll / count};
}

Tensor log_prob_composite(const Tensor& h_in, const Tensor& head_weight, const OptionalTensor& head_bias,
                          at::TensorList tail_projections, at::TensorList tail_weights) {
  check_all("adaptive_log_prob", h_in, head_weight, head_bias, tail_projections, tail_weights);
  const auto dtype = compute_dtype(h_in);
  const Tensor h = h_in.to(dtype);
  const Tensor head =
      at::linear(h, head_weight.to(dtype), head_bias ? OptionalTensor(head_bias->to(dtype)) : head_bias)
          .log_softmax(-1);
  const auto tails = static_cast<int64_t>(tail_weights.size());
  const c10::SymInt shortlist = head_weight.sym_size(0) - tails;
  std::vector<Tensor> parts = {head.slice_symint(-1, 0, shortlist)};
  for (int64_t i = 0; i < tails; ++i) {
    const Tensor z = at::linear(at::linear(h, tail_projections[i].to(dtype)), tail_weights[i].to(dtype));
    parts.push_back(z.log_softmax(-1) + head.slice_symint(-1, shortlist + i, shortlist + i + 1));
  }
  return at::cat(parts, -1);
}

}  // namespace

TORCH_LIBRARY_IMPL(flashlm, CompositeImplicitAutograd, m) {
  m.impl("adaptive_cross_entropy", loss_composite);
  m.impl("adaptive_log_prob", log_prob_composite);
}
TORCH_LIBRARY_IMPL(flashlm, CPU, m) { m.impl("_adaptive_targets", targets_cpu); }
TORCH_LIBRARY_IMPL(flashlm, Meta, m) { m.impl("_adaptive_targets", new_targets); }
TORCH_LIBRARY_IMPL(flashlm, Autograd, m) {
  m.impl("_adaptive_targets", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace flashlm
