// SPDX-License-Identifier: Apache-2.0
// Which level of kernels to run: the highest that the CPU has, unless FLASHLM_ISA says otherwise.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "ops/kernels/kernels.h"

namespace flashlm::kernels {

#define FLASHLM_DECLARE_LEVEL(level)   \
  namespace level {                    \
  const Table<float>& float_table();   \
  const Table<double>& double_table(); \
  }
FLASHLM_DECLARE_LEVEL(baseline)
#if defined(__x86_64__)
FLASHLM_DECLARE_LEVEL(avx2)
FLASHLM_DECLARE_LEVEL(avx512)
#endif
#undef FLASHLM_DECLARE_LEVEL

namespace {

const Level kLevels[] = {
    {"baseline", [] { return true; }, baseline::float_table, baseline::double_table},
#if defined(__x86_64__)
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     avx2::float_table, avx2::double_table},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     avx512::float_table, avx512::double_table},
#endif
};

const Level& choose_level() {
  const char* wanted = std::getenv("FLASHLM_ISA");
  const Level* best = nullptr;
  std::string runnable;
  for (const Level& level : kLevels) {
    if (!level.supported()) continue;
    if (wanted == nullptr || std::string(wanted) == level.name) best = &level;
    runnable += (runnable.empty() ? "" : ", ") + std::string(level.name);
  }
  if (best == nullptr) {
    throw std::runtime_error("FLASHLM_ISA must be a level that this CPU runs (" + runnable + "), got '" +
                             wanted + "'; unset it to use the best");
  }
  return *best;
}

const Level& level() {
  static const Level& chosen = choose_level();
  return chosen;
}

}  // namespace

template <>
const Table<float>& table() {
  static const Table<float>& chosen = level().float_table();
  return chosen;
}

template <>
const Table<double>& table() {
  static const Table<double>& chosen = level().double_table();
  return chosen;
}

Levels levels() { return {kLevels, static_cast<int64_t>(sizeof kLevels / sizeof kLevels[0])}; }

const char* isa() { return level().name; }

}  // namespace flashlm::kernels
