// Drawing one token of each row of logits on a GPU; fastlm/ops/sampling/__init__.py defines every step.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastlm::cuda {

// Device pointers. The element type is the launcher's template argument; logprobs are both null or neither.
struct Sampling {
    const void* logits;  // (rows, vocab_size), rows `stride` elements apart
    int64_t rows, vocab_size, stride;
    const float* temperature;
    const int64_t *seed, *position;
    int64_t* ids;
    bool* valid;
    float *logprobs, *processed_logprobs;
};

enum class DType { float32, bfloat16, float16 };

// Queues the kernel on `stream` and returns without waiting for it.
cudaError_t sample(const Sampling& call, DType dtype, cudaStream_t stream);

}  // namespace fastlm::cuda
