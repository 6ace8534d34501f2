// SPDX-License-Identifier: Apache-2.0
// Hugging Face's safetensors files (huggingface.co/docs/safetensors): an 8-byte little-endian header size, a
// JSON header with dtype, shape and byte range of each tensor, then the raw values. Python reads them with
// `safetensors.torch.load_file`.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <map>
#include <string>

namespace flashlm {

struct SafeTensors {
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

/// Writes to a temporary name, flushes, renames. Adds metadata "xxh3": the XXH3 checksum of all values, in
/// hex. dtypes: float32, float64, float16, bfloat16, int64, int32, uint8. Throws Error if the disk does not
/// take it.
void save_safetensors(const std::filesystem::path& path, const std::map<std::string, at::Tensor>& tensors,
                      std::map<std::string, std::string> metadata = {});

/// Reads a file, whoever wrote it; the checksum is held against the values where there is one. With `wanted`,
/// only the tensors whose names it accepts: the others may be of any dtype, and take no memory. Throws Error
/// in one line for a missing, truncated or damaged file.
SafeTensors load_safetensors(const std::filesystem::path& path,
                             const std::function<bool(const std::string&)>& wanted = {});

/// The same, but tensors that begin at a cache line, as those of whole lines that save_safetensors wrote do,
/// are the mapped file itself: to be read only, in memory once they are read, and shared with other
/// processes. The checksum, which would read them all, is not looked at.
SafeTensors map_safetensors(const std::filesystem::path& path,
                            const std::function<bool(const std::string&)>& wanted = {});

}  // namespace flashlm
