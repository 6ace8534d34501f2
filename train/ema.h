// SPDX-License-Identifier: Apache-2.0
// An exponential moving average of a model's weights, to evaluate and to ship in their place.
#pragma once

#include "train/named_state.h"

namespace flashlm {

/// average <- decay * average + (1 - decay) * parameter, once for each update(); it starts at the parameters
/// as they are, without bias correction. Tied tensors are averaged once.
///
/// An average of latent weights that are made ternary later is not an average of ternary weights: it may be
/// worse than the last weights, so compare both.
class Ema {
 public:
  explicit Ema(const NamedParameters& parameters, double decay = 0.999);

  /// Call after each optimizer step.
  void update();

  /// While it lives, the model's parameters hold the averages, and the averages the parameters: no update()
  /// then.
  class Swap {
   public:
    explicit Swap(Ema& ema) : ema_(ema) { ema_.exchange(); }
    ~Swap() { ema_.exchange(); }
    Swap(const Swap&) = delete;
    Swap& operator=(const Swap&) = delete;

   private:
    Ema& ema_;
  };

  /// "ema.<parameter>": live tensors, not copies.
  TensorMap state() const;

  /// The inverse; copies. flashlm::Error if a parameter's average is missing or does not fit.
  void load_state(const TensorMap& saved);

 private:
  void exchange();

  double decay_;
  std::vector<std::string> names_;
  std::vector<at::Tensor> parameters_;
  std::vector<at::Tensor> averages_;
};

}  // namespace flashlm
