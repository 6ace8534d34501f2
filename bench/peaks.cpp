// SPDX-License-Identifier: Apache-2.0
#include "bench/peaks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <thread>

#include "ops/kernels/kernels.h"

namespace flashlm::bench {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Seconds that `threads` threads need for body(thread), all starting together.
double time_threads(int threads, const std::function<void(int)>& body) {
  if (threads == 1) {
    const auto start = Clock::now();
    body(0);
    return seconds_since(start);
  }
  std::atomic<int> ready{0};
  std::vector<double> begins(threads), ends(threads);
  const auto origin = Clock::now();
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i) {
    pool.emplace_back([&, i] {
      ++ready;
      while (ready < threads) std::this_thread::yield();
      begins[i] = seconds_since(origin);
      body(i);
      ends[i] = seconds_since(origin);
    });
  }
  for (std::thread& thread : pool) thread.join();
  return *std::max_element(ends.begin(), ends.end()) - *std::min_element(begins.begin(), begins.end());
}

/// The highest rate seen, in units of work per second, where body(thread, n) does n * threads of them.
/// n doubles until a sample takes a millisecond: long beside a clock reading, short beside a time slice, so
/// that some sample is left alone by other programs.
double best_rate(int threads, double seconds, const std::function<void(int, int64_t)>& body) {
  int64_t n = 1;
  const auto best_sample = [&](double duration) {
    double best = std::numeric_limits<double>::infinity();
    const auto start = Clock::now();
    for (int i = 0; i < 3 || seconds_since(start) < duration; ++i) {
      best = std::min(best, time_threads(threads, [&](int thread) { body(thread, n); }));
    }
    return best;
  };
  while (best_sample(0) < 1e-3) n *= 2;
  return static_cast<double>(n) * threads / best_sample(seconds);
}

// ---- instructions ----

struct Instruction {
  const char* kind;
  const char* name;
  const char* level;
  double macs;  // of one instruction, or of one group that stands for it
  void (*run)(int64_t n);
};

/// Instructions of an unrolled loop body: twelve independent accumulators hide a latency of four cycles at
/// three issues a cycle, more than any CPU has.
constexpr int kUnroll = 12;

#if defined(__x86_64__)

// Registers 12 and 13 hold the factors, all zero: no subnormal slows the loop down, and nothing is ever
// stored there. 14 is scratch. Assembly, because a compiler may fold such a loop, and because the assembler
// takes instructions that the target of this source lacks.
#define FLASHLM_TWELVE(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11)
#define FLASHLM_CLOBBERS                                                                                     \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
      "xmm13", "xmm14"
#define FLASHLM_INSTRUCTION_LOOP(name, zero, op, finish)                           \
  void name(int64_t n) {                                                           \
    asm volatile(FLASHLM_TWELVE(zero) zero(12) zero(13)                            \
                     zero(14) "1:\n" FLASHLM_TWELVE(op) "dec %0\n jnz 1b\n" finish \
                 : "+r"(n)                                                         \
                 :                                                                 \
                 : FLASHLM_CLOBBERS, "cc");                                        \
  }

#define FLASHLM_ZERO_SSE(i) "pxor %%xmm" #i ", %%xmm" #i "\n"
#define FLASHLM_ZERO_AVX(i) "vpxor %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n"  // clears the upper parts too
#define FLASHLM_MULPS_ADDPS(i) \
  "movaps %%xmm13, %%xmm14\n mulps %%xmm12, %%xmm14\n addps %%xmm14, %%xmm" #i "\n"
#define FLASHLM_PMADDUBSW_PADDW(i) \
  "movdqa %%xmm13, %%xmm14\n pmaddubsw %%xmm12, %%xmm14\n paddw %%xmm14, %%xmm" #i "\n"
#define FLASHLM_FMA_YMM(i) "vfmadd231ps %%ymm12, %%ymm13, %%ymm" #i "\n"
#define FLASHLM_MADDUBS_ADDW_YMM(i) \
  "vpmaddubsw %%ymm12, %%ymm13, %%ymm14\n vpaddw %%ymm14, %%ymm" #i ", %%ymm" #i "\n"
#define FLASHLM_DPBUSD_YMM(i) "%{vex%} vpdpbusd %%ymm12, %%ymm13, %%ymm" #i "\n"
#define FLASHLM_FMA_ZMM(i) "vfmadd231ps %%zmm12, %%zmm13, %%zmm" #i "\n"
#define FLASHLM_DPBUSD_ZMM(i) "vpdpbusd %%zmm12, %%zmm13, %%zmm" #i "\n"
#define FLASHLM_DPBF16_ZMM(i) "vdpbf16ps %%zmm12, %%zmm13, %%zmm" #i "\n"

FLASHLM_INSTRUCTION_LOOP(mulps_addps, FLASHLM_ZERO_SSE, FLASHLM_MULPS_ADDPS, "")
FLASHLM_INSTRUCTION_LOOP(pmaddubsw_paddw, FLASHLM_ZERO_SSE, FLASHLM_PMADDUBSW_PADDW, "")
FLASHLM_INSTRUCTION_LOOP(fma_ymm, FLASHLM_ZERO_AVX, FLASHLM_FMA_YMM, "vzeroupper\n")
FLASHLM_INSTRUCTION_LOOP(maddubs_addw_ymm, FLASHLM_ZERO_AVX, FLASHLM_MADDUBS_ADDW_YMM, "vzeroupper\n")
FLASHLM_INSTRUCTION_LOOP(dpbusd_ymm, FLASHLM_ZERO_AVX, FLASHLM_DPBUSD_YMM, "vzeroupper\n")
FLASHLM_INSTRUCTION_LOOP(fma_zmm, FLASHLM_ZERO_AVX, FLASHLM_FMA_ZMM, "vzeroupper\n")
FLASHLM_INSTRUCTION_LOOP(dpbusd_zmm, FLASHLM_ZERO_AVX, FLASHLM_DPBUSD_ZMM, "vzeroupper\n")
FLASHLM_INSTRUCTION_LOOP(dpbf16_zmm, FLASHLM_ZERO_AVX, FLASHLM_DPBF16_ZMM, "vzeroupper\n")

// Six tiles of sums, twice each in a loop of twelve, and two of factors: a sum returns after four others,
// longer than the latency of 52 cycles at 16 cycles each.
#define FLASHLM_TILE_LOOP(name, instruction)                                                        \
  void name(int64_t n) {                                                                            \
    struct alignas(64) {                                                                            \
      uint8_t palette = 1, start_row = 0, reserved[14] = {};                                        \
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};                                    \
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};                                          \
    } config;                                                                                       \
    asm volatile("ldtilecfg %1\n tilezero %%tmm6\n tilezero %%tmm7\n 1:\n" FLASHLM_SIX(instruction) \
                     FLASHLM_SIX(instruction) "dec %0\n jnz 1b\n tilerelease\n"                     \
                 : "+r"(n)                                                                          \
                 : "m"(config)                                                                      \
                 : "cc");                                                                           \
  }
#define FLASHLM_SIX(op) op(0) op(1) op(2) op(3) op(4) op(5)
#define FLASHLM_TILE_DPBUSD(i) "tdpbusd %%tmm7, %%tmm6, %%tmm" #i "\n"
#define FLASHLM_TILE_DPBF16(i) "tdpbf16ps %%tmm7, %%tmm6, %%tmm" #i "\n"
FLASHLM_TILE_LOOP(dpbusd_tmm, FLASHLM_TILE_DPBUSD)
FLASHLM_TILE_LOOP(dpbf16_tmm, FLASHLM_TILE_DPBF16)

/// Lowest level first. To add one: its op above and its line here.
const std::vector<Instruction> kInstructions = {
    {"float32", "mulps + addps xmm", "baseline", 4, mulps_addps},
    {"int8", "pmaddubsw + paddw xmm", "baseline", 16, pmaddubsw_paddw},
    {"float32", "vfmadd231ps ymm", "avx2", 8, fma_ymm},
    {"int8", "vpmaddubsw + vpaddw ymm", "avx2", 32, maddubs_addw_ymm},
    {"int8", "vpdpbusd ymm", "avxvnni", 32, dpbusd_ymm},
    {"float32", "vfmadd231ps zmm", "avx512", 16, fma_zmm},
    {"int8", "vpdpbusd zmm", "avx512", 64, dpbusd_zmm},
    {"bfloat16", "vdpbf16ps zmm", "avx512bf16", 32, dpbf16_zmm},
    {"int8 tiles", "tdpbusd tmm", "amx", 16 * 16 * 64, dpbusd_tmm},
    {"bfloat16 tiles", "tdpbf16ps tmm", "amx", 16 * 16 * 32, dpbf16_tmm},
};

#else

const std::vector<Instruction> kInstructions = {};

#endif

/// Where `name` stands among the kernel levels, -1 if there is no such level.
int64_t rank(const std::string& name) {
  const kernels::Levels levels = kernels::levels();
  for (int64_t i = 0; i < levels.count; ++i) {
    if (levels.first[i].name == name) return i;
  }
  return -1;
}

bool supported(const Instruction& instruction) {
  const int64_t at = rank(instruction.level);
  return at >= 0 && kernels::levels().first[at].supported();
}

// ---- memory ----

constexpr int64_t kLine = 64;

/// Bytes that one iteration of the readers below takes.
constexpr int64_t kReadStep = 8 * kLine;

using Reader = void (*)(const char* p, int64_t bytes);

#if defined(__x86_64__)

// Loads into registers that nothing depends on: nothing but the memory can be the bottleneck.
#define FLASHLM_LOAD_SSE(i) "movaps " #i "*16(%0), %%xmm0\n"
#define FLASHLM_LOAD_YMM(i) "vmovaps " #i "*32(%0), %%ymm0\n"
#define FLASHLM_LOAD_ZMM(i) "vmovaps " #i "*64(%0), %%zmm0\n"
#define FLASHLM_EIGHT(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7)
#define FLASHLM_READER(name, loads, step, finish)                                \
  void name(const char* p, int64_t bytes) {                                      \
    const char* end = p + bytes;                                                 \
    asm volatile("1:\n" loads "add $" #step ", %0\n cmp %1, %0\n jb 1b\n" finish \
                 : "+r"(p)                                                       \
                 : "r"(end)                                                      \
                 : "xmm0", "cc", "memory");                                      \
  }
FLASHLM_READER(read_sse, FLASHLM_EIGHT(FLASHLM_LOAD_SSE), 128, "")
FLASHLM_READER(read_ymm, FLASHLM_EIGHT(FLASHLM_LOAD_YMM), 256, "vzeroupper\n")
FLASHLM_READER(read_zmm, FLASHLM_EIGHT(FLASHLM_LOAD_ZMM), 512, "vzeroupper\n")

Reader widest_reader() {
  if (kernels::levels().first[rank("avx512")].supported()) return read_zmm;
  if (kernels::levels().first[rank("avx2")].supported()) return read_ymm;
  return read_sse;
}

#else

void read_words(const char* p, int64_t bytes) {
  uint64_t sum[8] = {};
  for (int64_t i = 0; i < bytes; i += kLine) {
    uint64_t words[8];
    std::memcpy(words, p + i, sizeof words);
    for (int j = 0; j < 8; ++j) sum[j] |= words[j];
  }
  for (const uint64_t word : sum) asm volatile("" ::"r"(word));
}

Reader widest_reader() { return read_words; }

#endif

/// Bytes of processor 0's data cache of a level, as Linux tells them; `otherwise` where nothing does. Not
/// sysconf: it knows nothing on ARM, and takes the caches of all of a server's chiplets for one.
double cache_bytes(int level, double otherwise) {
  for (int i = 0; i < 8; ++i) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    int found = 0;
    std::string type;
    double kib = 0;
    std::ifstream(folder + "level") >> found;
    std::ifstream(folder + "type") >> type;
    std::ifstream(folder + "size") >> kib;  // "32K": the number is read up to the letter
    if (found == level && type != "Instruction" && kib > 0) return kib * 1024;
  }
  return otherwise;
}

Peak measure_read(const char* name, int threads, double seconds, double total_bytes, double limit) {
  const int64_t bytes =
      std::max<int64_t>(kReadStep, static_cast<int64_t>(total_bytes / threads) / kReadStep * kReadStep);
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<char, Free>> buffers;
  for (int i = 0; i < threads; ++i) {
    buffers.emplace_back(static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
    std::memset(buffers.back().get(), 1, bytes);  // pages of zeros would all be one page
  }
  const Reader reader = widest_reader();
  const double passes = best_rate(threads, seconds, [&](int thread, int64_t n) {
    for (int64_t i = 0; i < n; ++i) reader(buffers[thread].get(), bytes);
  });
  return {"read", name, "", "GB/s", passes * static_cast<double>(bytes) * 1e-9, limit};
}

}  // namespace

std::vector<Peak> measure_peaks(int threads, double seconds) {
  constexpr int kReads = 4;
  const double each = seconds / static_cast<double>(kInstructions.size() + kReads);
  std::vector<Peak> peaks;
  for (const Instruction& i : kInstructions) {
    if (!supported(i)) continue;
    const double loops = best_rate(threads, each, [&](int, int64_t n) { i.run(n); });
    peaks.push_back({i.kind, i.name, i.level, "GMAC/s", loops * kUnroll * i.macs * 1e-9, 0});
  }
  constexpr double kKiB = 1024;
  const double l1 = cache_bytes(1, 32 * kKiB), l2 = cache_bytes(2, 512 * kKiB),
               l3 = cache_bytes(3, 8192 * kKiB);
  // L1 and L2 belong to a core, L3 to all. Half of a cache is surely in it; four times L3, and a
  // quarter of a GiB, surely are not.
  peaks.push_back(measure_read("L1", threads, each, l1 / 2 * threads, l1 * threads));
  peaks.push_back(measure_read("L2", threads, each, l2 / 2 * threads, l2 * threads));
  if (l3 > 2 * l2 * threads) peaks.push_back(measure_read("L3", threads, each, l3 / 2, l3));
  peaks.push_back(measure_read("DRAM", threads, each, std::max(4 * l3, 262144 * kKiB), 1e300));
  return peaks;
}

const Peak* compute_peak(const std::vector<Peak>& peaks, const std::string& kind, const std::string& level) {
  const Peak* best = nullptr;
  for (const Peak& peak : peaks) {
    if (peak.kind == kind && rank(peak.level) <= rank(level)) best = &peak;
  }
  if (best != nullptr) return best;
  if (kind == "int8 tiles") return compute_peak(peaks, "int8", level);
  if (kind == "bfloat16 tiles") return compute_peak(peaks, "bfloat16", level);
  if (kind == "bfloat16") return compute_peak(peaks, "float32", level);
  return nullptr;
}

const Peak* read_peak(const std::vector<Peak>& peaks, double bytes) {
  for (const Peak& peak : peaks) {
    if (peak.kind == "read" && bytes <= peak.bytes) return &peak;
  }
  return nullptr;
}

}  // namespace flashlm::bench
