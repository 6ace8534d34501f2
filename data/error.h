// SPDX-License-Identifier: Apache-2.0
// The one exception for what the user can mend: a missing file, a full disk, a wrong option.
#pragma once

#include <stdexcept>

namespace flashlm {

/// what() is one line without a full stop at its end: what is wrong, where, and what mends it.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace flashlm
