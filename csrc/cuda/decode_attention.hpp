// Attention of one or a few new tokens a sequence over a paged cache; fastlm/ops/decode_attention/__init__.py defines it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.hpp"

namespace fastlm::cuda {

constexpr int kMaxQueryLen = 8;
constexpr int kMinSplit = 128;    // tokens
constexpr int kMaxSplits = 64;    // of the tokens that a sequence's queries see, and one more where a window starts inside
constexpr int kSplitMultiple = 64;  // tokens: every tile divides it
constexpr int kMaxHeadDim = 256;
constexpr int kMinRows = 16;  // of a tile: query heads that share a KV head, times new tokens

// Device pointers. Strides are in elements; caches start, and their strides are multiples of, 16 bytes.
struct DecodeAttention {
    const void *q, *k, *v;  // (batch, query_len, heads, head_dim); (blocks, block_size, kv_heads, head_dim) twice
    const void* sinks;      // (heads), or null
    bool wide_sinks;        // fp32, not q's dtype
    const int32_t *table, *lengths;
    void* out;           // (batch, query_len, heads, head_dim)
    float* partials;     // where a row of the table holds several splits: workspace_floats(call)
    uint32_t* counters;  // and counters_of(call) zeros, which are zeros again afterwards
    int64_t q_batch_stride, q_stride, q_head_stride;
    int64_t k_block_stride, k_slot_stride, k_head_stride, v_block_stride, v_slot_stride, v_head_stride, table_stride;
    int batch, query_len, heads, kv_heads, head_dim, blocks, block_size, table_width, window;  // window 0: none
    float scale, softcap;                                                                      // softcap 0: none
};

// Splits of the longest sequence that the table allows.
int64_t num_slots(const DecodeAttention& call);

// Floats of `partials`, and counters; 0 where one split is all.
int64_t workspace_floats(const DecodeAttention& call);
int64_t counters_of(const DecodeAttention& call);

// Queues the one kernel on `stream` and returns without waiting for it.
cudaError_t decode_attention(const DecodeAttention& call, DType dtype, cudaStream_t stream);

}  // namespace fastlm::cuda
