// SPDX-License-Identifier: Apache-2.0
#include "bench/ggml.h"

#include <dlfcn.h>

#include <chrono>
#include <cstring>
#include <map>
#include <thread>

namespace flashlm::bench {
namespace {

// ---- what is used of ggml's C interface ----
// Only handles, numbers that its file format fixes, and two structs that have kept their layout.

struct ggml_context;
struct ggml_tensor;
struct ggml_cgraph;
struct ggml_threadpool;
struct ggml_backend;

struct InitParams {
  size_t bytes;
  void* buffer;
  bool no_alloc;
};

struct TypeTraits {
  void (*from_float)(const float* x, void* y, int64_t k);
  void (*vec_dot)(int n, float* result, size_t, const void* weight, size_t, const void* x, size_t, int rows);
  int vec_dot_type;  // what vec_dot wants x to be
  int64_t rows;
};

constexpr int kF32 = 0;
const std::map<std::string, int> kTypes = {{"F32", kF32}, {"Q8_0", 8}, {"TQ1_0", 34}, {"TQ2_0", 35}};

/// Larger than ggml_threadpool_params has been in any version; ggml fills it in and reads it.
struct alignas(16) ThreadpoolParams {
  unsigned char opaque[4096];
};

std::filesystem::path find_library(const std::filesystem::path& folder, const std::string& name) {
  for (const auto& entry : std::filesystem::recursive_directory_iterator(
           folder, std::filesystem::directory_options::skip_permission_denied)) {
    if (entry.path().filename() == name) return entry.path();
  }
  throw std::runtime_error("--ggml " + folder.string() + " holds no " + name +
                           "; give the folder of a build of ggml or llama.cpp with shared libraries");
}

void* open_library(const std::filesystem::path& path, int scope) {
  void* library = dlopen(path.c_str(), RTLD_NOW | scope);
  if (library == nullptr) throw std::runtime_error(std::string("cannot load ggml: ") + dlerror());
  return library;
}

/// x (rows, k) as float32 with k padded by zeros.
at::Tensor pad(const at::Tensor& x, int64_t k) {
  return at::constant_pad_nd(x.to(at::kFloat), {0, k - x.size(1)}).contiguous();
}

}  // namespace

struct Ggml::Api {
  explicit Api(const std::filesystem::path& folder) {
    if (!std::filesystem::is_directory(folder)) {
      throw std::runtime_error("--ggml " + folder.string() + " is not a folder");
    }
    // Global, because libggml-cpu.so may find libggml-base.so nowhere else.
    void* base = open_library(find_library(folder, "libggml-base.so"), RTLD_GLOBAL);
    void* cpu = open_library(find_library(folder, "libggml-cpu.so"), RTLD_LOCAL);
    const auto load = [](void* library, const char* name, auto& function) {
      void* symbol = dlsym(library, name);
      if (symbol == nullptr) throw std::runtime_error(std::string("this ggml has no function ") + name);
      std::memcpy(&function, &symbol, sizeof symbol);
    };
    load(base, "ggml_version", version);
    load(base, "ggml_commit", commit);
    load(base, "ggml_init", init);
    load(base, "ggml_free", free);
    load(base, "ggml_new_tensor_2d", new_tensor_2d);
    load(base, "ggml_get_data", get_data);
    load(base, "ggml_mul_mat", mul_mat);
    load(base, "ggml_new_graph", new_graph);
    load(base, "ggml_build_forward_expand", build_forward_expand);
    load(base, "ggml_blck_size", block_size);
    load(base, "ggml_row_size", row_size);
    load(base, "ggml_quantize_chunk", quantize_chunk);
    load(base, "ggml_threadpool_params_init", threadpool_params_init);
    load(base, "ggml_backend_graph_compute", backend_graph_compute);
    load(base, "ggml_backend_free", backend_free);
    load(cpu, "ggml_backend_cpu_init", backend_cpu_init);
    load(cpu, "ggml_backend_cpu_set_n_threads", backend_cpu_set_n_threads);
    load(cpu, "ggml_backend_cpu_set_threadpool", backend_cpu_set_threadpool);
    load(cpu, "ggml_threadpool_new", threadpool_new);
    load(cpu, "ggml_threadpool_pause", threadpool_pause);
    load(cpu, "ggml_threadpool_free", threadpool_free);
    load(cpu, "ggml_get_type_traits_cpu", type_traits);
    load(cpu, "ggml_cpu_has_avx2", has_avx2);
    load(cpu, "ggml_cpu_has_avx512", has_avx512);
    load(cpu, "ggml_cpu_has_avx512_vnni", has_avx512_vnni);
    load(cpu, "ggml_cpu_init", cpu_init);
    cpu_init();
  }

  /// Rows of float32 in the format; F32 as they are.
  void quantize(int type, const at::Tensor& rows, void* out) const {
    if (type == kF32) {
      std::memcpy(out, rows.const_data_ptr<float>(), rows.nbytes());
    } else {
      quantize_chunk(type, rows.const_data_ptr<float>(), out, 0, rows.size(0), rows.size(1), nullptr);
    }
  }

  const char* (*version)();
  const char* (*commit)();
  ggml_context* (*init)(InitParams);
  void (*free)(ggml_context*);
  ggml_tensor* (*new_tensor_2d)(ggml_context*, int type, int64_t columns, int64_t rows);
  void* (*get_data)(const ggml_tensor*);
  ggml_tensor* (*mul_mat)(ggml_context*, ggml_tensor* weight, ggml_tensor* x);
  ggml_cgraph* (*new_graph)(ggml_context*);
  void (*build_forward_expand)(ggml_cgraph*, ggml_tensor*);
  int64_t (*block_size)(int type);
  size_t (*row_size)(int type, int64_t columns);
  size_t (*quantize_chunk)(int type, const float* from, void* to, int64_t start, int64_t rows,
                           int64_t columns, const float* importance);
  void (*threadpool_params_init)(ThreadpoolParams*, int threads);
  int (*backend_graph_compute)(ggml_backend*, ggml_cgraph*);
  void (*backend_free)(ggml_backend*);
  ggml_backend* (*backend_cpu_init)();
  void (*backend_cpu_set_n_threads)(ggml_backend*, int threads);
  void (*backend_cpu_set_threadpool)(ggml_backend*, ggml_threadpool*);
  ggml_threadpool* (*threadpool_new)(ThreadpoolParams*);
  void (*threadpool_pause)(ggml_threadpool*);
  void (*threadpool_free)(ggml_threadpool*);
  const TypeTraits* (*type_traits)(int type);
  int (*has_avx2)();
  int (*has_avx512)();
  int (*has_avx512_vnni)();
  void (*cpu_init)();
};

const std::vector<std::string>& Ggml::formats() {
  static const std::vector<std::string> names = {"TQ2_0", "TQ1_0", "Q8_0", "F32"};
  return names;
}

Ggml::Ggml(const std::filesystem::path& folder) : api_(std::make_shared<Api>(folder)) {}

Ggml::~Ggml() = default;

std::string Ggml::description() const {
  std::string text = std::string("ggml ") + api_->version() + ", commit " + api_->commit() + ", built with";
  const std::string sets = std::string(api_->has_avx2() ? " AVX2" : "") +
                           (api_->has_avx512() ? " AVX-512" : "") +
                           (api_->has_avx512_vnni() ? " AVX512-VNNI" : "");
  return text + (sets.empty() ? " none of AVX2, AVX-512, AVX512-VNNI" : sets) +
         ", whatever level others are held to";
}

int64_t Ggml::padded(const std::string& format, int64_t k) const {
  const int64_t block = api_->block_size(kTypes.at(format));
  return (k + block - 1) / block * block;
}

Contestant Ggml::product(const std::string& format, const at::Tensor& x, const at::Tensor& weight,
                         int threads) const {
  // Everything that one product needs, freed in the order that ggml asks for.
  struct Product {
    std::shared_ptr<const Api> api;
    ggml_context* context = nullptr;
    ggml_threadpool* pool = nullptr;
    ggml_backend* backend = nullptr;
    ggml_cgraph* graph = nullptr;
    at::Tensor y;
    ~Product() {
      if (backend != nullptr) api->backend_free(backend);
      if (pool != nullptr) api->threadpool_free(pool);
      if (context != nullptr) api->free(context);
    }
  };
  const int type = kTypes.at(format);
  const int64_t k = padded(format, x.size(1)), m = x.size(0), n = weight.size(0);
  const auto product = std::make_shared<Product>();
  product->api = api_;
  constexpr size_t kOverhead = 1 << 20;  // of the graph and of the tensors' headers
  product->context =
      api_->init({api_->row_size(type, k) * n + (m * k + m * n) * sizeof(float) + kOverhead, nullptr,
                  /*no_alloc=*/false});
  TORCH_CHECK(product->context != nullptr, "ggml: ggml_init failed");
  ggml_tensor* const weights = api_->new_tensor_2d(product->context, type, k, n);
  ggml_tensor* const inputs = api_->new_tensor_2d(product->context, kF32, k, m);
  api_->quantize(type, pad(weight, k), api_->get_data(weights));
  api_->quantize(kF32, pad(x, k), api_->get_data(inputs));
  ggml_tensor* const outputs = api_->mul_mat(product->context, weights, inputs);
  product->graph = api_->new_graph(product->context);
  api_->build_forward_expand(product->graph, outputs);
  product->y = at::from_blob(api_->get_data(outputs), {m, n}, at::kFloat);
  product->backend = api_->backend_cpu_init();
  ThreadpoolParams params;
  api_->threadpool_params_init(&params, threads);
  product->pool = api_->threadpool_new(&params);
  api_->backend_cpu_set_n_threads(product->backend, threads);
  api_->backend_cpu_set_threadpool(product->backend, product->pool);
  Contestant contestant;
  contestant.name = "ggml " + format;
  contestant.run = [product] {
    const int status = product->api->backend_graph_compute(product->backend, product->graph);
    TORCH_CHECK(status == 0, "ggml: computing the graph failed with status ", status);
    return product->y;
  };
  if (threads > 1) {
    // Two pools that spin for work would take the processors from each other. OpenMP's threads give up
    // after some milliseconds; ggml's are told to. The next computation wakes them.
    contestant.before = [] { std::this_thread::sleep_for(std::chrono::milliseconds(5)); };
    contestant.after = [product] { product->api->threadpool_pause(product->pool); };
  }
  return contestant;
}

Contestant Ggml::kernel(const std::string& format, const at::Tensor& x, const at::Tensor& weight) const {
  const TypeTraits& traits = *api_->type_traits(kTypes.at(format));
  const TypeTraits& input_traits = *api_->type_traits(traits.vec_dot_type);
  const int64_t k = padded(format, x.size(1)), m = x.size(0), n = weight.size(0);
  const size_t weight_row = api_->row_size(kTypes.at(format), k);
  const size_t input_row = api_->row_size(traits.vec_dot_type, k);
  const auto bytes = [](size_t size) { return at::empty({static_cast<int64_t>(size)}, at::kByte); };
  const at::Tensor packed = bytes(weight_row * n), scratch = bytes(input_row * m);
  api_->quantize(kTypes.at(format), pad(weight, k), packed.mutable_data_ptr());
  const at::Tensor inputs = pad(x, k), y = at::empty({m, n});
  const bool quantized = traits.vec_dot_type != kF32;
  Contestant contestant;
  contestant.name = "ggml " + format;
  contestant.run = [=, api = api_, &traits, &input_traits] {
    const auto* w = static_cast<const char*>(packed.const_data_ptr());
    const char* rows = reinterpret_cast<const char*>(inputs.const_data_ptr<float>());
    if (quantized) {
      rows = static_cast<const char*>(scratch.const_data_ptr());
      for (int64_t i = 0; i < m; ++i) {
        input_traits.from_float(inputs.const_data_ptr<float>() + i * k,
                                static_cast<char*>(scratch.mutable_data_ptr()) + i * input_row, k);
      }
    }
    float* out = y.mutable_data_ptr<float>();
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        traits.vec_dot(static_cast<int>(k), out + i * n + j, 0, w + j * weight_row, 0, rows + i * input_row,
                       0, 1);
      }
    }
    return y;
  };
  return contestant;
}

}  // namespace flashlm::bench
