// Greedy generation from `quantkit export CHECKPOINT --to aoti -o OUT`, without Python.
//
//   ./generate OUT/model.pt2 LAYERS KV_HEADS HEAD_SIZE COUNT TOKEN [TOKEN ...]
//
// LAYERS, KV_HEADS and HEAD_SIZE are config.json's num_hidden_layers, num_key_value_heads and head_dim.
// Built as build.sh shows. Inputs and outputs in order (see docs/export.md):
//   input_ids [B,S], attention_mask [B,L], position_ids [B,S], cache_position [S], key 0, value 0, key 1, ...
//   logits [B,S,V], key 0, value 0, ...
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 7) {
    std::cerr << "usage: generate model.pt2 LAYERS KV_HEADS HEAD_SIZE COUNT TOKEN...\n";
    return 2;
  }
  const int64_t layers = std::atoll(argv[2]), heads = std::atoll(argv[3]), size = std::atoll(argv[4]);
  const int64_t count = std::atoll(argv[5]);
  std::vector<int64_t> prompt;
  for (int i = 6; i < argc; ++i) prompt.push_back(std::atoll(argv[i]));

  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader program(argv[1]);
  const int64_t length = static_cast<int64_t>(prompt.size()) + count;
  std::vector<at::Tensor> cache;
  for (int64_t i = 0; i < 2 * layers; ++i) cache.push_back(torch::zeros({1, heads, length, size}));

  at::Tensor step = torch::tensor(prompt, torch::kInt64).unsqueeze(0);
  const at::Tensor slots = torch::arange(length);
  int64_t done = 0;
  auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < count; ++i) {
    if (i == 1) begin = std::chrono::steady_clock::now();  // decode steps only
    const at::Tensor places = torch::arange(done, done + step.size(1));
    done += step.size(1);
    const at::Tensor mask = slots.lt(done).to(torch::kInt64).unsqueeze(0);
    std::vector<at::Tensor> inputs{step, mask, places.unsqueeze(0), places};
    inputs.insert(inputs.end(), cache.begin(), cache.end());
    std::vector<at::Tensor> outputs = program.run(inputs);
    step = outputs[0].select(1, outputs[0].size(1) - 1).argmax(-1, /*keepdim=*/true);
    cache.assign(outputs.begin() + 1, outputs.end());
    std::cout << (i ? "," : "") << step.item<int64_t>();
  }
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
  std::cout << "\n";
  if (count > 1) std::cerr << (count - 1) / passed.count() << " tokens/s\n";
  return 0;
}
