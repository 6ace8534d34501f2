// SPDX-License-Identifier: Apache-2.0
// Which optimizer trains which parameter: a model's named parameters in four groups, as FlashLM v3 does.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "train/named_state.h"

namespace flashlm {

struct OptimizerConfig {
  std::string matrix_optimizer = "normuon";  // or "adamw": what trains the 2-D ternary matrices
  double normuon_lr = 0.02;
  double normuon_beta1 = 0.95;
  double normuon_beta2 = 0.999;
  double normuon_weight_decay = 0;
  std::string newton_schulz = "auto";  // "float32", "bfloat16", or the latter where the CPU has it
  double adamw_lr = 3e-4;
  double adamw_beta1 = 0.9;
  double adamw_beta2 = 0.95;
  double adamw_eps = 1e-8;
  double weight_decay = 0.1;    // of AdamW, for everything but vectors
  double embedding_lr = 0;      // of the tables; 0: adamw_lr
  bool lazy_embedding = false;  // of the tables: FusedAdamWOptions::lazy
};

/// Scales the gradients of `parameters`, those that have one, so that their norm together is max_norm at
/// most, and returns what it was: torch's clip_grad_norm_, but summed row by row, on all threads and more
/// exactly (one sum over a large table in float32 is off by 5e-4), and gradients that stay as they are are
/// only read. A norm that is NaN makes all gradients NaN.
double clip_gradients(const std::vector<at::Tensor>& parameters, double max_norm);

/// group     parameters                                            trained by
/// matrices  2-D, except tables                                    NorMuon, or AdamW with decay
/// tables    2-D, with "embedding" or "head" in their names,       AdamW with decay, at embedding_lr
///           a ternary head too
/// kernels   3-D and more: convolutions                            AdamW with decay
/// vectors   the rest: scales, biases, lower bounds                AdamW without decay
///
/// A tensor with several names (tied weights) counts once, under the first.
class Optimizers {
 public:
  struct Group {
    std::string name;
    std::string optimizer;  // "NorMuon" or "AdamW"
    double lr = 0;          // before the schedule's scale
    double weight_decay = 0;
    NamedParameters parameters;

    int64_t elements() const;
  };

  /// flashlm::Error if matrix_optimizer or newton_schulz is none of its values.
  Optimizers(const NamedParameters& parameters, const OptimizerConfig& config);

  /// Every group's learning rate becomes its own lr times scale: the schedule's multiplier.
  void set_lr_scale(double scale);

  /// One update of each parameter that has a gradient.
  void step();

  /// Gives the parameters what step() has put off: for the last weights of a run.
  void catch_up();

  /// Gradients become undefined, not zero: a frozen parameter then stays out of step().
  void zero_grad();

  /// All that a checkpoint needs to go on bit for bit, given the weights: "optimizer.<parameter>.<what>".
  /// Live tensors, not copies: write them before the next step.
  TensorMap state() const;

  /// The inverse. Takes the names that begin with "optimizer." and copies; flashlm::Error if one of them
  /// belongs to no parameter or does not fit.
  void load_state(const TensorMap& saved);

  /// The groups that have parameters.
  const std::vector<Group>& groups() const { return groups_; }

  /// One line a group: name, optimizer, learning rate, decay, numbers of parameters and tensors.
  std::string summary() const;

 private:
  std::vector<Group> groups_;
  std::vector<std::unique_ptr<NamedStateOptimizer>> optimizers_;  // one for each group
};

}  // namespace flashlm
