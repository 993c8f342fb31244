// Drawing one token of each row of logits; fastlm/ops/sampling/__init__.py defines every step.
#pragma once

#include <cstdint>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

// Settings hold one number a row; a null pointer is a setting that was not given.
template <class T>
struct Sampling {
    const T* logits;  // (rows, vocab_size), rows `stride` elements apart
    int64_t rows, vocab_size, stride;
    const float *temperature, *top_p, *min_p, *typical_p;  // temperature is always given
    const int64_t* top_k;
    const float *repetition_penalty, *presence_penalty, *frequency_penalty;
    const int64_t *prompt_ids, *output_ids;  // (rows, prompt_length), (rows, output_length)
    int64_t prompt_length, output_length;
    const int64_t *seed, *position;
    bool min_p_first;
    int64_t num_logprobs;

    int64_t* ids;
    bool* valid;
    float *logprobs, *processed_logprobs;  // both null, or neither
    int64_t* top_ids;                      // (rows, num_logprobs)
    float* top_logprobs;
};

template <class T>
void sample(const Sampling<T>& call, int num_threads);

extern template void sample(const Sampling<float>&, int);
extern template void sample(const Sampling<BFloat16>&, int);
extern template void sample(const Sampling<Float16>&, int);

}  // namespace fastlm::cpu
