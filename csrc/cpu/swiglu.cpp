// One pass over memory, in stretches of a row. Both activations are g · sigmoid(w): w = g for SiLU, and for GELU's tanh
// form 0.5 · (1 + tanh(u)) = sigmoid(2u).
#include "cpu/swiglu.hpp"

#include <algorithm>

#include "cpu/parallel.hpp"

namespace fastlm::cpu {
namespace {

constexpr int64_t kStretch = 4096;  // elements that one step of a thread takes
constexpr int64_t kPart = 65536;    // elements that a thread takes at a time: some 25 µs, thrice what waking it costs

int64_t stretches(int64_t columns) { return (columns + kStretch - 1) / kStretch; }

int64_t part(int64_t columns) { return items_of(std::min(columns, kStretch), kPart); }

template <bool kGelu>
FASTLM_INLINE Floats inner(Floats g) {
    if constexpr (kGelu) return 1.59576912f * (g + 0.044715f * g * g * g);  // 2 · sqrt(2 / pi)
    return g;
}

template <class T, bool kGelu>
FASTLM_INLINE void forward_stretch(const T* gate, const T* up, T* y, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const Floats g = load_up_to(gate + i, n - i);
        store_up_to(y + i, n - i, g * sigmoid(inner<kGelu>(g)) * load_up_to(up + i, n - i));
    }
}

template <class T, bool kGelu>
FASTLM_INLINE void backward_stretch(const T* grad_y, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const Floats g = load_up_to(gate + i, n - i), grad = load_up_to(grad_y + i, n - i);
        const Floats s = sigmoid(inner<kGelu>(g)), activated = g * s;
        Floats slope = broadcast(1.0f);
        if constexpr (kGelu) slope = 1.59576912f * (1.0f + 0.134145f * g * g);
        const Floats derivative = s + activated * (1.0f - s) * slope;
        store_up_to(grad_gate + i, n - i, grad * load_up_to(up + i, n - i) * derivative);
        store_up_to(grad_up + i, n - i, grad * activated);
    }
}

struct Forward {
    template <class T>
    static FASTLM_INLINE void run(const SwiGLU<T>& call, int64_t begin, int64_t end) {
        const int64_t per_row = stretches(call.columns);
        for (int64_t s = begin; s < end; ++s) {
            const int64_t row = s / per_row, first = s % per_row * kStretch;
            const int64_t n = std::min(kStretch, call.columns - first);
            const T* gate = call.gate + row * call.gate_stride + first;
            const T* up = call.up + row * call.up_stride + first;
            T* y = call.y + row * call.columns + first;
            call.gelu ? forward_stretch<T, true>(gate, up, y, n) : forward_stretch<T, false>(gate, up, y, n);
        }
    }
};

struct Backward {
    template <class T>
    static FASTLM_INLINE void run(const SwiGLU<T>& call, int64_t begin, int64_t end) {
        const int64_t per_row = stretches(call.columns);
        for (int64_t s = begin; s < end; ++s) {
            const int64_t row = s / per_row, first = s % per_row * kStretch, out = row * call.columns + first;
            const int64_t n = std::min(kStretch, call.columns - first);
            const T* grad_y = call.grad_y + row * call.grad_y_stride + first;
            const T* gate = call.gate + row * call.gate_stride + first;
            const T* up = call.up + row * call.up_stride + first;
            T *grad_gate = call.grad_gate + out, *grad_up = call.grad_up + out;
            call.gelu ? backward_stretch<T, true>(grad_y, gate, up, grad_gate, grad_up, n)
                      : backward_stretch<T, false>(grad_y, gate, up, grad_gate, grad_up, n);
        }
    }
};

}  // namespace

template <class T>
void swiglu_forward(const SwiGLU<T>& call, int num_threads) {
    run_parallel<Forward>(call, call.rows * stretches(call.columns), part(call.columns), num_threads);
}

template <class T>
void swiglu_backward(const SwiGLU<T>& call, int num_threads) {
    run_parallel<Backward>(call, call.rows * stretches(call.columns), part(call.columns), num_threads);
}

template void swiglu_forward(const SwiGLU<float>&, int);
template void swiglu_forward(const SwiGLU<BFloat16>&, int);
template void swiglu_backward(const SwiGLU<float>&, int);
template void swiglu_backward(const SwiGLU<BFloat16>&, int);

}  // namespace fastlm::cpu
