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

}  // namespace

template <class T>
void add_rows(Table<T>& table) {
  table.stream_rows = stream_rows<T>;
}
template void add_rows(Table<float>&);
template void add_rows(Table<double>&);

}  // namespace flashlm::kernels::FLASHLM_ISA
