// Rotation of query or key heads by position.
#pragma once

#include <cstdint>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

template <class T>
struct Rotary {
    const T* x;  // (batch, seq, heads, head_dim), the last contiguous
    int64_t batch, seq, heads, head_dim, batch_stride, seq_stride, head_stride;
    const float *cos, *sin;  // (max_positions, half)
    int64_t half;
    const int64_t* positions;  // null: 0, 1, 2 …; checked by the caller
    int64_t positions_batch_stride, positions_seq_stride;
    float sign;  // of the angle
    bool interleaved;
    T* y;  // contiguous
};

template <class T>
void rotary(const Rotary<T>& call, int num_threads);

}  // namespace fastlm::cpu
