// SPDX-License-Identifier: Apache-2.0
#include "model/safetensors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

#include "data/error.h"
#include "data/file.h"

namespace flashlm {

namespace {

struct DType {
  at::ScalarType type;
  const char* name;
};
constexpr DType kDTypes[] = {{at::kFloat, "F32"},     {at::kDouble, "F64"}, {at::kHalf, "F16"},
                             {at::kBFloat16, "BF16"}, {at::kLong, "I64"},   {at::kInt, "I32"},
                             {at::kByte, "U8"}};

const char* dtype_name(at::ScalarType type) {
  for (const auto& d : kDTypes) {
    if (d.type == type) return d.name;
  }
  TORCH_INTERNAL_ASSERT(false, "save_safetensors: no name for dtype ", type);
}

at::ScalarType dtype_of(const std::string& name) {
  for (const auto& d : kDTypes) {
    if (name == d.name) return d.type;
  }
  throw Error("dtype " + name + " is not one of F32, F64, F16, BF16, I64, I32, U8");
}

std::string hex(uint64_t value) {
  std::ostringstream text;
  text << std::hex << value;
  return text.str();
}

std::span<const std::byte> bytes_of(const at::Tensor& t) {
  return {static_cast<const std::byte*>(t.const_data_ptr()), t.nbytes()};
}

using Wanted = std::function<bool(const std::string&)>;

constexpr uint64_t kLine = 64;  // of a CPU's cache

uint64_t to_whole_lines(uint64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

/// Bytes of `file` as a tensor: a copy, or if `shared` and they begin at a cache line, the file itself.
at::Tensor tensor_of(std::span<const std::byte> bytes, at::IntArrayRef shape, at::ScalarType type,
                     const std::shared_ptr<const MappedFile>& file, bool shared) {
  if (shared && !bytes.empty() && reinterpret_cast<uintptr_t>(bytes.data()) % kLine == 0) {
    return at::from_blob(
        const_cast<std::byte*>(bytes.data()), shape, [file](void*) {}, type);
  }
  at::Tensor t = at::empty(shape, type);
  if (!bytes.empty()) std::memcpy(t.mutable_data_ptr(), bytes.data(), bytes.size());
  return t;
}

/// The wanted tensors of an already checked header.
std::map<std::string, at::Tensor> read_tensors(const nlohmann::json& header, std::span<const std::byte> data,
                                               const Wanted& wanted,
                                               const std::shared_ptr<const MappedFile>& file, bool shared) {
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__" || (wanted && !wanted(name))) continue;
    const auto shape = entry.at("shape").get<std::vector<int64_t>>();
    const auto range = entry.at("data_offsets").get<std::vector<uint64_t>>();
    // A damaged header may ask for any size: bound it by the file before anything is allocated.
    uint64_t count = 1;
    for (int64_t size : shape) {
      if (size < 0 || (size > 0 && count > data.size() / size))
        throw Error("tensor '" + name + "' is too large");
      count *= size;
    }
    const auto type = dtype_of(entry.at("dtype").get<std::string>());
    const uint64_t nbytes = count * at::elementSize(type);
    if (range.size() != 2 || range[0] > range[1] || range[1] > data.size() || range[1] - range[0] != nbytes) {
      throw Error("tensor '" + name + "' does not fit its byte range");
    }
    tensors[name] = tensor_of(data.subspan(range[0], nbytes), shape, type, file, shared);
  }
  return tensors;
}

SafeTensors parse(const std::shared_ptr<const MappedFile>& mapped, const Wanted& wanted, bool shared) {
  const auto file = mapped->bytes();
  uint64_t header_size = 0;
  if (file.size() < sizeof header_size) throw Error("it ends inside the header");
  std::memcpy(&header_size, file.data(), sizeof header_size);
  if (header_size > file.size() - sizeof header_size) throw Error("it ends inside the header");
  const auto* text = reinterpret_cast<const char*>(file.data()) + sizeof header_size;
  const auto header = nlohmann::json::parse(text, text + header_size);
  const auto data = file.subspan(sizeof header_size + header_size);
  SafeTensors out;
  if (header.contains("__metadata__")) header["__metadata__"].get_to(out.metadata);
  uint64_t end = 0;
  for (const auto& [name, entry] : header.items()) {
    if (name != "__metadata__") end = std::max(end, entry.at("data_offsets").at(1).get<uint64_t>());
  }
  if (end != data.size()) {
    throw Error("it must hold " + std::to_string(end) + " bytes of values, got " +
                std::to_string(data.size()));
  }
  const auto sum = out.metadata.find("xxh3");
  if (!shared && sum != out.metadata.end() && sum->second != hex(checksum(data)))
    throw Error("its checksum does not match");
  out.tensors = read_tensors(header, data, wanted, mapped, shared);
  return out;
}

SafeTensors read(const std::filesystem::path& path, const Wanted& wanted, bool shared) {
  const auto file = std::make_shared<const MappedFile>(path);
  try {
    return parse(file, wanted, shared);
  } catch (const std::exception& error) {
    throw Error(path.string() + " is damaged or not a safetensors file: " + error.what() +
                "; use another copy or an earlier checkpoint");
  }
}

}  // namespace

void save_safetensors(const std::filesystem::path& path, const std::map<std::string, at::Tensor>& tensors,
                      std::map<std::string, std::string> metadata) {
  nlohmann::json header;
  Checksum sum;
  std::vector<at::Tensor> values;
  uint64_t offset = 0;
  // Those of whole lines first, so that each begins at a line: there may be no gaps.
  std::vector<std::pair<std::string, at::Tensor>> ordered(tensors.begin(), tensors.end());
  std::stable_partition(ordered.begin(), ordered.end(),
                        [](const auto& named) { return named.second.nbytes() % kLine == 0; });
  for (const auto& [name, tensor] : ordered) {
    values.push_back(tensor.detach().cpu().contiguous());
    const auto bytes = bytes_of(values.back());
    sum.update(bytes);
    header[name] = {{"dtype", dtype_name(tensor.scalar_type())},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {offset, offset + bytes.size()}}};
    offset += bytes.size();
  }
  metadata["xxh3"] = hex(sum.digest());
  header["__metadata__"] = metadata;
  std::string text = header.dump();
  uint64_t size = 0;
  text.resize(to_whole_lines(sizeof size + text.size()) - sizeof size, ' ');  // the values start at a line
  size = text.size();
  AtomicFile file(path);
  file.write(std::string_view(reinterpret_cast<const char*>(&size), sizeof size));
  file.write(text);
  for (const auto& value : values) file.write(bytes_of(value));
  file.commit();
}

SafeTensors load_safetensors(const std::filesystem::path& path, const Wanted& wanted) {
  return read(path, wanted, /*shared=*/false);
}

SafeTensors map_safetensors(const std::filesystem::path& path, const Wanted& wanted) {
  return read(path, wanted, /*shared=*/true);
}

}  // namespace flashlm
