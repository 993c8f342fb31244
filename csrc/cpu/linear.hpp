// A linear layer over a few rows, for decoding. A row gives the same bits whatever rows are beside it.
#pragma once

#include <cstdint>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

template <class T>
struct Linear {
    const T* x;  // (rows, in_features), contiguous
    int64_t rows, in_features;
    const T* weight;  // out_features rows, weight_stride elements apart
    int64_t out_features, weight_stride;
    const float* bias;  // may be null
    T* y;               // (rows, out_features), contiguous
};

template <class T>
void linear(const Linear<T>& call, int num_threads);

}  // namespace fastlm::cpu
