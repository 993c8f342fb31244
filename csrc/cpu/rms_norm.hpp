// Root-mean-square normalisation with the residual addition before it, and its gradients.
#pragma once

#include <cstdint>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

// Rows of `hidden_size` contiguous elements; inputs' rows `stride` elements apart, outputs' one after another.
template <class T>
struct RMSNormForward {
    const T *x, *residual;  // residual may be null, and h then is not written
    const float* weight;    // with its offset added
    int64_t rows, hidden_size, x_stride, residual_stride;
    float eps;
    T *y, *h;
    float* rstd;
};

template <class T>
struct RMSNormBackward {
    const T *grad_y, *grad_h, *h;  // grad_h may be null
    const float *weight, *rstd;
    int64_t rows, hidden_size, grad_y_stride, grad_h_stride, h_stride;
    T* grad_x;
    float* partial;  // (rms_norm_partials(rows), hidden_size): sums to the weight's gradient
};

// Partial sums of the weight's gradient: a number that depends on the rows alone, so that its bits do not depend on the
// number of threads.
int64_t rms_norm_partials(int64_t rows);

template <class T>
void rms_norm_forward(const RMSNormForward<T>& call, int num_threads);
template <class T>
void rms_norm_backward(const RMSNormBackward<T>& call, int num_threads);

}  // namespace fastlm::cpu
