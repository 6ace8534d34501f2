// SPDX-License-Identifier: Apache-2.0
// What the operators' sources share: argument checks in one wording, dtype dispatch onto the kernels, and
// loops over rows whose results do not depend on the number of threads. Not installed; no operator's contract
// lives here.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>
#include <tuple>
#include <vector>

#include "ops/kernels/kernels.h"

namespace flashlm {

// ---- checks: "op: the rule, got the value" ----

inline void check_floating(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(
      t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kDouble, op,
      ": ", name, " must be float32, bfloat16 or float64, got ", t.scalar_type());
}

/// t must have x's dtype: nothing here promotes types silently.
inline void check_same_dtype(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have x's dtype ", x.scalar_type(),
              ", got ", t.scalar_type());
}

inline void check_dim(const char* op, const char* name, const at::Tensor& t, int64_t dim) {
  TORCH_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimension", dim == 1 ? "" : "s", ", got ",
              t.dim());
}

inline void check_size(const char* op, const char* what, const c10::SymInt& got, const c10::SymInt& want) {
  TORCH_SYM_CHECK(got.sym_eq(want), op, ": ", what, " must be ", want, ", got ", got);
}

/// Of an RMSNorm over rows of `width`.
inline void check_norm_scale(const char* op, const char* name, const at::Tensor& scale, const at::Tensor& x,
                             const c10::SymInt& width) {
  check_same_dtype(op, name, scale, x);
  check_dim(op, name, scale, 1);
  check_size(op, c10::str(name, "'s size").c_str(), scale.sym_size(0), width);
}

// ---- CPU adapters ----

/// The dtype that the kernels compute in: float32 for bfloat16, the tensor's own otherwise.
inline at::ScalarType compute_dtype(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// t as the kernels read it: contiguous, in x's compute dtype.
inline at::Tensor kernel_input(const at::Tensor& t, const at::Tensor& x) {
  return t.to(compute_dtype(x)).contiguous();
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// Asks for pages of 2 MiB. A large tensor comes fresh from the system in every call, as a rule, and its
/// pages of 4 KiB take longer to fault in than to write.
inline void prefer_huge_pages([[maybe_unused]] const at::Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kPage = 1 << 21;
  const auto bytes = static_cast<int64_t>(t.nbytes());
  if (bytes < kPage) return;
  const int64_t first = reinterpret_cast<int64_t>(t.mutable_data_ptr()), begin = round_up(first, kPage),
                end = (first + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#endif
}

/// Where a kernel writes `out`, a new tensor that an operator returns: itself, or if its dtype is not the
/// kernels', memory to be converted.
inline at::Tensor kernel_output(const at::Tensor& out) {
  const at::ScalarType dtype = compute_dtype(out);
  const at::Tensor memory =
      out.scalar_type() == dtype ? out : at::empty(out.sizes(), out.options().dtype(dtype));
  prefer_huge_pages(memory);
  return memory;
}

/// Calls body(T{}) with T = float or double, after x's compute dtype.
template <class Body>
void dispatch(const at::Tensor& x, const Body& body) {
  if (compute_dtype(x) == at::kDouble) {
    body(double{});
  } else {
    body(float{});
  }
}

/// Uninitialised memory for a kernel, on a cache line's boundary: packed operands that straddle lines cost a
/// quarter of a product's speed.
template <class T>
struct Scratch {
  explicit Scratch(int64_t n = 0) { resize(n); }

  /// For n elements at least; what was there is lost.
  void resize(int64_t n) {
    if (n <= size) return;
    memory = at::empty({n}, c10::CppTypeToScalarType<T>::value);
    prefer_huge_pages(memory);
    data = memory.mutable_data_ptr<T>();
    size = n;
  }

  at::Tensor memory;
  T* data = nullptr;
  int64_t size = 0;
};

/// Rows that make a task worth a thread: about 16k values each.
inline int64_t row_grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

/// sum[width] = the sum over all rows of what body(begin, end, partial) adds to its zeroed partial[width].
/// Rows are cut into chunks by their number alone and the partials are added in order, so that the result is
/// the same for any number of threads.
template <class T, class Body>
void sum_over_rows(int64_t rows, int64_t width, T* sum, const Body& body) {
  constexpr int64_t kMaxChunks = 32;
  const int64_t chunk = std::max(row_grain(width), (rows + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = (rows + chunk - 1) / chunk;
  std::vector<T> partials(chunks * width, T(0));
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      body(c * chunk, std::min(rows, (c + 1) * chunk), partials.data() + c * width);
    }
  });
  std::fill(sum, sum + width, T(0));
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t i = 0; i < width; ++i) sum[i] += partials[c * width + i];
  }
}

/// What an autograd Function saved of an optional tensor.
inline std::optional<at::Tensor> if_defined(const at::Tensor& t) {
  return t.defined() ? std::optional(t) : std::nullopt;
}

/// The gradient an autograd Function returns for an argument that has none.
inline at::Tensor no_grad() { return at::Tensor(); }

}  // namespace flashlm
