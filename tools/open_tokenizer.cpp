// SPDX-License-Identifier: Apache-2.0
// The note is one line, like messages of errors.
#include "tools/open_tokenizer.h"

#include <cstdio>

namespace flashlm {

std::unique_ptr<Tokenizer> open_tokenizer(const std::string& spec) {
  auto tokenizer = Tokenizer::open(spec);
  if (!tokenizer->lossless())
    std::fprintf(stderr, "flashlm: note: %s %s: decoding does not give back the same bytes\n", spec.c_str(),
                 tokenizer->alteration().c_str());
  return tokenizer;
}

}  // namespace flashlm
