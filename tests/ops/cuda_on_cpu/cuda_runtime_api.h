// Stands in for CUDA's headers, so that a kernel's own source compiles for the CPU: what the kernels use, and no more.
// `machine.cpp` runs a launch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// Static shared memory lies in one section, which the machine fills with NaN before each block.
#define __shared__ static __attribute__((section("cuda_shared")))
#define __CUDA_ARCH_LIST__ 0
#define CUDART_VERSION 0

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};

using cudaError_t = int;
using cudaStream_t = struct Stream*;
enum { cudaSuccess = 0, cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus*, unsigned long long*) {
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int) {
    return cudaSuccess;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

// Runs the blocks one after another, the threads of each by turns; in an order drawn anew for each launch.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// Ends the process with what the kernel did wrong.
[[noreturn]] void fail(const char* what);

void wait_for_block();

// Hands `mine` to the warp's other lanes, once all have come, and returns what each handed in. Valid until the lane's
// second call from here.
const void* exchange(const void* mine, size_t bytes);

constexpr size_t kLaneBytes = 64;

template <class T>
T of_lane(const void* all, int lane) {
    T value;
    std::memcpy(&value, static_cast<const char*>(all) + lane * kLaneBytes, sizeof(T));
    return value;
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

template <class T, class Take>
T reduced(T mine, Take take) {
    const void* all = exchange(&mine, sizeof(T));
    T result = of_lane<T>(all, 0);
    for (int i = 1; i < 32; ++i) result = take(result, of_lane<T>(all, i));
    return result;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait_for_block(); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned, T mine, int lane) {
    return cuda_on_cpu::of_lane<T>(cuda_on_cpu::exchange(&mine, sizeof(T)), lane % 32);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T mine, int distance) {
    return __shfl_sync(mask, mine, cuda_on_cpu::lane() ^ distance);
}
template <class T>
T __shfl_up_sync(unsigned mask, T mine, int distance) {
    const int lane = cuda_on_cpu::lane();
    return __shfl_sync(mask, mine, lane >= distance ? lane - distance : lane);
}
inline bool __any_sync(unsigned, bool mine) {
    return cuda_on_cpu::reduced(mine, [](bool a, bool b) { return a || b; });
}
inline int __reduce_add_sync(unsigned, int mine) {
    return cuda_on_cpu::reduced(mine, [](int a, int b) { return a + b; });
}
inline int __reduce_max_sync(unsigned, int mine) {
    return cuda_on_cpu::reduced(mine, [](int a, int b) { return a > b ? a : b; });
}
inline int __reduce_min_sync(unsigned, int mine) {
    return cuda_on_cpu::reduced(mine, [](int a, int b) { return a < b ? a : b; });
}

inline unsigned atomicInc(unsigned* at, unsigned last) {
    const unsigned old = *at;
    *at = old >= last ? 0 : old + 1;
    return old;
}
template <class T>
T __ldcg(const T* at) {
    return *at;
}
inline int __float_as_int(float x) {
    int bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __int_as_float(int bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
