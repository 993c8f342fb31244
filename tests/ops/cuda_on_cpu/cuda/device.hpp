// csrc/cuda/device.hpp for the CPU. A copy arrives no sooner than it is waited for, and its place holds NaN until then.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace cuda_on_cpu {

unsigned char* dynamic_shared();
void copy_async(void* to, const void* from, bool wanted);
void end_copies();
void wait_for_copies(int running);

inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float widened(__half x) { return __half2float(x); }

}  // namespace cuda_on_cpu

namespace fastlm::cuda {

using cuda_on_cpu::copy_async;
using cuda_on_cpu::dynamic_shared;
using cuda_on_cpu::end_copies;

template <int kRunning>
void wait_for_copies() {
    cuda_on_cpu::wait_for_copies(kRunning);
}

// Row r of matrix m is eight elements from the address of lane 8 m + r.
inline void load_matrices(uint32_t (&x)[4], const void* shared, bool transposed = false) {
    if (reinterpret_cast<uintptr_t>(shared) % 16) cuda_on_cpu::fail("a row of a matrix is not aligned to 16 bytes");
    const void* all = cuda_on_cpu::exchange(&shared, sizeof(shared));
    const int lane = cuda_on_cpu::lane();
    for (int m = 0; m < 4; ++m) {
        uint32_t pair = 0;
        for (int i = 0; i < 2; ++i) {
            const int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
            uint16_t element;
            std::memcpy(&element, cuda_on_cpu::of_lane<const uint16_t*>(all, 8 * m + row) + column, 2);
            pair |= uint32_t{element} << 16 * i;
        }
        x[m] = pair;
    }
    cuda_on_cpu::exchange(nullptr, 0);  // on a chip a warp reads together: nobody writes before all have read
}

inline void load_matrices_transposed(uint32_t (&x)[4], const void* shared) { load_matrices(x, shared, true); }

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct {
        T a[4][2], b[2][2];
    } mine;
    static_assert(sizeof(mine) == 24);
    std::memcpy(mine.a, a, 16), std::memcpy(mine.b[0], &b0, 4), std::memcpy(mine.b[1], &b1, 4);
    const void* all = cuda_on_cpu::exchange(&mine, sizeof(mine));
    const int lane = cuda_on_cpu::lane();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        float sum = c[i];
        for (int k = 0; k < 16; ++k) {
            // a: [column half · 2 + row half][pair] of lane 4 · (row % 8) + k % 8 / 2; b alike, its rows being k.
            const auto left = cuda_on_cpu::of_lane<decltype(mine)>(all, row % 8 * 4 + k % 8 / 2);
            const auto right = cuda_on_cpu::of_lane<decltype(mine)>(all, column * 4 + k % 8 / 2);
            sum = std::fma(cuda_on_cpu::widened(left.a[k / 8 * 2 + row / 8][k % 2]),
                           cuda_on_cpu::widened(right.b[k / 8][k % 2]), sum);
        }
        c[i] = sum;
    }
}

}  // namespace fastlm::cuda
