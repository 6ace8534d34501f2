// SPDX-License-Identifier: Apache-2.0
// dot4 as one level has it, for test_dot4.cpp. Compiled for that level, and so without the standard library.
#include "ops/kernels/dot4.h"

namespace flashlm::kernels::FLASHLM_ISA {

/// sum = dot4(sum, w, a) over n lanes, a multiple of kLanes.
void dot4_lanes(int64_t n, int32_t* sum, const int32_t* w, const int32_t* a) {
  for (int64_t i = 0; i < n; i += kLanes<int32_t>)
    store(sum + i, dot4(load(sum + i), load(w + i), load(a + i)));
}

}  // namespace flashlm::kernels::FLASHLM_ISA
