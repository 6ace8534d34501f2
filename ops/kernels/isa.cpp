// SPDX-License-Identifier: Apache-2.0
// Which level of kernels to run: the highest that the CPU has, unless FLASHLM_ISA says otherwise.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "ops/kernels/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace flashlm::kernels {

#define FLASHLM_DECLARE_LEVEL(level)   \
  namespace level {                    \
  const Table<float>& float_table();   \
  const Table<double>& double_table(); \
  }
FLASHLM_DECLARE_LEVEL(baseline)
#if defined(__x86_64__)
FLASHLM_DECLARE_LEVEL(avx2)
FLASHLM_DECLARE_LEVEL(avxvnni)
FLASHLM_DECLARE_LEVEL(avx512)
FLASHLM_DECLARE_LEVEL(avx512bf16)
FLASHLM_DECLARE_LEVEL(amx)
#elif defined(__aarch64__)
FLASHLM_DECLARE_LEVEL(neon)
#endif
#undef FLASHLM_DECLARE_LEVEL

namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// GCC 12's __builtin_cpu_supports does not know this one: CPUID leaf 7, subleaf 1, EAX bit 4.
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Tiles of bytes and of bfloat16: CPUID leaf 7, EDX bits 24, 25 and 22. Linux, from 5.16 on, wants a process
// to ask before it uses them.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kTileBits = 1u << 22 | 1u << 24 | 1u << 25;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTileBits) == kTileBits &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
// The dot product; every CPU that has it has the rest of ARMv8.2.
bool has_neon() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

#define FLASHLM_LEVEL(level, supported) \
  { #level, supported, level::float_table, level::double_table }
const Level kLevels[] = {
    FLASHLM_LEVEL(baseline, [] { return true; }),
#if defined(__x86_64__)
    FLASHLM_LEVEL(avx2, has_avx2),
    FLASHLM_LEVEL(avxvnni, has_avxvnni),
    FLASHLM_LEVEL(avx512, has_avx512),
    FLASHLM_LEVEL(avx512bf16, has_avx512bf16),
    FLASHLM_LEVEL(amx, has_amx),
#elif defined(__aarch64__)
    FLASHLM_LEVEL(neon, has_neon),
#endif
};
#undef FLASHLM_LEVEL

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
