// y = act(gate) · up, and its gradients.
#pragma once

#include <cstdint>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

// Rows of `columns` contiguous elements, the inputs' rows `stride` elements apart, the outputs' one after another.
template <class T>
struct SwiGLU {
    const T *gate, *up;
    int64_t rows, columns, gate_stride, up_stride;
    bool gelu;  // else SiLU
    T* y;       // forward's output
    const T* grad_y;  // backward's input
    int64_t grad_y_stride;
    T *grad_gate, *grad_up;  // backward's outputs
};

template <class T>
void swiglu_forward(const SwiGLU<T>& call, int num_threads);
template <class T>
void swiglu_backward(const SwiGLU<T>& call, int num_threads);

}  // namespace fastlm::cpu
