// SPDX-License-Identifier: Apache-2.0
#include "ops/ternary_weights.h"

#include <cmath>
#include <limits>
#include <map>

namespace flashlm {
namespace {

using kernels::Quantizer;

/// body(first, last) for whole panels of a packed matrix of `width` columns, in parallel.
template <class Body>
void for_panels(int64_t width, int64_t panel, int64_t depth, const Body& body) {
  at::parallel_for(0, round_up(width, panel) / panel, row_grain(panel * depth),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t p = begin; p < end; ++p) body(p * panel, std::min(width, (p + 1) * panel));
                   });
}

template <class T>
Scratch<uint8_t> pack(TernaryLayout layout, int64_t n, int64_t k, const int8_t* codes) {
  const auto& table = kernels::table<T>();
  Scratch<uint8_t> packed;
  switch (layout) {
    case TernaryLayout::kInt8: {
      const int64_t panel = table.ternary_panel, depth = round_up(k, 4);
      packed.resize(round_up(n, panel) * depth);
      for_panels(n, panel, k, [&](int64_t begin, int64_t end) {
        table.ternary_pack(end - begin, k, codes + begin * k, packed.data + begin * depth);
      });
      break;
    }
    case TernaryLayout::kInt8Transposed: {
      const int64_t panel = table.ternary_panel, depth = round_up(n, 4);
      packed.resize(round_up(k, panel) * depth);
      for_panels(k, panel, n, [&](int64_t begin, int64_t end) {
        table.ternary_pack_transposed(end - begin, n, codes + begin, k, packed.data + begin * depth);
      });
      break;
    }
    case TernaryLayout::kFloat:
      packed.resize(table.ternary_float_packed_size(n, k));
      table.ternary_float_pack(n, k, codes, /*row_stride=*/k, /*col_stride=*/1, packed.data);
      break;
    case TernaryLayout::kFloatTransposed:
      packed.resize(table.ternary_float_packed_size(k, n));
      table.ternary_float_pack(k, n, codes, /*row_stride=*/1, /*col_stride=*/k, packed.data);
      break;
    case TernaryLayout::kBf16Transposed: {
      const int64_t panel = table.bf16_panel, pairs = (n + 1) / 2;
      packed.resize(pairs * round_up(k, panel) * static_cast<int64_t>(sizeof(int32_t)));
      for_panels(k, panel, n, [&](int64_t begin, int64_t end) {
        table.bf16_pack_int8(n, end - begin, codes + begin, k,
                             reinterpret_cast<int32_t*>(packed.data) + begin * pairs);
      });
      break;
    }
    case TernaryLayout::kCount:
      TORCH_INTERNAL_ASSERT(false);
  }
  return packed;
}

uint64_t fingerprint(const at::Tensor& weight) {
  constexpr int64_t kChunk = 256 * 1024;
  const at::Tensor contiguous = weight.contiguous();
  const char* bytes = static_cast<const char*>(contiguous.const_data_ptr());
  const int64_t size = static_cast<int64_t>(contiguous.nbytes());
  std::vector<uint64_t> hashes((size + kChunk - 1) / kChunk);
  at::parallel_for(0, static_cast<int64_t>(hashes.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      hashes[i] =
          kernels::table<float>().fingerprint(std::min(kChunk, size - i * kChunk), bytes + i * kChunk);
    }
  });
  return kernels::table<float>().fingerprint(static_cast<int64_t>(hashes.size() * sizeof(uint64_t)),
                                             hashes.data());
}

/// Where a weight lies and how it is read.
using Key = std::tuple<const c10::StorageImpl*, const void*, int64_t, int64_t, int64_t, int64_t,
                       at::ScalarType, Quantizer>;

template <class T>
struct Entry {
  // A weak reference keeps the address from being given to another storage.
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  int64_t version;
  uint64_t fingerprint;
  std::shared_ptr<TernaryWeights<T>> weights;
};

template <class T>
struct Cache {
  std::mutex mutex;
  std::map<Key, Entry<T>> entries;
};

/// Never destroyed: it holds tensors, and outlives what else they need at exit.
template <class T>
Cache<T>& cache() {
  static auto* const the_cache = new Cache<T>;
  return *the_cache;
}

}  // namespace

template <class T>
TernaryScale<T> ternary_scale(const at::Tensor& weight, Quantizer quantizer) {
  const T* w = weight.const_data_ptr<T>();
  double sum = 0;
  sum_over_rows(weight.numel(), 1, &sum, [&](int64_t begin, int64_t end, double* partial) {
    *partial += kernels::table<T>().abs_sum(end - begin, w + begin);
  });
  const T mean = static_cast<T>(sum / static_cast<double>(weight.numel()));
  // No weight is above a bound of NaN: without this, one broken weight would silence the layer.
  if (!std::isfinite(mean)) return {std::numeric_limits<T>::quiet_NaN(), mean};
  if (quantizer == Quantizer::kThreshold) return {T(1), mean};
  const T gamma = std::max(mean, T(1e-5));
  return {gamma, gamma / 2};
}

template <class T>
TernaryWeights<T>::TernaryWeights(const at::Tensor& weight, Quantizer quantizer)
    : scale_(ternary_scale<T>(kernel_input(weight, weight), quantizer)) {}

template <class T>
const void* TernaryWeights<T>::packed(TernaryLayout layout, const at::Tensor& weight) {
  const std::lock_guard lock(mutex_);
  auto& packed = layouts_[static_cast<size_t>(layout)];
  if (packed.data == nullptr) {
    const at::Tensor w = kernel_input(weight, weight);
    const int64_t n = w.size(0), k = w.size(1);
    Scratch<int8_t> codes(n * k);
    at::parallel_for(0, n, row_grain(k), [&](int64_t begin, int64_t end) {
      kernels::table<T>().ternary_codes((end - begin) * k, w.const_data_ptr<T>() + begin * k, scale_.bound,
                                        codes.data + begin * k);
    });
    packed = pack<T>(layout, n, k, codes.data);
  }
  return packed.data;
}

template <class T>
std::shared_ptr<TernaryWeights<T>> ternary_weights(const at::Tensor& weight, Quantizer quantizer) {
  const c10::Storage& storage = weight.storage();
  const Key key = {storage.unsafeGetStorageImpl(),
                   weight.const_data_ptr(),
                   weight.size(0),
                   weight.size(1),
                   weight.stride(0),
                   weight.stride(1),
                   weight.scalar_type(),
                   quantizer};
  const int64_t version = weight.is_inference() ? 0 : weight._version();
  const uint64_t hash = fingerprint(weight);
  Cache<T>& all = cache<T>();
  {
    const std::lock_guard lock(all.mutex);
    const auto found = all.entries.find(key);
    if (found != all.entries.end() && found->second.version == version && found->second.fingerprint == hash) {
      return found->second.weights;
    }
  }
  auto weights = std::make_shared<TernaryWeights<T>>(weight, quantizer);
  const std::lock_guard lock(all.mutex);
  if (all.entries.count(key) == 0)
    std::erase_if(all.entries, [](const auto& e) { return e.second.storage.expired(); });
  all.entries.insert_or_assign(key, Entry<T>{storage.getWeakStorageImpl(), version, hash, weights});
  return weights;
}

template TernaryScale<float> ternary_scale(const at::Tensor&, Quantizer);
template TernaryScale<double> ternary_scale(const at::Tensor&, Quantizer);
template class TernaryWeights<float>;
template class TernaryWeights<double>;
template std::shared_ptr<TernaryWeights<float>> ternary_weights(const at::Tensor&, Quantizer);
template std::shared_ptr<TernaryWeights<double>> ternary_weights(const at::Tensor&, Quantizer);

}  // namespace flashlm
