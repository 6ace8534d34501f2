// SPDX-License-Identifier: Apache-2.0
// load_torchscript MODEL.pt ID...: a C++ process that knows nothing of the model's classes, only
// libflashlm_ops, loads an exported model and prints the ten tokens it finds likeliest after those given.
#include <torch/script.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ops/rms_norm.h"

int main(int argc, char** argv) {
  flashlm::rms_norm(torch::ones({1}), torch::ones({1}));  // the linker keeps a library that is called
  torch::jit::Module model = torch::jit::load(argv[1]);
  std::vector<int64_t> ids;
  for (int i = 2; i < argc; ++i) ids.push_back(std::atoll(argv[i]));
  torch::NoGradGuard no_grad;
  const at::Tensor text =
      model.get_method("generate")({torch::tensor(ids).unsqueeze(0), 10, /*temperature=*/0.0}).toTensor();
  for (int64_t i = 0; i < text.size(1); ++i)
    std::printf("%lld ", static_cast<long long>(text[0][i].item<int64_t>()));
  return 0;
}
