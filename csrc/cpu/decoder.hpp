// All layers of a transformer over the few new tokens of a decoding step, in one call.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

// Pools of the cache's blocks: of layers that keep all tokens, and of those that keep the tokens of a window.
constexpr int kPools = 2;

struct DecoderShape {
    int64_t hidden_size, heads, kv_heads, head_dim, intermediate_size;
    std::array<int64_t, kPools> blocks;
    int64_t block_size;
    float eps, scale, softcap;  // softcap 0: none
    bool gelu;                  // else SiLU
};

// Rows of weights, `stride` bytes apart: blocks of a format of `quantized_linear`, or elements where that is empty.
struct Projection {
    std::string quantization;
    const void* weight;
    int64_t out_features, in_features, stride;
    const float* bias;  // may be null
};

// Norms hold their weights with the offset added, or are null where the layer has none. C: the cache's elements.
template <class C>
struct DecoderLayer {
    const float *input_norm, *q_norm, *k_norm, *attention_norm, *mlp_norm, *output_norm;
    Projection q, k, v, o, gate, up, down;
    int64_t window;   // 0: none
    int64_t table;    // which of the step's rotary tables; -1: no rotation
    int pool;         // whose blocks these are:
    C *keys, *values;  // (blocks, block_size, kv_heads, head_dim), contiguous
};

// `size` sequences of `query_len` new tokens each, whose rows follow each other from `first_row` on.
struct DecoderGroup {
    int64_t first_row, size, query_len, max_blocks;
    std::array<const int32_t*, kPools> block_tables;
    const int32_t* context_lens;
};

struct RotaryTable {
    const float *cos, *sin;  // (positions, head_dim / 2)
};

// Everything checked by the caller.
template <class T>
struct DecoderStep {
    int64_t rows;
    const T* hidden;           // (rows, hidden_size): the embedded tokens
    const int64_t* positions;  // (rows)
    std::array<const int64_t*, kPools> slots;  // (rows): block · block_size + place
    std::vector<DecoderGroup> groups;
    std::vector<RotaryTable> tables;
    T* out;  // (rows, hidden_size): hidden states, after the last norm
};

template <class T, class C>
struct Decoder {
    DecoderShape shape;
    std::vector<DecoderLayer<C>> layers;
    const float* norm;

    void run(const DecoderStep<T>& step, int num_threads) const;
};

}  // namespace fastlm::cpu
