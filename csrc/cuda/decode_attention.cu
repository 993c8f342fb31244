// Flash-decoding in one launch. A block of four warps takes one split of one KV head of one sequence, as in
// fastlm/ops/decode_attention/triton.py; the last of a head's blocks to finish, told by a counter, combines the splits,
// always in their order. What decides the splits is the sequence's own length and window, so its bits do not depend on
// what shares the batch, nor on which block was last. atomicInc wraps to 0 at the last: the counters need no clearing.
//
// Keys and values come by cp.async, 16 bytes a thread, into two buffers of a tile each, keys apart from values: with
// tiles of 64 tokens all of a split of 128 is asked for at once. Block ids are looked up three tiles ahead.
//
// Bytes against products, for bf16, head_dim 128, on an H100 (3.35 TB/s, 132 SMs at 1.755 GHz: 14.5 bytes a cycle and
// SM). A token of a KV head is 512 bytes or 35 cycles. By multiply-adds, 128 a cycle, each row of the tile costs
// 2 · 128 / 128 = 2 of them, and as many again for moving operands and summing over lanes: 8 rows would fill the time.
// By mma.m16n8k16, about 2 cycles each, 16 tokens cost 32 of them or 64 cycles in 565, for 16 rows as for one. So
// bf16 and fp16 always use tensor cores, rows padded to 16. Shared memory carries each byte twice, in and out, and the
// tile of 16 queries once more in each warp: 36 bytes a cycle of 128. fp32 has twice the bytes and is left to multiply-adds.
#include "cuda/decode_attention.hpp"

#include <algorithm>
#include <atomic>

#include "cuda/decode_tiles.cuh"

namespace fastlm::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kOutside = -1;  // of a token's block: no query sees it, or the cache has no such block
constexpr int kUnknown = -2;
constexpr int kAhead = 3;  // tiles whose block ids are known

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Extent {
    int length, first;  // of the sequence; the first token that any query sees
    int size, first_split, splits;
    bool is_length;  // where it is not, it is taken as 0, and the result will be NaN
};

__device__ Extent extent_of(const DecodeAttention& call, int batch) {
    Extent e{};
    e.length = call.lengths[batch];
    e.is_length = e.length >= 0 && e.length <= static_cast<int64_t>(call.table_width) * call.block_size;
    if (!e.is_length) e.length = 0;
    int span = e.length;
    if (call.window > 0) {
        e.first = max(e.length - call.query_len - call.window + 1, 0);
        span = min(e.length, call.window + kMaxQueryLen - 1);  // not query_len: one query alone gives the same bits
    }
    const int part = static_cast<int>(ceil_div(span, kMaxSplits));
    e.size = max(static_cast<int>(ceil_div(part, kSplitMultiple)) * kSplitMultiple, kMinSplit);
    e.first_split = e.first / e.size;
    e.splits = static_cast<int>(ceil_div(e.length, e.size)) - e.first_split;
    return e;
}

// Where a token of a tile lies.
struct Place {
    int block, slot;
};

template <class Tile>
struct Shared {
    using Element = typename Tile::Element;
    alignas(16) Element q[Tile::kRows * Tile::kStride];
    union alignas(16) {
        Element keys[2][Tile::kTokens * Tile::kStride];
        float weights[Tile::kRows][kMaxSplits + 1];  // of the splits, when they are combined
    };
    alignas(16) Element values[2][Tile::kTokens * Tile::kStride];
    alignas(16) float logits[Tile::kRows * Tile::kLogitStride];
    Place places[kAhead + 1][Tile::kTokens];
    int positions[Tile::kRows];
    float shrink[Tile::kRows], divisor[Tile::kRows];
    bool is_last;
};

// The rows of one block: those queries of one sequence that share a KV head.
struct Rows {
    int batch, kv_head, first, count, group;

    __device__ int query(int row) const { return (first + row) / group; }
    __device__ int head(int row) const { return kv_head * group + (first + row) % group; }
};

template <class Tile>
__device__ void load_queries(const DecodeAttention& call, const Rows& rows, const Extent& extent, Shared<Tile>& shared) {
    using Element = typename Tile::Element;
    for (int row = threadIdx.x / 32; row < Tile::kRows; row += kWarps) {
        const bool is_row = row < rows.count;
        const Element* q = static_cast<const Element*>(call.q) + rows.batch * call.q_batch_stride;
        if (is_row) q += rows.query(row) * call.q_stride + rows.head(row) * call.q_head_stride;
        for (int dim = threadIdx.x % 32; dim < Tile::kDim; dim += 32) {
            Element x;
            from_float(0.0f, x);
            shared.q[row * Tile::kStride + dim] = is_row && dim < call.head_dim ? q[dim] : x;
        }
        if (threadIdx.x % 32 == 0) shared.positions[row] = extent.length - call.query_len + rows.query(row);
    }
}

// What a row's output is multiplied by, then divided by. A sink is a key whose value is zero.
template <class Element>
__device__ float2 ending(const DecodeAttention& call, int head, float highest, float total) {
    float shrink = 1.0f;
    if (call.sinks != nullptr) {
        const float logit = call.wide_sinks ? static_cast<const float*>(call.sinks)[head]
                                            : to_float(static_cast<const Element*>(call.sinks)[head]);
        const float sink = logit * kLog2E, subtract = reference_of(fmaxf(highest, sink));
        shrink = exp2f(highest - subtract);
        total = fmaf(total, shrink, exp2f(sink - subtract));
    }
    return {shrink, total == 0.0f ? 1.0f : total};
}

template <class Element>
__device__ void store(const DecodeAttention& call, const Rows& rows, int row, int dim, float x) {
    const int64_t at = (static_cast<int64_t>(rows.batch) * call.query_len + rows.query(row)) * call.heads + rows.head(row);
    from_float(x, static_cast<Element*>(call.out)[at * call.head_dim + dim]);
}

// Partial results: (batch, kv_heads, splits, rows of a KV head, head_dim) outputs, then as many maxima and sums.
struct Partials {
    float* outputs;
    float2* sums;
    int64_t rows, head_dim;

    __device__ Partials(const DecodeAttention& call, const Rows& of)
        : rows(static_cast<int64_t>(call.query_len) * of.group), head_dim(call.head_dim) {
        const int64_t all = static_cast<int64_t>(call.batch) * call.kv_heads * gridDim.y * rows;
        const int64_t first = (static_cast<int64_t>(of.batch) * call.kv_heads + of.kv_head) * gridDim.y * rows + of.first;
        outputs = call.partials + first * head_dim;
        sums = reinterpret_cast<float2*>(call.partials + all * head_dim) + first;
    }

    __device__ float* output(int split, int row) const { return outputs + (split * rows + row) * head_dim; }
    __device__ float2* sum(int split, int row) const { return sums + split * rows + row; }
};

template <class Tile>
__device__ void combine(const DecodeAttention& call, const Rows& rows, int splits, bool is_length,
                        const Partials& partials, Shared<Tile>& shared) {
    using Element = typename Tile::Element;
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < rows.count; row += kWarps) {
        float highest = -INFINITY, total = 0.0f;
        for (int split = lane; split < splits; split += 32) highest = fmaxf(highest, __ldcg(partials.sum(split, row)).x);
        highest = warp_max(highest);
        const float subtract = reference_of(highest);
        for (int split = lane; split < splits; split += 32) {
            const float2 its = __ldcg(partials.sum(split, row));
            const float weight = exp2f(its.x - subtract);
            shared.weights[row][split] = weight;
            total = fmaf(weight, its.y, total);
        }
        total = warp_sum(total);
        if (lane == 0) {
            const float2 end = ending<Element>(call, rows.head(row), highest, total);
            shared.shrink[row] = end.x, shared.divisor[row] = end.y;
        }
    }
    __syncthreads();
    const int quads = call.head_dim / 4;
    for (int i = threadIdx.x; i < rows.count * quads; i += kThreads) {
        const int row = i / quads, dim = i % quads * 4;
        float4 sum = {};
#pragma unroll 8
        for (int split = 0; split < splits; ++split) {
            const float4 its = __ldcg(reinterpret_cast<const float4*>(partials.output(split, row) + dim));
            const float weight = shared.weights[row][split];
            sum.x = fmaf(weight, its.x, sum.x), sum.y = fmaf(weight, its.y, sum.y);
            sum.z = fmaf(weight, its.z, sum.z), sum.w = fmaf(weight, its.w, sum.w);
        }
        const float shrink = shared.shrink[row], divisor = shared.divisor[row];
        const float outputs[4] = {sum.x, sum.y, sum.z, sum.w};
        for (int j = 0; j < 4; ++j) {
            store<Element>(call, rows, row, dim + j, is_length ? outputs[j] * shrink / divisor : NAN);
        }
    }
}

template <class Tile>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const DecodeAttention call) {
    using Element = typename Tile::Element;
    auto& shared = *reinterpret_cast<Shared<Tile>*>(dynamic_shared());
    Rows rows{};
    rows.group = call.heads / call.kv_heads;
    const int all_rows = call.query_len * rows.group, row_tiles = (all_rows + Tile::kRows - 1) / Tile::kRows;
    rows.first = static_cast<int>(blockIdx.x % row_tiles) * Tile::kRows;
    rows.count = min(all_rows - rows.first, Tile::kRows);
    rows.kv_head = static_cast<int>(blockIdx.x / row_tiles) % call.kv_heads;
    rows.batch = static_cast<int>(blockIdx.x / row_tiles) / call.kv_heads;
    const Extent extent = extent_of(call, rows.batch);
    const int split = static_cast<int>(blockIdx.y);
    if (split >= max(extent.splits, 1)) return;

    int start = (extent.first_split + split) * extent.size;
    const int end = min(start + extent.size, extent.length);
    start = max(start, extent.first / Tile::kTokens * Tile::kTokens);
    const int tiles = (end - start + Tile::kTokens - 1) / Tile::kTokens;
    const int32_t* table = call.table + rows.batch * call.table_stride;
    const auto find = [&](int token) -> Place {
        if (token < extent.first || token >= end) return {kOutside, 0};
        const int column = token / call.block_size, block = table[column];
        return {block >= 0 && block < call.blocks ? block : kUnknown, token - column * call.block_size};
    };
    // Every thread asks for some of the tile's 16-byte pieces; where there is nothing to read, they become zeros.
    const auto load = [&](const void* cache, int64_t block_stride, int64_t slot_stride, int64_t head_stride, int tile,
                          Element* to) {
        constexpr int kPiece = 16 / sizeof(Element), kPieces = Tile::kDim / kPiece;
        const Element* from = static_cast<const Element*>(cache) + rows.kv_head * head_stride;
        if (tile < tiles) {
#pragma unroll 4
            for (int i = threadIdx.x; i < Tile::kTokens * kPieces; i += kThreads) {
                const int token = i / kPieces, dim = i % kPieces * kPiece;
                const Place place = shared.places[tile % (kAhead + 1)][token];
                const bool wanted = place.block >= 0 && dim < call.head_dim;
                const Element* at = from + place.block * block_stride + place.slot * slot_stride + dim;
                copy_async(to + token * Tile::kStride + dim, wanted ? at : from, wanted);
            }
        }
        end_copies();
    };
    const auto load_keys = [&](int tile) {
        load(call.k, call.k_block_stride, call.k_slot_stride, call.k_head_stride, tile, shared.keys[tile % 2]);
    };
    const auto load_values = [&](int tile) {
        load(call.v, call.v_block_stride, call.v_slot_stride, call.v_head_stride, tile, shared.values[tile % 2]);
    };

    for (int i = threadIdx.x; i < kAhead * Tile::kTokens; i += kThreads) {
        shared.places[i / Tile::kTokens][i % Tile::kTokens] = find(start + i);
    }
    __syncthreads();
    load_keys(0), load_values(0), load_keys(1), load_values(1);
    load_queries<Tile>(call, rows, extent, shared);

    const float inner = call.softcap > 0 ? call.scale / call.softcap : 0.0f;
    const float factor = (call.softcap > 0 ? call.softcap : call.scale) * kLog2E;
    Tile tile;
    for (int i = 0; i < tiles; ++i) {
        const int first = start + i * Tile::kTokens;
        Place ahead{};
        if (threadIdx.x < Tile::kTokens) ahead = find(first + kAhead * Tile::kTokens + threadIdx.x);
        wait_for_copies<3>();  // all but this tile's values and the next one's keys and values
        __syncthreads();
        const Place* places = shared.places[i % (kAhead + 1)];
        tile.logits(shared.q, shared.keys[i % 2], shared.logits, rows.count, [&](int row, int token, float dot) {
            const int position = shared.positions[row], block = places[token].block, at = first + token;
            const bool seen = block != kOutside && at <= position && (call.window == 0 || at > position - call.window);
            if (!seen) return -INFINITY;
            if (block == kUnknown) return NAN;
            return (call.softcap > 0 ? tanhf(dot * inner) : dot) * factor;
        });
        wait_for_copies<2>();
        __syncthreads();
        load_keys(i + 2);
        tile.accumulate(shared.logits, shared.values[i % 2], rows.count);
        if (threadIdx.x < Tile::kTokens) shared.places[(i + kAhead) % (kAhead + 1)][threadIdx.x] = ahead;
        __syncthreads();
        load_values(i + 2);
    }

    if (extent.splits <= 1) {
        tile.each(rows.count, [&](int row, int dim, float2 output, float highest, float total) {
            if (row >= rows.count || dim >= call.head_dim) return;
            const float2 end = ending<Element>(call, rows.head(row), highest, total);
            store<Element>(call, rows, row, dim, extent.is_length ? output.x * end.x / end.y : NAN);
            store<Element>(call, rows, row, dim + 1, extent.is_length ? output.y * end.x / end.y : NAN);
        });
        return;
    }
    const Partials partials(call, rows);
    tile.each(rows.count, [&](int row, int dim, float2 output, float highest, float total) {
        if (row >= rows.count || dim >= call.head_dim) return;
        *reinterpret_cast<float2*>(partials.output(split, row) + dim) = output;
        if (dim == 0) *partials.sum(split, row) = {highest, total};
    });
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned last = static_cast<unsigned>(extent.splits - 1);
        shared.is_last = atomicInc(call.counters + blockIdx.x, last) == last;
    }
    __syncthreads();
    if (!shared.is_last) return;
    __threadfence();
    combine<Tile>(call, rows, extent.splits, extent.is_length, partials, shared);
}

int rows_of(const DecodeAttention& call) { return call.query_len * (call.heads / call.kv_heads); }

template <class Tile>
cudaError_t launch(const DecodeAttention& call, cudaStream_t stream) {
    constexpr int kBytes = sizeof(Shared<Tile>);
    static_assert(kBytes <= 99 * 1024, "sm_86, sm_89 and sm_120 have no more");
    static std::atomic<uint64_t> prepared = 0;  // a bit a device
    int device = 0;
    if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
    const uint64_t bit = uint64_t{1} << (device % 64);
    if (device >= 64 || !(prepared.load() & bit)) {
        const auto error =
            cudaFuncSetAttribute(decode_kernel<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
        if (error != cudaSuccess) return error;
        prepared |= bit;
    }
    const int64_t row_tiles = ceil_div(rows_of(call), Tile::kRows);
    const dim3 grid(static_cast<unsigned>(call.batch * call.kv_heads * row_tiles), static_cast<unsigned>(num_slots(call)));
    decode_kernel<Tile><<<grid, kThreads, kBytes, stream>>>(call);
    return cudaGetLastError();
}

template <class T, int kHeadDim>
cudaError_t launch_by_rows(const DecodeAttention& call, cudaStream_t stream) {
    if (rows_of(call) <= 16) return launch<TensorCoreTile<T, kHeadDim, 1>>(call, stream);
    return launch<TensorCoreTile<T, kHeadDim, 2>>(call, stream);
}

template <class T>
cudaError_t launch_by_head_dim(const DecodeAttention& call, cudaStream_t stream) {
    if constexpr (std::is_same_v<T, float>) {
        if (call.head_dim <= 64) return launch<Fp32Tile<64>>(call, stream);
        if (call.head_dim <= 128) return launch<Fp32Tile<128>>(call, stream);
        return launch<Fp32Tile<256>>(call, stream);
    } else {
        if (call.head_dim <= 64) return launch_by_rows<T, 64>(call, stream);
        if (call.head_dim <= 128) return launch_by_rows<T, 128>(call, stream);
        return launch_by_rows<T, 256>(call, stream);
    }
}

}  // namespace

int64_t num_slots(const DecodeAttention& call) {
    const int64_t most = ceil_div(static_cast<int64_t>(call.table_width) * call.block_size, kMinSplit);
    return std::max<int64_t>(std::min<int64_t>(most, kMaxSplits + (call.window > 0)), 1);
}

int64_t workspace_floats(const DecodeAttention& call) {
    const int64_t slots = num_slots(call);
    return slots == 1 ? 0 : call.batch * slots * call.query_len * call.heads * (call.head_dim + 2);
}

int64_t counters_of(const DecodeAttention& call) {
    return num_slots(call) == 1 ? 0 : call.batch * call.kv_heads * ceil_div(rows_of(call), kMinRows);
}

cudaError_t decode_attention(const DecodeAttention& call, DType dtype, cudaStream_t stream) {
    if (dtype == DType::float32) return launch_by_head_dim<float>(call, stream);
    if (dtype == DType::bfloat16) return launch_by_head_dim<__nv_bfloat16>(call, stream);
    return launch_by_head_dim<__half>(call, stream);
}

}  // namespace fastlm::cuda
