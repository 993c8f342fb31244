// A linear layer over weights in ggml's block formats.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

template <class T>
struct QuantizedLinear {
    const T* x;  // rows of in_features contiguous elements, x_stride elements apart
    int64_t rows, in_features, x_stride;
    const uint8_t* weight;  // out_features rows of blocks, weight_stride bytes apart
    int64_t out_features, weight_stride;
    const float* bias;  // may be null
    T* y;               // (rows, out_features), contiguous
};

struct BlockFormat {
    int64_t block_size, block_bytes;
};

// The block of a format named as in `fastlm.ops.quantized_linear.FORMATS`. Throws std::invalid_argument.
BlockFormat block_format(const std::string& quantization);

template <class T>
void quantized_linear(const QuantizedLinear<T>& call, const std::string& quantization, int num_threads);

}  // namespace fastlm::cpu
