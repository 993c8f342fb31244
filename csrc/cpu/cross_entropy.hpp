// Cross-entropy of rows of logits, and its gradient in place of them.
#pragma once

#include <cstdint>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

template <class T>
struct CrossEntropy {
    T* logits;  // (rows, vocab_size), `stride` elements apart
    int64_t rows, vocab_size, stride;
    const int64_t* targets;
    const float* scale;  // one weight a row, or null: no gradient
    float *losses, *logprobs, *entropy;
    int64_t ignore_index;
    float label_smoothing, z_loss;
    float softcap;  // 0: none
};

// For each row its loss, its target's log-probability and its distribution's entropy: 0 where the target is ignored,
// NaN where it is out of range. With `scale` the row becomes the gradient of scale · loss in its logits; without, its
// contents are left unspecified.
template <class T>
void cross_entropy(const CrossEntropy<T>& call, int num_threads);

extern template void cross_entropy(const CrossEntropy<float>&, int);
extern template void cross_entropy(const CrossEntropy<BFloat16>&, int);

}  // namespace fastlm::cpu
