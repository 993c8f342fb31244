// Attention of whole sequences with its gradients: what training and the reading of prompts call.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

// Rows of contiguous elements, `stride` elements apart.
template <class T>
struct Rows {
    T* data;
    int64_t stride;

    T* operator[](int64_t row) const { return data + row * stride; }
    Rows from(int64_t row) const { return {data + row * stride, stride}; }
};

// (batch, seq, heads, head_dim), the last contiguous; strides of the others, in elements.
template <class T>
struct Heads {
    T* data;
    int64_t batch_stride, seq_stride, head_stride;

    Rows<T> rows(int64_t batch, int64_t head) const {
        return {data + batch * batch_stride + head * head_stride, seq_stride};
    }
};

// Query i stands at key position i + seq_k - seq_q. It sees the keys up to there when `causal`, all otherwise, and of
// them the last `window` when that is positive.
struct AttentionShape {
    int64_t batch, seq_q, seq_k, heads, kv_heads, head_dim;
    bool causal;
    int64_t window;
    float scale;
};

template <class T>
struct AttentionForward {
    AttentionShape shape;
    Heads<const T> q, k, v;
    Heads<T> out;
    float* lse;  // of query i of a head at batch * lse_batch_stride + head * lse_head_stride + i
    int64_t lse_batch_stride, lse_head_stride;
};

template <class T>
struct AttentionBackward {
    AttentionShape shape;
    Heads<const T> q, k, v, out, grad_out;
    const float *lse, *grad_lse;  // strides as forward; grad_lse may be null
    int64_t lse_batch_stride, lse_head_stride;
    Heads<T> grad_q, grad_k, grad_v;
};

template <class T>
void attention_forward(const AttentionForward<T>& call, int num_threads);
template <class T>
void attention_backward(const AttentionBackward<T>& call, int num_threads);

// A sequence among those that lie one after another in a batch of one: its first query and key, and how many it has.
struct Sequence {
    int64_t first_q, seq_q, first_k, seq_k;
};

// Each sequence by itself. What belongs to a sequence without queries or without keys is left as it is.
template <class T>
void attention_forward(const AttentionForward<T>& call, const std::vector<Sequence>& sequences, int num_threads);
template <class T>
void attention_backward(const AttentionBackward<T>& call, const std::vector<Sequence>& sequences, int num_threads);

}  // namespace fastlm::cpu
