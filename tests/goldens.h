// SPDX-License-Identifier: Apache-2.0
// Reads what the scripts in tests/goldens write: safetensors files of float32, float64 and int64 tensors.
// Kept apart from the program's own reader, so that a fault there cannot hide here.
#pragma once

#include <torch/torch.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace flashlm::testing {

/// Layout: uint64 length of the header, JSON header {name: {dtype, shape, data_offsets}}, data.
/// Little-endian.
inline std::map<std::string, at::Tensor> load_golden(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.size() < 8) throw std::runtime_error(path + ": no golden there; ctest makes it before the test");
  uint64_t header_size = 0;
  std::memcpy(&header_size, bytes.data(), sizeof header_size);
  const char* data = bytes.data() + 8 + header_size;
  const std::map<std::string, at::ScalarType> dtypes{
      {"F32", at::kFloat}, {"F64", at::kDouble}, {"I64", at::kLong}};
  std::map<std::string, at::Tensor> tensors;
  const auto header = nlohmann::json::parse(bytes.substr(8, header_size));
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const auto shape = entry.at("shape").get<std::vector<int64_t>>();
    const at::Tensor tensor = at::empty(shape, dtypes.at(entry.at("dtype").get<std::string>()));
    std::memcpy(tensor.data_ptr(), data + entry.at("data_offsets").at(0).get<size_t>(), tensor.nbytes());
    tensors[name] = tensor;
  }
  return tensors;
}

}  // namespace flashlm::testing
