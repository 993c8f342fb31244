// Drawing one token of each row of logits on a GPU; fastlm/ops/sampling/__init__.py defines every step.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/dtype.hpp"

namespace fastlm::cuda {

// Device pointers, a value a row. Filters may be null; logprobs are both null or neither.
struct Sampling {
    const void* logits;  // (rows, vocab_size), rows `stride` elements apart
    int64_t rows, stride;
    int32_t vocab_size;
    const float* temperature;
    const int64_t* top_k;
    const float *top_p, *min_p;
    bool min_p_first;
    const int64_t *seed, *position;
    int64_t* ids;
    bool* valid;
    float *logprobs, *processed_logprobs;
};

// Queues the kernel on `stream` and returns without waiting for it.
cudaError_t sample(const Sampling& call, DType dtype, cudaStream_t stream);

// The chips whose code is in this build: 80 for sm_80.
std::vector<int> built_archs();

}  // namespace fastlm::cuda
