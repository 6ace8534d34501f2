// SPDX-License-Identifier: Apache-2.0
// Where the time of training steps goes.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace flashlm {

/// Times this thread's training steps by part. The parts of the forward pass are the model's own: the scopes
/// that it opens with RECORD_USER_SCOPE. A node of the backward pass counts for the part in whose scope it
/// was made, which its sequence number tells. The trainer names the rest with Timer. Costs a few clock
/// readings for each scope and node. One at a time on a thread.
class Profile {
 public:
  Profile();
  ~Profile();
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;

  /// Adds the time that it lives to `part`; does nothing with a null profile. Not in another Timer or scope.
  class Timer {
   public:
    Timer(Profile* profile, const char* part);
    ~Timer();
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;

   private:
    Profile* profile_;
    const char* part_;
    std::chrono::steady_clock::time_point start_;
  };

  /// A step lasts as long as this lives; does nothing with a null profile. The model's scopes count only in a
  /// step: evaluating and sampling open them too.
  class Step {
   public:
    explicit Step(Profile* profile);
    ~Step();
    Step(const Step&) = delete;
    Step& operator=(const Step&) = delete;

   private:
    Profile* profile_;
    std::chrono::steady_clock::time_point start_;
  };

  /// One line a part: milliseconds a step, forward and backward, and the share of the step;
  /// "other" is what no part accounts for.
  std::string report() const;

 private:
  struct Part {
    std::string name;
    double forward = 0, backward = 0;  // seconds; what is neither counts as forward
  };
  struct Scope {
    std::string part;
    uint64_t first, last;  // the nodes made in it have sequence numbers in [first, last)
  };
  struct Callbacks;

  Part& part(const std::string& name);

  std::vector<Part> parts_;
  std::vector<Scope> scopes_;  // of this step
  double seconds_ = 0;
  int64_t steps_ = 0;
  uint64_t handle_ = 0;
};

}  // namespace flashlm
