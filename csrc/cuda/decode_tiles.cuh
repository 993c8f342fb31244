// The products of decode attention, for a block of four warps and a tile of tokens in shared memory: `logits` makes
// those of all rows, a warp taking some of the tokens or of the rows; `accumulate` takes them into an online softmax
// (arXiv 1805.02867, base 2) and adds the values. A row's result does not depend on the other rows of its tile.
#pragma once

#include "cuda/device.hpp"

namespace fastlm::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void from_float(float x, float& y) { y = x; }
__device__ inline void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, __half& y) { y = __float2half_rn(x); }

template <class T>
__device__ inline uint32_t packed(float2 x) {
    union {
        T items[2];
        uint32_t bits;
    } pair{};
    from_float(x.x, pair.items[0]);
    from_float(x.y, pair.items[1]);
    return pair.bits;
}

__device__ inline float warp_max(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
    return x;
}

__device__ inline float warp_sum(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

// What is subtracted in the exponent; a row that has seen nothing keeps weights of 0.
__device__ inline float reference_of(float highest) { return highest == -INFINITY ? 0.0f : highest; }

// bf16 and fp16 on tensor cores, rows in groups of 16, kGroups of them at most. A warp makes the logits of a quarter of
// the tokens, then the outputs of a quarter of the dimensions, for which all warps work out the same softmax.
template <class T, int kHeadDim, int kGroups>
struct TensorCoreTile {
    using Element = T;
    static constexpr int kDim = kHeadDim;
    static constexpr int kRows = 16 * kGroups;
    static constexpr int kTokens = kHeadDim <= 128 ? 64 : 32;
    static constexpr int kStride = kHeadDim + 8;  // elements: eight rows of 16 bytes lie in different banks
    static constexpr int kLogitStride = kTokens + 8;
    static constexpr int kTokenTiles = kTokens / kWarps / 8;  // of a warp
    static constexpr int kDimTiles = kHeadDim / kWarps / 8;

    float acc[kGroups][kDimTiles][4] = {};  // rows lane / 4 and 8 more, dimensions 2 · (lane % 4) and the next
    float highest[kGroups][2], total[kGroups][2] = {};

    __device__ TensorCoreTile() {
        for (auto& group : highest) group[0] = group[1] = -INFINITY;
    }

    template <class Finish>
    __device__ void logits(const T* q, const T* keys, float* out, int rows, Finish finish) const {
        const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * (kTokens / kWarps);
        float dots[kGroups][kTokenTiles][4] = {};
#pragma unroll
        for (int dim = 0; dim < kHeadDim; dim += 32) {
            uint32_t b[kTokenTiles][4];
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
                load_matrices(b[n], keys + (first + 8 * n + lane % 8) * kStride + dim + lane / 8 * 8);
            }
#pragma unroll
            for (int m = 0; m < kGroups; ++m) {
                if (16 * m >= rows) break;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t a[4];
                    load_matrices(a, q + (16 * m + lane % 16) * kStride + dim + 16 * half + lane / 16 * 8);
#pragma unroll
                    for (int n = 0; n < kTokenTiles; ++n) multiply<T>(dots[m][n], a, b[n][2 * half], b[n][2 * half + 1]);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < kGroups; ++m) {
            if (16 * m >= rows) break;
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = 16 * m + 8 * half + lane / 4, token = first + 8 * n + lane % 4 * 2;
                    float2* at = reinterpret_cast<float2*>(out + row * kLogitStride + token);
                    *at = {finish(row, token, dots[m][n][2 * half]), finish(row, token + 1, dots[m][n][2 * half + 1])};
                }
            }
        }
    }

    __device__ void accumulate(const float* logits, const T* values, int rows) {
        const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * (kHeadDim / kWarps);
        constexpr int kSteps = kTokens / 16;
#pragma unroll
        for (int m = 0; m < kGroups; ++m) {
            if (16 * m >= rows) break;
            float2 x[kSteps][2][2];  // [][rows, as acc's][tokens 2 · (lane % 4) of 16, and 8 more]
#pragma unroll
            for (int i = 0; i < 4 * kSteps; ++i) {
                const float* row = logits + (16 * m + 8 * (i / 2 % 2) + lane / 4) * kLogitStride;
                x[i / 4][i / 2 % 2][i % 2] =
                    *reinterpret_cast<const float2*>(row + i / 4 * 16 + i % 2 * 8 + lane % 4 * 2);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float now = highest[m][half];
#pragma unroll
                for (int i = 0; i < 2 * kSteps; ++i) {
                    now = fmaxf(now, fmaxf(x[i / 2][half][i % 2].x, x[i / 2][half][i % 2].y));
                }
                now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 1));
                now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 2));
                const float subtract = reference_of(now), decay = exp2f(highest[m][half] - subtract);
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < 2 * kSteps; ++i) {
                    float2& pair = x[i / 2][half][i % 2];
                    pair = {exp2f(pair.x - subtract), exp2f(pair.y - subtract)};
                    sum += pair.x + pair.y;
                }
                highest[m][half] = now;
                total[m][half] = total[m][half] * decay + sum;  // of this lane's tokens; `each` adds the others'
#pragma unroll
                for (int n = 0; n < kDimTiles; ++n) {
                    acc[m][n][2 * half] *= decay;
                    acc[m][n][2 * half + 1] *= decay;
                }
            }
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const uint32_t a[4] = {packed<T>(x[step][0][0]), packed<T>(x[step][1][0]), packed<T>(x[step][0][1]),
                                       packed<T>(x[step][1][1])};
#pragma unroll
                for (int n = 0; n < kDimTiles; n += 2) {
                    uint32_t b[4];
                    load_matrices_transposed(
                        b, values + (16 * step + lane % 16) * kStride + first + 8 * n + lane / 16 * 8);
                    multiply<T>(acc[m][n], a, b[0], b[1]);
                    multiply<T>(acc[m][n + 1], a, b[2], b[3]);
                }
            }
        }
    }

    // take(row, dimension, its output and the next's, highest logit, sum of weights), by whichever thread holds them.
    template <class Take>
    __device__ void each(int rows, Take take) const {
        const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * (kHeadDim / kWarps);
#pragma unroll
        for (int m = 0; m < kGroups; ++m) {
            if (16 * m >= rows) break;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float sum = total[m][half];
                sum += __shfl_xor_sync(kAllLanes, sum, 1);
                sum += __shfl_xor_sync(kAllLanes, sum, 2);
                const int row = 16 * m + 8 * half + lane / 4;
#pragma unroll
                for (int n = 0; n < kDimTiles; ++n) {
                    const float2 pair = {acc[m][n][2 * half], acc[m][n][2 * half + 1]};
                    take(row, first + 8 * n + lane % 4 * 2, pair, highest[m][half], sum);
                }
            }
        }
    }
};

// fp32 by multiply-adds, a warp taking every fourth row: the logit of a token by one lane or, with long keys, two; then
// pairs of dimensions by each.
template <int kHeadDim>
struct Fp32Tile {
    using Element = float;
    static constexpr int kDim = kHeadDim;
    static constexpr int kRows = 16;
    static constexpr int kTokens = kHeadDim <= 128 ? 32 : 16;
    static constexpr int kStride = kHeadDim + 4;
    static constexpr int kLogitStride = kTokens;
    static constexpr int kWarpRows = kRows / kWarps;
    static constexpr int kPairs = kHeadDim / 64;
    static constexpr int kParts = 32 / kTokens;  // lanes of one token

    float2 acc[kWarpRows][kPairs] = {};  // dimensions 64 · i + 2 · lane and the next
    float highest[kWarpRows], total[kWarpRows] = {};

    __device__ Fp32Tile() {
        for (float& x : highest) x = -INFINITY;
    }

    template <class Finish>
    __device__ void logits(const float* q, const float* keys, float* out, int rows, Finish finish) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = lane % kTokens, part = lane / kTokens;
        float dots[kWarpRows] = {};
        constexpr int kPart = kHeadDim / kParts;
#pragma unroll 4
        for (int dim = part * kPart; dim < (part + 1) * kPart; dim += 4) {
            const float4 key = *reinterpret_cast<const float4*>(keys + token * kStride + dim);
#pragma unroll
            for (int i = 0; i < kWarpRows; ++i) {
                if (warp + kWarps * i >= rows) break;
                const float4 query = *reinterpret_cast<const float4*>(q + (warp + kWarps * i) * kStride + dim);
                dots[i] = fmaf(query.x, key.x, fmaf(query.y, key.y, fmaf(query.z, key.z, fmaf(query.w, key.w, dots[i]))));
            }
        }
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
            const int row = warp + kWarps * i;
            if (row >= rows) break;
            if (kParts == 2) dots[i] += __shfl_xor_sync(kAllLanes, dots[i], 16);
            if (part == 0) out[row * kLogitStride + token] = finish(row, token, dots[i]);
        }
    }

    __device__ void accumulate(const float* logits, const float* values, int rows) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        float weights[kWarpRows] = {};
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
            if (warp + kWarps * i >= rows) break;
            const float x = lane < kTokens ? logits[(warp + kWarps * i) * kLogitStride + lane] : -INFINITY;
            const float now = fmaxf(highest[i], warp_max(x)), subtract = reference_of(now);
            const float decay = exp2f(highest[i] - subtract);
            weights[i] = exp2f(x - subtract);
            highest[i] = now;
            total[i] = total[i] * decay + warp_sum(weights[i]);
#pragma unroll
            for (float2& pair : acc[i]) pair = {pair.x * decay, pair.y * decay};
        }
        for (int token = 0; token < kTokens; ++token) {
            float2 value[kPairs];
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
                value[pair] = *reinterpret_cast<const float2*>(values + token * kStride + 64 * pair + 2 * lane);
            }
#pragma unroll
            for (int i = 0; i < kWarpRows; ++i) {
                if (warp + kWarps * i >= rows) break;
                const float weight = __shfl_sync(kAllLanes, weights[i], token);
#pragma unroll
                for (int pair = 0; pair < kPairs; ++pair) {
                    acc[i][pair].x = fmaf(weight, value[pair].x, acc[i][pair].x);
                    acc[i][pair].y = fmaf(weight, value[pair].y, acc[i][pair].y);
                }
            }
        }
    }

    template <class Take>
    __device__ void each(int rows, Take take) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
            if (warp + kWarps * i >= rows) break;
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
                take(warp + kWarps * i, 64 * pair + 2 * lane, acc[i][pair], highest[i], total[i]);
            }
        }
    }
};

}  // namespace fastlm::cuda
