// Temperature and draw, one block a row. Three passes over the row: its maximum; the sum of its weights, tile by tile;
// and again tile by tile, up to the one in which the running sum exceeds u · that sum. The second and the third read a
// row of 128k bf16 logits (256 KB) from L2. Tiles are scanned in fp64 in the order of ids, and both passes add the same
// numbers in the same order, so a row's token depends on the row alone.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/sampling.hpp"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 4;  // neighbouring logits of one thread
constexpr int kTile = kThreads * kItems;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

// u in [0, 1) with 53 random bits: Philox4x32-10 (Salmon et al. 2011).
__device__ double uniform(uint64_t seed, uint64_t position) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ key0, c1 = low1, c2 = high0 ^ c3 ^ key1, c3 = low0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return static_cast<double>((static_cast<uint64_t>(c0) << 21) | (c1 >> 11)) * 0x1p-53;
}

// The largest value of all threads, in every thread.
template <class Value>
__device__ Value block_max(Value value, Value* shared) {
    for (int distance = 16; distance > 0; distance /= 2) {
        value = max(value, __shfl_xor_sync(~0u, value, distance));
    }
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[0];
    for (int warp = 1; warp < kWarps; ++warp) value = max(value, shared[warp]);
    __syncthreads();
    return value;
}

// The sum over the threads before this one; `total` becomes that over all.
__device__ double block_scan(double value, double* shared, double& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double inclusive = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const double other = __shfl_up_sync(~0u, inclusive, distance);
        if (lane >= distance) inclusive += other;
    }
    if (lane == 31) shared[warp] = inclusive;
    __syncthreads();
    double before = 0.0;
    total = 0.0;
    for (int w = 0; w < kWarps; ++w) {
        if (w == warp) before = total;
        total += shared[w];
    }
    __syncthreads();
    return before + (inclusive - value);
}

template <class T>
__global__ void __launch_bounds__(kThreads) sample_kernel(const Sampling call) {
    __shared__ double sums[kWarps];
    __shared__ float maxima[kWarps];
    __shared__ int64_t ids[kWarps];
    const int64_t row = blockIdx.x, vocab_size = call.vocab_size;
    const T* logits = static_cast<const T*>(call.logits) + row * call.stride;

    float largest = -INFINITY;
    bool has_nan = false;
    for (int64_t i = threadIdx.x; i < vocab_size; i += kThreads) {
        const float x = to_float(logits[i]);
        has_nan |= isnan(x);
        largest = fmaxf(largest, x);
    }
    largest = block_max(largest, maxima);
    const float temperature = call.temperature[row];
    const bool valid = !__syncthreads_or(has_nan) && isfinite(largest) && temperature >= 0 && isfinite(temperature);
    if (!valid) {
        if (threadIdx.x == 0) {
            call.valid[row] = false, call.ids[row] = 0;
            if (call.logprobs) call.logprobs[row] = call.processed_logprobs[row] = NAN;
        }
        return;
    }

    const bool greedy = temperature == 0;
    double raw_total = 0.0, total = 0.0;
    for (int64_t start = 0; start < vocab_size; start += kTile) {
        double raw = 0.0, weight = 0.0, tile;
        for (int item = 0; item < kItems; ++item) {
            const int64_t i = start + threadIdx.x * kItems + item;
            if (i >= vocab_size) break;
            const float x = to_float(logits[i]) - largest;
            if (call.logprobs) raw += expf(x);
            if (!greedy) weight += expf(x / temperature);
        }
        if (call.logprobs) block_scan(raw, sums, tile), raw_total += tile;
        if (!greedy) block_scan(weight, sums, tile), total += tile;
    }

    // The lowest id that qualifies, as the largest of negated ids; -vocab_size stands for none.
    int64_t drawn = -vocab_size, last = -vocab_size;
    if (greedy) {
        for (int64_t i = threadIdx.x; i < vocab_size && drawn == -vocab_size; i += kThreads) {
            if (to_float(logits[i]) == largest) drawn = -i;
        }
        drawn = block_max(drawn, ids);
    } else {
        const double target = uniform(call.seed[row], call.position[row]) * total;
        double before = 0.0;
        for (int64_t start = 0; start < vocab_size; start += kTile) {
            double weights[kItems] = {}, weight = 0.0, tile;
            for (int item = 0; item < kItems; ++item) {
                const int64_t i = start + threadIdx.x * kItems + item;
                if (i >= vocab_size) break;
                weights[item] = expf((to_float(logits[i]) - largest) / temperature);
                weight += weights[item];
                if (weights[item] > 0) last = i;
            }
            double running = before + block_scan(weight, sums, tile);
            for (int item = 0; item < kItems && drawn == -vocab_size; ++item) {
                running += weights[item];
                if (weights[item] > 0 && running > target) drawn = -(start + threadIdx.x * kItems + item);
            }
            drawn = block_max(drawn, ids);
            if (drawn != -vocab_size) break;
            before += tile;
        }
        // Rounding may leave the target above the last sum: then it is the last token whose weight is not zero.
        if (drawn == -vocab_size) drawn = -block_max(last, ids);
    }
    if (threadIdx.x == 0) {
        const int64_t id = -drawn;
        call.valid[row] = true, call.ids[row] = id;
        if (call.logprobs) {
            const double x = static_cast<double>(to_float(logits[id])) - largest;
            call.logprobs[row] = static_cast<float>(x - log(raw_total));
            call.processed_logprobs[row] = greedy ? 0.0f : static_cast<float>(x / temperature - log(total));
        }
    }
}

}  // namespace

cudaError_t sample(const Sampling& call, DType dtype, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(call.rows));
    if (dtype == DType::float32) sample_kernel<float><<<grid, kThreads, 0, stream>>>(call);
    if (dtype == DType::bfloat16) sample_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(call);
    if (dtype == DType::float16) sample_kernel<__half><<<grid, kThreads, 0, stream>>>(call);
    return cudaGetLastError();
}

}  // namespace fastlm::cuda
