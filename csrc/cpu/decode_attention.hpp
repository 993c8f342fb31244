// Attention of the last few tokens of each sequence over a paged cache of keys and values.
#pragma once

#include <cstdint>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

enum class FloatType { kFloat32, kBFloat16, kFloat16 };

struct DecodeShape {
    int64_t batch, query_len, heads, kv_heads, head_dim;
    int64_t blocks, block_size, max_blocks;
};

struct DecodeStrides {
    int64_t batch, seq, head;      // of q
    int64_t k_block, k_slot, k_head;  // of the caches; all in elements, the last dimension contiguous
    int64_t v_block, v_slot, v_head;
};

template <class C>  // the caches' elements
struct DecodeAttention {
    DecodeShape shape;
    DecodeStrides strides;
    FloatType type;  // of q and out
    const void* q;
    const C *k, *v;
    const int32_t *block_table, *context_lens;  // (batch, max_blocks) and (batch), contiguous and checked
    float scale;
    int64_t window;  // 0: none
    float softcap;   // 0: none
    void* out;       // (batch, query_len, heads, head_dim), contiguous
};

// The first token of a sequence of `length` that any of its queries sees.
inline int64_t first_visible(int64_t length, int64_t query_len, int64_t window) {
    const int64_t first = length - query_len - window + 1;
    return window && first > 0 ? first : 0;
}

// Throws std::invalid_argument unless each length fits its row of the table, and the blocks that will be read the cache.
void check_block_table(const DecodeShape& shape, const int32_t* table, const int32_t* lengths, int64_t window);

template <class C>
void decode_attention(const DecodeAttention<C>& call, int num_threads);

}  // namespace fastlm::cpu
