// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most: the multiply-add instructions that kernels are made of, and reads from
// each level of memory. Standard C++ and inline assembly, no Torch; elsewhere than on x86-64 nothing but
// memory is measured.
#pragma once

#include <string>
#include <vector>

namespace flashlm::bench {

/// One ceiling, for `threads` threads together.
struct Peak {
  std::string kind;   // "float32", "bfloat16", "int8" (factors), AMX's with " tiles"; or "read"
  std::string name;   // the instruction, or the level of memory
  std::string level;  // the lowest kernel level that has the instruction; empty for "read"
  std::string unit;   // "GMAC/s" or "GB/s"
  double value;
  double bytes;  // "read": of a working set that is still served at this rate; 0 otherwise
};

/// All that this CPU can run, lowest kernel level and nearest memory first. About `seconds` in all; 0 is
/// enough to see that it works, not to trust the numbers.
std::vector<Peak> measure_peaks(int threads, double seconds);

/// The ceiling of a kernel level for a kind of product: its own instruction or that of the nearest lower
/// level; where there is none, tiles become vectors, and bfloat16 float32. Null if nothing was measured.
const Peak* compute_peak(const std::vector<Peak>& peaks, const std::string& kind, const std::string& level);

/// The memory that serves a working set of so many bytes. Null if nothing was measured.
const Peak* read_peak(const std::vector<Peak>& peaks, double bytes);

}  // namespace flashlm::bench
