// SPDX-License-Identifier: Apache-2.0
// What the tests of data/ share: a folder that goes away, text that looks like English, errors as strings, a
// full disk.
#pragma once

#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>

#include <filesystem>
#include <fstream>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "data/error.h"
#include "data/token_shard.h"

namespace flashlm {

class Scratch {
 public:
  Scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "flashlm-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~Scratch() { std::filesystem::remove_all(path_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// write_file() without its fsyncs, which hundreds of small files would wait for. An old file goes first:
/// ext4 flushes one that is truncated and written again.
inline void put_file(const std::filesystem::path& path, std::string_view content) {
  std::filesystem::remove(path);
  std::ofstream(path, std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
}

/// The message of the Error that `action` throws, or "" if it throws none. A message must be one line.
template <typename Action>
std::string error_of(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    const std::string message = error.what();
    return message.find('\n') == std::string::npos ? message : "more than one line: " + message;
  }
  return "";
}

/// Sentences of common words in paragraphs: enough variety for a vocabulary of 400.
inline std::string english(int sentences, unsigned seed) {
  static constexpr std::string_view words[] = {
      "the",   "of",       "and",     "people", "congress", "which",    "government", "states",
      "year",  "public",   "country", "great",  "united",   "their",    "should",     "nation",
      "peace", "treasury", "labour",  "river",  "winter",   "children", "shall",      "before",
      "under", "within",   "duty",    "lands",  "commerce", "honest",   "small",      "morning"};
  std::mt19937 random(seed);
  std::string text;
  for (int i = 0; i < sentences; ++i) {
    for (std::uint32_t n = 4 + random() % 8; n > 0; --n) {
      text += words[random() % std::size(words)];
      text += n > 1 ? " " : ".";
    }
    text += random() % 4 == 0 ? "\n\n" : " ";
  }
  return text;
}

/// Files of this process cannot grow beyond `bytes` while the object lives: writing fails as on a full disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(signal(SIGXFSZ, SIG_IGN)) {
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &before_);
    signal(SIGXFSZ, handler_);
  }

 private:
  sighandler_t handler_;
  rlimit before_;
};

/// A shard of ids that tell their own position: the i-th is first + i. Documents, if lengths are given, of
/// these.
inline TokenShard counting(const Scratch& scratch, int count, int first = 0,
                           const std::vector<int>& documents = {}) {
  const auto path = scratch / ("counting-" + std::to_string(first) + "-" + std::to_string(count));
  TokenShardWriter writer(path, 100000, 0);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  std::iota(ids.begin(), ids.end(), first);
  std::span<const std::int32_t> left = ids;
  for (const int length : documents) {
    writer.append(left.first(static_cast<std::size_t>(length)), 0);
    writer.end_document();
    left = left.subspan(static_cast<std::size_t>(length));
  }
  writer.append(left, 0);
  writer.commit();
  return TokenShard::open(path);
}

}  // namespace flashlm
