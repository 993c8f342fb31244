// Flash-decoding (Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html): keys and values are read
// from memory once, for all query heads that share them and all queries of a sequence. A task is 256 tokens of one
// sequence's KV head, cut at multiples of 256, whatever the batch and the threads; its result is a maximum, a sum and a
// weighted sum of values for each row (query, head). A second pass combines them in order. Within a task tiles of 16
// tokens go through the online softmax. What limits is reading the cache; tiles are fetched two ahead.
//
// A row's arithmetic is the same whatever other rows and sequences there are: tiles that it does not see leave its
// maximum, sum and values as they are, bit for bit.
#include "cpu/decode_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/shuffle.hpp"
#include "cpu/threads.hpp"

namespace fastlm::cpu {
namespace {

constexpr int64_t kSplit = 256;                // tokens of a task: 64 KB of a head of 64 in bf16, 6 µs at 10 GB/s
constexpr int64_t kTile = kLanes;              // tokens of one step of the online softmax
constexpr int64_t kBytesForThreads = 1 << 17;  // of keys and values, below which waking a thread takes longer
constexpr float kNone = -std::numeric_limits<float>::infinity();

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t EightInts __attribute__((vector_size(32)));

template <class Half, class V>
FASTLM_INLINE Half fold(const V& v) {
    Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return low + high;
}

// to[i] = the sum of v[i]'s elements, i < 4.
FASTLM_INLINE void sums_of_four(const Floats* v, float* to) {
    Eight a[4], b[2];
    for (int i = 0; i < 4; ++i) a[i] = fold<Eight>(v[i]);
    for (int i = 0; i < 2; ++i) {
        b[i] = FASTLM_SHUFFLE(EightInts, a[2 * i], a[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
               FASTLM_SHUFFLE(EightInts, a[2 * i], a[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    const Eight c = FASTLM_SHUFFLE(EightInts, b[0], b[1], 0, 1, 8, 9, 4, 5, 12, 13) +
                    FASTLM_SHUFFLE(EightInts, b[0], b[1], 2, 3, 10, 11, 6, 7, 14, 15);
    const Four four = fold<Four>(c);
    std::memcpy(to, &four, sizeof four);
}

struct Task {
    int64_t batch, kv_head, split;
    float* partial;  // (rows, padded head_dim) values, then a maximum and a sum a row
};

template <class C>
struct Work {
    const DecodeAttention<C>* call;
    const Task* tasks;
    int64_t rows;        // of a task: queries times the query heads of a KV head
    int64_t padded_dim;  // head_dim rounded up to whole vectors

    int64_t group() const { return call->shape.heads / call->shape.kv_heads; }
    int64_t partial_size() const { return rows * (padded_dim + 2); }
    float* maximum(const Task& task) const { return task.partial + rows * padded_dim; }
    float* sum(const Task& task) const { return maximum(task) + rows; }
};

FASTLM_INLINE Floats load_from(FloatType type, const void* p, int64_t at, int64_t left) {
    if (type == FloatType::kFloat32) return load_up_to(static_cast<const float*>(p) + at, left);
    if (type == FloatType::kBFloat16) return load_up_to(static_cast<const BFloat16*>(p) + at, left);
    return load_up_to(static_cast<const Float16*>(p) + at, left);
}

FASTLM_INLINE void store_to(FloatType type, void* p, int64_t at, int64_t left, const Floats& v) {
    if (type == FloatType::kFloat32) return store_up_to(static_cast<float*>(p) + at, left, v);
    if (type == FloatType::kBFloat16) return store_up_to(static_cast<BFloat16*>(p) + at, left, v);
    return store_up_to(static_cast<Float16*>(p) + at, left, v);
}

// scores[row][token] = q[row] · k[token] of kRows rows and a tile of tokens.
template <int kRows, class C>
FASTLM_INLINE void dot_products(const float* q, int64_t padded_dim, const C* k, const int64_t* offsets, int64_t head_dim,
                                float (*scores)[kTile]) {
    for (int token = 0; token < kTile; token += 4) {
        Floats sums[kRows][4] = {};
        const C* at[4];
        for (int t = 0; t < 4; ++t) at[t] = k + offsets[token + t];
        const auto add = [&](int64_t i, const Floats* keys) __attribute__((always_inline)) {
            for (int row = 0; row < kRows; ++row) {
                const Floats query = load(q + row * padded_dim + i);
                for (int t = 0; t < 4; ++t) sums[row][t] += query * keys[t];
            }
        };
        int64_t i = 0;
        for (; i + kLanes <= head_dim; i += kLanes) {
            const Floats keys[4] = {load(at[0] + i), load(at[1] + i), load(at[2] + i), load(at[3] + i)};
            add(i, keys);
        }
        if (i < head_dim) {
            Floats keys[4];
            for (int t = 0; t < 4; ++t) keys[t] = load_first(at[t] + i, head_dim - i, 0.0f);
            add(i, keys);
        }
        for (int row = 0; row < kRows; ++row) sums_of_four(sums[row], &scores[row][token]);
    }
}

// values[row] = values[row] · factor[row] + Σ weights[row][token] · v[token], over kVectors vectors of the head.
template <int kRows, int kVectors, class C>
FASTLM_INLINE void add_values(float* values, int64_t padded_dim, const float* factor, const float (*weights)[kTile],
                              const C* v, const int64_t* offsets, int64_t left) {
    Floats sums[kRows][kVectors];
    for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kVectors; ++i) sums[row][i] = load(values + row * padded_dim + i * kLanes) * factor[row];
    }
    for (int token = 0; token < kTile; ++token) {
        const C* at = v + offsets[token];
        Floats value[kVectors];
        for (int i = 0; i < kVectors; ++i) {
            value[i] = kVectors > 1 ? load(at + i * kLanes) : load_up_to(at, left);
        }
        for (int row = 0; row < kRows; ++row) {
            for (int i = 0; i < kVectors; ++i) sums[row][i] += weights[row][token] * value[i];
        }
    }
    for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kVectors; ++i) store(values + row * padded_dim + i * kLanes, sums[row][i]);
    }
}

template <class C>
FASTLM_INLINE void fetch(const C* cache, const int64_t* offsets, int64_t head_dim) {
    for (int token = 0; token < kTile; ++token) {
        const char* row = reinterpret_cast<const char*>(cache + offsets[token]);
        for (int64_t i = 0; i < head_dim * static_cast<int64_t>(sizeof(C)); i += 64) __builtin_prefetch(row + i);
    }
}

struct Attend {
    template <class C>
    static FASTLM_INLINE void run(const Work<C>& work, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) attend(work, work.tasks[i]);
    }

    template <class C>
    static FASTLM_INLINE void attend(const Work<C>& work, const Task& task) {
        const DecodeAttention<C>& call = *work.call;
        const DecodeShape& shape = call.shape;
        const int64_t length = call.context_lens[task.batch], start = task.split * kSplit;
        const int64_t first = std::max(start, first_visible(length, shape.query_len, call.window));
        const int64_t last = std::min(length, start + kSplit);  // tokens [first, last) are seen by some query

        int64_t k_offsets[kSplit], v_offsets[kSplit];
        const int64_t first_tile = (first - start) / kTile * kTile, tiles_end = (last - start + kTile - 1) / kTile * kTile;
        const int32_t* table = call.block_table + task.batch * shape.max_blocks;
        for (int64_t t = first_tile; t < tiles_end; ++t) {  // tokens that nobody sees stand for the nearest that is seen
            const int64_t token = std::clamp(start + t, first, last - 1);
            const int64_t block = table[token / shape.block_size], slot = token % shape.block_size;
            k_offsets[t] = block * call.strides.k_block + slot * call.strides.k_slot;
            v_offsets[t] = block * call.strides.v_block + slot * call.strides.v_slot;
        }
        const C* k = call.k + task.kv_head * call.strides.k_head;
        const C* v = call.v + task.kv_head * call.strides.v_head;

        thread_local std::vector<float> q_buffer;
        q_buffer.resize(work.rows * work.padded_dim);
        float* q = q_buffer.data();
        for (int64_t row = 0; row < work.rows; ++row) {
            const int64_t at = task.batch * call.strides.batch + row / work.group() * call.strides.seq +
                               (task.kv_head * work.group() + row % work.group()) * call.strides.head;
            for (int64_t i = 0; i < shape.head_dim; i += kLanes) {
                const Floats query = load_from(call.type, call.q, at + i, shape.head_dim - i);
                store(q + row * work.padded_dim + i, query * call.scale);
            }
        }
        std::fill(task.partial, work.maximum(task), 0.0f);
        std::fill(work.maximum(task), work.sum(task), kNone);
        std::fill(work.sum(task), work.sum(task) + work.rows, 0.0f);

        for (int64_t t = first_tile; t < std::min(tiles_end, first_tile + 2 * kTile); t += kTile) {
            fetch(k, k_offsets + t, shape.head_dim), fetch(v, v_offsets + t, shape.head_dim);
        }
        for (int64_t t = first_tile; t < tiles_end; t += kTile) {
            if (t + 2 * kTile < tiles_end) {
                fetch(k, k_offsets + t + 2 * kTile, shape.head_dim);
                fetch(v, v_offsets + t + 2 * kTile, shape.head_dim);
            }
            for (int64_t row = 0; row < work.rows; row += 4) {
                switch (work.rows - row) {
                    case 1: tile<1>(work, task, q, row, start + t, k, k_offsets + t, v, v_offsets + t); break;
                    case 2: tile<2>(work, task, q, row, start + t, k, k_offsets + t, v, v_offsets + t); break;
                    case 3: tile<3>(work, task, q, row, start + t, k, k_offsets + t, v, v_offsets + t); break;
                    default: tile<4>(work, task, q, row, start + t, k, k_offsets + t, v, v_offsets + t);
                }
            }
        }
    }

    // One step of the online softmax for kRows rows and the tokens from `token` on.
    template <int kRows, class C>
    static FASTLM_INLINE void tile(const Work<C>& work, const Task& task, const float* q, int64_t row, int64_t token,
                                   const C* k, const int64_t* k_offsets, const C* v, const int64_t* v_offsets) {
        const DecodeAttention<C>& call = *work.call;
        const int64_t head_dim = call.shape.head_dim, padded = work.padded_dim;
        float scores[kRows][kTile], factor[kRows];
        dot_products<kRows>(q + row * padded, padded, k, k_offsets, head_dim, scores);
        for (int r = 0; r < kRows; ++r) {
            const int64_t query = (row + r) / work.group();
            const int64_t position = call.context_lens[task.batch] - call.shape.query_len + query;
            const int64_t from = call.window ? position - call.window + 1 : 0;
            Floats x = load(scores[r]);
            if (call.softcap != 0.0f) x = call.softcap * tanh(x / call.softcap);
            if (from > token || position < token + kTile - 1) {
                const Ints index = (Ints{} + static_cast<int32_t>(token)) + lane_numbers();
                x = index >= static_cast<int32_t>(std::max<int64_t>(from, 0)) ? x : broadcast(kNone);
                x = index <= static_cast<int32_t>(std::max<int64_t>(position, -1)) ? x : broadcast(kNone);
            }
            float& highest = work.maximum(task)[row + r];
            const float higher = std::max(highest, fastlm::cpu::maximum(x));
            const float shift = higher == kNone ? 0.0f : higher;  // so that -inf - shift is -inf, and its weight 0
            factor[r] = highest == higher ? 1.0f : exp(broadcast(highest - shift))[0];
            const Floats weights = exp(x - shift);
            store(scores[r], weights);
            float& total = work.sum(task)[row + r];
            total = total * factor[r] + fastlm::cpu::sum(weights);
            highest = higher;
        }
        float* values = task.partial + row * padded;
        int64_t i = 0;
        for (; i + 4 * kLanes <= head_dim; i += 4 * kLanes) {
            add_values<kRows, 4>(values + i, padded, factor, scores, v + i, v_offsets, 0);
        }
        for (; i < head_dim; i += kLanes) {
            add_values<kRows, 1>(values + i, padded, factor, scores, v + i, v_offsets, head_dim - i);
        }
    }

    static FASTLM_INLINE Ints lane_numbers() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
};

// The tasks of one sequence's KV head, in the order of their splits.
struct Head {
    const Task* tasks;
    int64_t splits, batch, kv_head;
};

template <class C>
struct Heads {
    Work<C> work;
    const Head* heads;
};

struct Combine {
    template <class C>
    static FASTLM_INLINE void run(const Heads<C>& all, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t row = 0; row < all.work.rows; ++row) combine(all.work, all.heads[i], row);
        }
    }

    template <class C>
    static FASTLM_INLINE void combine(const Work<C>& work, const Head& head, int64_t row) {
        const DecodeShape& shape = work.call->shape;
        float highest = kNone, total = 0.0f;
        for (int64_t s = 0; s < head.splits; ++s) highest = std::max(highest, work.maximum(head.tasks[s])[row]);
        const float shift = highest == kNone ? 0.0f : highest;
        thread_local std::vector<float> factors;
        factors.resize(head.splits);
        for (int64_t s = 0; s < head.splits; ++s) {
            factors[s] = exp(broadcast(work.maximum(head.tasks[s])[row] - shift))[0];
            total += work.sum(head.tasks[s])[row] * factors[s];
        }
        const int64_t query = row / work.group(), query_head = head.kv_head * work.group() + row % work.group();
        const int64_t at = ((head.batch * shape.query_len + query) * shape.heads + query_head) * shape.head_dim;
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        for (int64_t i = 0; i < shape.head_dim; i += kLanes) {
            Floats sum{};
            for (int64_t s = 0; s < head.splits; ++s) {
                sum += load(head.tasks[s].partial + row * work.padded_dim + i) * factors[s];
            }
            store_to(work.call->type, work.call->out, at + i, shape.head_dim - i, sum * inverse);
        }
    }
};

}  // namespace

template <class C>
void decode_attention(const DecodeAttention<C>& call, int num_threads) {
    const DecodeShape& shape = call.shape;
    Work<C> work{&call, nullptr, shape.query_len * (shape.heads / shape.kv_heads),
                 (shape.head_dim + kLanes - 1) / kLanes * kLanes};
    std::vector<Task> tasks;
    std::vector<Head> heads;
    int64_t tokens = 0;
    for (int64_t batch = 0; batch < shape.batch; ++batch) {
        const int64_t length = call.context_lens[batch], first = first_visible(length, shape.query_len, call.window);
        const int64_t first_split = first / kSplit, splits = (length + kSplit - 1) / kSplit - first_split;
        tokens += length - first;
        for (int64_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
            heads.push_back({nullptr, std::max<int64_t>(splits, 0), batch, kv_head});
            for (int64_t s = 0; s < splits; ++s) tasks.push_back({batch, kv_head, first_split + s, nullptr});
        }
    }
    const std::unique_ptr<float[]> partials(new float[tasks.size() * work.partial_size()]);
    for (size_t i = 0; i < tasks.size(); ++i) tasks[i].partial = partials.get() + i * work.partial_size();
    const Task* next = tasks.data();
    for (Head& head : heads) head.tasks = next, next += head.splits;
    work.tasks = tasks.data();
    const int64_t bytes = 2 * tokens * shape.kv_heads * shape.head_dim * static_cast<int64_t>(sizeof(C));
    if (bytes < kBytesForThreads) num_threads = 1;
    run_parallel<Attend>(work, static_cast<int64_t>(tasks.size()), 1, num_threads);
    run_parallel<Combine>(Heads<C>{work, heads.data()}, static_cast<int64_t>(heads.size()), 8, num_threads);
}

template void decode_attention(const DecodeAttention<float>&, int);
template void decode_attention(const DecodeAttention<BFloat16>&, int);
template void decode_attention(const DecodeAttention<Float16>&, int);

}  // namespace fastlm::cpu
