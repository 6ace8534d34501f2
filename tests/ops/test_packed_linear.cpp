// SPDX-License-Identifier: Apache-2.0
// packed_linear, and pack_ternary and unpack_ternary, against bit_linear, whose twins for inference they are.
#include "ops/bit_linear.h"
#include "ops/pack_ternary.h"
#include "ops/packed_linear.h"
#include "tests/ops/check.h"
#include "tests/ops/reference.h"

using namespace flashlm;
using namespace flashlm::testing;

namespace {

using Shape = std::vector<int64_t>;

std::optional<at::Tensor> norm_for(bool norm, int64_t k, at::ScalarType dtype) {
  return norm ? std::optional(randn({k}, dtype, 2)) : std::nullopt;
}

at::Tensor pack_and_run(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& norm_scale, std::string_view quantizer = "absmean",
                        std::string_view activation = "int8") {
  const auto [packed, scale] = pack_ternary(weight, quantizer);
  return packed_linear(x, packed, scale, weight.size(0), norm_scale, activation);
}

}  // namespace

TEST_CASE("packed_linear equals bit_linear, bit for bit in mode int8", "[packed_linear]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble, at::kBFloat16);
  const std::string quantizer = GENERATE("absmean", "threshold"), activation = GENERATE("int8", "none");
  const bool norm = GENERATE(false, true);
  const auto [shape, n] = GENERATE(table<Shape, int64_t>({{{5}, 3},
                                                          {{1, 1}, 1},
                                                          {{3, 17}, 65},
                                                          {{2, 5, 256}, 33},
                                                          {{0, 8}, 4},
                                                          {{4, 8}, 0},
                                                          {{1, 256}, 683},
                                                          {{200, 683}, 70}}));
  INFO(quantizer << ", " << activation << ", norm " << norm << ", " << dtype << ", x "
                 << at::IntArrayRef(shape) << ", out " << n);
  const int64_t k = shape.back();
  const at::Tensor x = randn(shape, dtype), weight = randn({n, k}, dtype, 1);
  const auto norm_scale = norm_for(norm, k, dtype);
  const at::Tensor want = bit_linear(x, weight, norm_scale, quantizer, activation);
  const at::Tensor got = pack_and_run(x, weight, norm_scale, quantizer, activation);
  // In mode none both are sums of floats, whose order is not promised.
  const double tolerance = dtype == at::kDouble ? 1e-14 : dtype == at::kFloat ? 1e-6 : 8e-3;
  require_close(got, want, activation == "int8" ? 0 : tolerance);

  const auto [packed, scale] = pack_ternary(strided(weight), quantizer);
  const auto strided_norm = norm ? std::optional(strided(*norm_scale)) : std::nullopt;
  require_equal(packed_linear(strided(x), strided(packed), scale, n, strided_norm, activation), got);
}

TEST_CASE("unpack_ternary gives the weight that bit_linear multiplies with", "[packed_linear]") {
  const auto dtype = GENERATE(at::kFloat, at::kDouble, at::kBFloat16);
  const std::string quantizer = GENERATE("absmean", "threshold");
  const auto [n, k] =
      GENERATE(table<int64_t, int64_t>({{1, 1}, {3, 5}, {64, 64}, {65, 37}, {200, 683}, {0, 8}}));
  INFO(quantizer << ", " << dtype << ", " << n << " x " << k);
  const at::Tensor weight = randn({n, k}, dtype);
  const auto computed = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const auto [packed, scale] = pack_ternary(weight, quantizer);
  REQUIRE(packed.sizes() == at::IntArrayRef({(n + 63) / 64, (k + 3) / 4, 64}));
  REQUIRE(scale.scalar_type() == computed);
  const at::Tensor unpacked = unpack_ternary(packed, scale, n, k);
  REQUIRE(unpacked.is_contiguous());
  // The identity's rows are exact in mode "none": a sum of zeros and one weight.
  const at::Tensor eye = torch::eye(k, computed);
  require_equal(unpacked, bit_linear(eye, weight.to(computed), std::nullopt, quantizer, "none").t());
}

TEST_CASE("packed_linear's infinities and NaNs are not quantized away", "[packed_linear]") {
  const double bad = GENERATE(INFINITY, -INFINITY, NAN);
  const std::string activation = GENERATE("int8", "none");
  const at::Tensor x = randn({3, 20}), weight = randn({5, 20}, at::kFloat, 1);
  at::Tensor broken = x.clone();
  broken[1][7] = bad;
  const at::Tensor y = pack_and_run(broken, weight, std::nullopt, "absmean", activation);
  const at::Tensor good = pack_and_run(x, weight, std::nullopt, "absmean", activation);
  REQUIRE(at::equal(y[0], good[0]));
  REQUIRE(at::equal(y[2], good[2]));
  REQUIRE_FALSE(y[1].isfinite().all().item<bool>());
  broken = weight.clone();
  broken[1][7] = bad;
  REQUIRE(pack_and_run(x, broken, std::nullopt, "absmean", activation).isnan().all().item<bool>());
}

TEST_CASE("packed_linear does not depend on the number of threads", "[packed_linear]") {
  const std::string activation = GENERATE("int8", "none");
  // One row of many outputs, many rows of many and of few, and a number of panels that two do not divide.
  const auto [m, n, k] = GENERATE(
      table<int64_t, int64_t, int64_t>({{1, 2200, 2048}, {300, 700, 520}, {2000, 40, 512}, {500, 150, 683}}));
  INFO(activation << ", " << m << ", " << n << ", " << k);
  const at::Tensor x = randn({m, k}), weight = randn({n, k}, at::kFloat, 1),
                   norm_scale = randn({k}, at::kFloat, 2);
  require_same_for_any_threads([&, n = n] {
    const auto [packed, scale] = pack_ternary(weight);
    return Tensors{packed, scale, unpack_ternary(packed, scale, n, x.size(1)),
                   packed_linear(x, packed, scale, n, norm_scale, activation)};
  });
  require_close(pack_and_run(x, weight, norm_scale, "absmean", activation),
                bit_linear(x, weight, norm_scale, "absmean", activation), activation == "int8" ? 0 : 1e-6);
}

TEST_CASE("a packed weight's scale may be in any floating dtype", "[packed_linear]") {
  const auto [packed, scale] = pack_ternary(randn({9, 12}));
  const at::Tensor rounded = scale.to(at::kBFloat16), x = randn({2, 12});
  for (auto dtype : {at::kFloat, at::kDouble}) {
    require_equal(packed_linear(x, packed, rounded, 9), packed_linear(x, packed, rounded.to(dtype), 9));
    require_equal(unpack_ternary(packed, rounded, 9, 12).to(dtype),
                  unpack_ternary(packed, rounded.to(dtype), 9, 12));
  }
}

TEST_CASE("packed weights have no derivative, and say so", "[packed_linear]") {
  const at::Tensor x = randn({3, 8}).requires_grad_(), weight = randn({4, 8}).requires_grad_();
  const auto [packed, scale] = pack_ternary(weight);
  REQUIRE_FALSE(packed.requires_grad());
  require_error([&, &scale = scale] { scale.backward(); },
                "derivative for flashlm::pack_ternary is not implemented");
  const at::Tensor y = packed_linear(x, packed, scale.detach(), 4);
  require_error([&] { y.sum().backward(); }, "derivative for flashlm::packed_linear is not implemented");
  const at::Tensor w = unpack_ternary(packed, scale.detach().requires_grad_(), 4, 8);
  require_error([&] { w.sum().backward(); }, "derivative for flashlm::unpack_ternary is not implemented");
}

TEST_CASE("pack_ternary, unpack_ternary and packed_linear refuse wrong arguments in words",
          "[packed_linear]") {
  const at::Tensor weight = randn({70, 5}), x = randn({3, 5});
  const auto [p, s] = pack_ternary(weight);
  const at::Tensor packed = p, scale = s;
  require_error([&] { pack_ternary(weight.to(at::kInt)); },
                "pack_ternary: weight must be float32, bfloat16 or float64, got Int");
  require_error([&] { pack_ternary(weight[0]); }, "pack_ternary: weight must have 2 dimensions, got 1");
  require_error([&] { pack_ternary(randn({3, 0})); }, "pack_ternary: weight's in must be at least 1, got 0");
  require_error([&] { pack_ternary(weight, "ternary"); },
                "pack_ternary: quantizer must be 'absmean' or 'threshold', got 'ternary'");

  const auto unpack = [&](int64_t out, int64_t in) { return unpack_ternary(packed, scale, out, in); };
  require_error([&] { unpack_ternary(packed.to(at::kInt), scale, 70, 5); },
                "unpack_ternary: packed must be uint8, got Int");
  require_error([&] { unpack_ternary(packed[0], scale, 70, 5); },
                "unpack_ternary: packed must have 3 dimensions, got 2");
  require_error([&] { unpack_ternary(packed.narrow(2, 0, 60), scale, 70, 5); },
                "unpack_ternary: packed's last size must be 64, got 60");
  require_error([&] { unpack_ternary(packed, scale.to(at::kLong), 70, 5); },
                "unpack_ternary: scale must be float32, bfloat16 or float64, got Long");
  require_error([&] { unpack_ternary(packed, scale.view(1), 70, 5); },
                "unpack_ternary: scale must have 0 dimensions, got 1");
  require_error([&] { unpack(129, 5); },
                "unpack_ternary: packed's first size, ceil(out_features / 64), must be 3, got 2");
  require_error([&] { unpack(70, 9); },
                "unpack_ternary: packed's second size, ceil(in_features / 4), must be 3, got 2");
  require_error([&] { unpack(-1, 5); }, "unpack_ternary: out_features must be >= 0, got -1");
  require_error([&] { unpack(70, 0); }, "unpack_ternary: in_features must be at least 1, got 0");

  require_error([&] { packed_linear(x.to(at::kInt), packed, scale, 70); },
                "packed_linear: x must be float32, bfloat16 or float64, got Int");
  require_error([&] { packed_linear(at::scalar_tensor(1.0), packed, scale, 70); },
                "packed_linear: x must have at least 1 dimension, got 0");
  require_error(
      [&] {
        packed_linear(randn({3, 9}), packed, scale, 70);
      },
      "packed_linear: packed's second size, ceil(in_features / 4), must be 3, got 2");
  require_error([&] { packed_linear(x, packed, scale, 64); },
                "packed_linear: packed's first size, ceil(out_features / 64), must be 1, got 2");
  require_error([&] { packed_linear(x, packed, scale, 70, randn({4})); },
                "packed_linear: norm_scale's size must be 5, got 4");
  require_error([&] { packed_linear(x, packed, scale, 70, randn({5}, at::kDouble)); },
                "packed_linear: norm_scale must have x's dtype Float, got Double");
  require_error([&] { packed_linear(x, packed, scale, 70, std::nullopt, "int4"); },
                "packed_linear: activation must be 'int8' or 'none', got 'int4'");
  require_error([&] { packed_linear(x, packed, scale, 70, std::nullopt, "int8", -1); },
                "packed_linear: eps must be >= 0, got -1");
  const int64_t too_many = int64_t{1} << 24;
  const at::Tensor wide = at::empty({1, too_many}, at::kMeta);
  require_error(
      [&] {
        packed_linear(wide, at::empty({1, too_many / 4, 64}, wide.options().dtype(at::kByte)),
                      at::empty({}, wide.options()), 1);
      },
      "packed_linear: in_features must be at most 16777215");
}
