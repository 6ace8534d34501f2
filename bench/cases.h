// SPDX-License-Identifier: Apache-2.0
// What bench_ops measures. To add a case: a line in cases(); a new operator: a function beside the others.
#pragma once

#include <vector>

#include "bench/contest.h"
#include "bench/ggml.h"

namespace flashlm::bench {

/// All cases for `threads` threads, cheap until they are made. Without ggml its contestants are left out.
std::vector<Case> cases(const Ggml* ggml, int threads);

}  // namespace flashlm::bench
