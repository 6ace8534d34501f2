// SPDX-License-Identifier: Apache-2.0
#include "train/run_folder.h"

#include <algorithm>
#include <cstdio>

#include "data/error.h"

namespace flashlm {

std::filesystem::path RunFolder::checkpoint(int64_t step) const {
  char name[64];
  // Padded, so that names sort as numbers do.
  std::snprintf(name, sizeof name, "step-%09lld.safetensors", static_cast<long long>(step));
  return checkpoints() / name;
}

std::vector<std::filesystem::path> RunFolder::checkpoint_files() const {
  std::vector<std::filesystem::path> files;
  if (!std::filesystem::is_directory(checkpoints())) return files;
  for (const auto& entry : std::filesystem::directory_iterator(checkpoints())) {
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

RunFolder RunFolder::of(const std::filesystem::path& path) {
  return RunFolder(std::filesystem::is_directory(path) ? path : path.parent_path());
}

std::filesystem::path RunFolder::weights(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) {
    throw Error("there is no run or model " + path.string() + "; train one with train_flashlm --out " +
                path.string());
  }
  if (!std::filesystem::is_directory(path)) return path;
  const RunFolder run(path);
  if (std::filesystem::exists(run.model())) return run.model();
  const auto files = run.checkpoint_files();
  if (files.empty()) {
    throw Error(path.string() +
                " holds neither model.safetensors nor a checkpoint; train with train_flashlm --out " +
                path.string());
  }
  return files.back();
}

}  // namespace flashlm
