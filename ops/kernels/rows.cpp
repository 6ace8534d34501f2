// SPDX-License-Identifier: Apache-2.0
// Rows that are written once and not read again soon. A plain store would first read the line that it is
// about to overwrite, and push something else out of the cache for it.
#include "ops/kernels/families.h"
#include "ops/kernels/vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace flashlm::kernels::FLASHLM_ISA {
namespace {

/// p on a vector's boundary.
template <class T>
inline void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#else
  store(p, v);
#endif
}

template <class T>
void stream_rows(int64_t rows, int64_t width, const T* from, const int64_t* index, T* to) {
  if (width == 0) return;  // then there may be no memory at all
  for (int64_t r = 0; r < rows; ++r, from += width) {
    T* row = to + index[r] * width;
    if (reinterpret_cast<uintptr_t>(row) % kVectorBytes != 0) {
      memcpy(row, from, static_cast<size_t>(width) * sizeof(T));
      continue;
    }
    int64_t i = 0;
    for (; i + kLanes<T> <= width; i += kLanes<T>) stream(row + i, load(from + i));
    store_first(row + i, load_first(from + i, width - i), width - i);
  }
#if defined(__SSE2__)
  _mm_sfence();  // so that whoever is told that the rows are there finds them
#endif
}

void to_bf16(int64_t n, const float* x, uint16_t* y) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i < n; i += kLanes<float>) store_bf16(y + i, load_up_to(x + i, n - i), n - i);
#endif
  for (; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    // A NaN must not round to an infinity.
    const uint32_t rounded = x[i] == x[i] ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
    y[i] = static_cast<uint16_t>(rounded >> 16);
  }
}

void from_bf16(int64_t n, const uint16_t* x, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = uint32_t{x[i]} << 16;
    memcpy(y + i, &bits, sizeof bits);
  }
}

}  // namespace

template <class T>
void add_rows(Table<T>& table) {
  table.stream_rows = stream_rows<T>;
  if constexpr (sizeof(T) == sizeof(float)) {
    table.to_bf16 = to_bf16;
    table.from_bf16 = from_bf16;
  }
}
template void add_rows(Table<float>&);
template void add_rows(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA
