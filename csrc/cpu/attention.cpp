// A tile of 64 queries meets the keys in blocks of 512: the tile's logits, 128 KB, and what is read with them stay in
// the second cache, so that memory is read once and the products run near the processor's rate. Numbers become fp32 as
// they are read. Keys are laid out by dimension, in strips of 64, which makes both products of the forward, and all five
// of the backward, rows of one operand times vectors of the other. Forward: online softmax over the blocks
// (FlashAttention-2, arXiv 2307.08691, section 3.1). Backward: weights are exp(logits - lse); one thread has all that a
// KV head's gradients are made of, so they are summed in one order.
//
// Blocks and strips begin at fixed keys and a row's sums run over its keys in order: a row's result depends neither on
// the other rows nor on the number of threads.
#include "cpu/attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/parallel.hpp"
#include "cpu/tile_product.hpp"

namespace fastlm::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kTile = 64;       // queries whose logits are made together
constexpr int64_t kBlock = 512;     // keys of them
constexpr int64_t kStrip = 64;      // keys that lie together: the columns of a product in registers
constexpr int64_t kQueries = 512;   // that share a block of keys once it is laid out
constexpr int64_t kPackedItems = 4;  // heads of packed sequences that a thread takes at a time
constexpr int64_t kKept = 1 << 20;  // floats of scratch that a thread keeps between calls

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Consecutive pieces of one allocation that stays from call to call: fresh pages would cost as much as the products.
class Scratch {
  public:
    explicit Scratch(int64_t size) : all_(kept()) {
        if (static_cast<int64_t>(all_.size()) < size + kLanes) all_.resize(size + kLanes);
        const auto address = reinterpret_cast<uintptr_t>(all_.data());
        next_ = all_.data() + (64 - address % 64) % 64 / sizeof(float);
    }
    ~Scratch() {
        if (static_cast<int64_t>(all_.size()) > kKept) std::vector<float>().swap(all_);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    float* take(int64_t size) {
        float* taken = next_;
        next_ += size;
        return taken;
    }

  private:
    std::vector<float>& all_;
    float* next_;

    static std::vector<float>& kept() {
        static thread_local std::vector<float> floats;
        return floats;
    }
};

struct Range {
    int64_t begin, end;
};

// The keys that query i sees, empty as [0, 0).
Range visible(const AttentionShape& shape, int64_t i) {
    const int64_t position = i + shape.seq_k - shape.seq_q;
    const int64_t end = shape.causal ? std::min(position + 1, shape.seq_k) : shape.seq_k;
    const int64_t begin = shape.window > 0 ? std::max<int64_t>(position - shape.window + 1, 0) : 0;
    return begin < end ? Range{begin, end} : Range{0, 0};
}

// The keys that any of the queries [first, last) sees: both bounds rise with the query.
Range visible(const AttentionShape& shape, int64_t first, int64_t last) {
    const int64_t position = first + shape.seq_k - shape.seq_q, end = visible(shape, last - 1).end;
    const int64_t begin = shape.window > 0 ? std::max<int64_t>(position - shape.window + 1, 0) : 0;
    return begin < end ? Range{begin, end} : Range{0, 0};
}

// The part of `keys` in the block that begins at `block`, counted from there.
Range within(Range keys, int64_t block) {
    const int64_t begin = std::clamp<int64_t>(keys.begin - block, 0, kBlock);
    const int64_t end = std::clamp<int64_t>(keys.end - block, 0, kBlock);
    return begin < end ? Range{begin, end} : Range{0, 0};
}

// The first `count` rows as fp32, each padded with zeros to whole vectors, and rows of zeros up to `all`.
template <class T>
FASTLM_INLINE void copy_rows(Rows<const T> rows, int64_t count, int64_t all, int64_t head_dim, float scale, float* to) {
    const int64_t padded = round_up(head_dim, kLanes), whole = head_dim / kLanes * kLanes;
    for (int64_t row = 0; row < count; ++row, to += padded) {
        for (int64_t i = 0; i < whole; i += kLanes) store(to + i, load(rows[row] + i) * scale);
        if (whole < padded) store(to + whole, load_first(rows[row] + whole, head_dim - whole, 0.0f) * scale);
    }
    std::memset(to, 0, (all - count) * padded * sizeof(float));
}

template <class T>
FASTLM_INLINE void write_rows(const float* from, int64_t count, int64_t head_dim, Rows<T> rows) {
    for (int64_t row = 0; row < count; ++row, from += round_up(head_dim, kLanes)) {
        for (int64_t i = 0; i < head_dim; i += kLanes) store_up_to(rows[row] + i, head_dim - i, load(from + i));
    }
}

// (keys, dimensions) -> strips of (dimensions, 64 keys); `keys` is a multiple of 64.
FASTLM_INLINE void lay_out(const float* rows, int64_t keys, int64_t head_dim, float* strips) {
    const int64_t padded = round_up(head_dim, kLanes);
    for (int64_t strip = 0; strip < keys; strip += kStrip, rows += kStrip * padded, strips += kStrip * head_dim) {
        for (int64_t i = 0; i < head_dim; ++i) {
            for (int64_t key = 0; key < kStrip; ++key) strips[i * kStrip + key] = rows[key * padded + i];
        }
    }
}

// Strips of a block that a tile meets, in keys from the block's first: `begin` and `end` are multiples of 64, and from
// `seen` on no row sees a key.
struct Strips {
    int64_t begin, end, seen;

    explicit Strips(Range keys)
        : begin(keys.begin / kStrip * kStrip), end(round_up(keys.end, kStrip)), seen(keys.end) {}
};

// products (rows, kBlock) = a (rows, padded) times the strips.
FASTLM_INLINE void times_strips(const float* a, int64_t rows, const float* laid_out, Strips strips, int64_t head_dim,
                                float* products) {
    const int64_t padded = round_up(head_dim, kLanes);
    for (int64_t key = strips.begin; key < strips.end; key += kStrip) {
        const float* strip = laid_out + key * head_dim;
        multiply<false>(a, padded, 1, strip, kStrip, products + key, kBlock, rows, kStrip, head_dim);
    }
}

// Of a row's logits those of keys that it does not see become -inf.
FASTLM_INLINE void hide(float* logits, Range seen, Strips strips) {
    std::fill(logits + strips.begin, logits + std::max(strips.begin, seen.begin), -kInfinity);
    std::fill(logits + std::min(strips.end, seen.end), logits + strips.end, -kInfinity);
}

// Makes weights of a row's logits. `max` and `total` go on from the blocks before; returns the factor of their sums.
FASTLM_INLINE float softmax(float* logits, Strips strips, float& max, float& total) {
    Floats maxima = broadcast(-kInfinity);
    for (int64_t i = strips.begin; i < strips.end; i += kLanes) maxima = maximum(maxima, load(logits + i));
    const float old = max;
    max = std::max(max, maximum(maxima));
    const float shift = max == -kInfinity ? 0.0f : max;
    Floats sums{};
    for (int64_t i = strips.begin; i < strips.end; i += kLanes) {
        const Floats weight = exp(load(logits + i) - shift);
        store(logits + i, weight);
        sums += weight;
    }
    const float factor = old == -kInfinity ? 0.0f : std::exp(old - shift);
    total = total * factor + sum(sums);
    return factor;
}

struct Forward {
    int64_t head_dim, padded;
    Scratch scratch;
    float *rows, *strips, *values, *sums, *queries, *logits, *max, *total;

    explicit Forward(int64_t dim)
        : head_dim(dim),
          padded(round_up(dim, kLanes)),
          scratch(2 * kBlock * padded + kBlock * dim + (kQueries + kTile) * padded + kTile * kBlock + 2 * kQueries) {
        rows = scratch.take(kBlock * padded), values = scratch.take(kBlock * padded);
        strips = scratch.take(kBlock * dim), sums = scratch.take(kQueries * padded);
        queries = scratch.take(kTile * padded), logits = scratch.take(kTile * kBlock);
        max = scratch.take(kQueries), total = scratch.take(kQueries);
    }

    template <class T>
    static FASTLM_INLINE void run(const AttentionForward<T>& call, int64_t begin, int64_t end) {
        const AttentionShape& shape = call.shape;
        const int64_t parts = (shape.seq_q + kQueries - 1) / kQueries;
        Forward forward(shape.head_dim);
        for (int64_t item = begin; item < end; ++item) {
            const int64_t head = item / parts % shape.heads, batch = item / parts / shape.heads;
            const int64_t first = item % parts * kQueries;
            forward.attend(call, batch, head, first, std::min(first + kQueries, shape.seq_q));
        }
    }

    // Queries [first, last) of a head.
    template <class T>
    FASTLM_INLINE void attend(const AttentionForward<T>& call, int64_t batch, int64_t head, int64_t first,
                              int64_t last) {
        const AttentionShape& shape = call.shape;
        const int64_t kv_head = head / (shape.heads / shape.kv_heads);
        const Rows<const T> q = call.q.rows(batch, head);
        const Rows<const T> k = call.k.rows(batch, kv_head), v = call.v.rows(batch, kv_head);
        std::memset(sums, 0, round_up(last - first, kProductRows) * padded * sizeof(float));
        std::fill(max, max + kQueries, -kInfinity), std::fill(total, total + kQueries, 0.0f);
        const Range all = visible(shape, first, last);
        for (int64_t block = all.begin / kBlock * kBlock; block < all.end; block += kBlock) {
            const int64_t keys = std::min(kBlock, all.end - block), whole = round_up(keys, kStrip);
            copy_rows(k.from(block), keys, whole, head_dim, 1.0f, rows);
            copy_rows(v.from(block), keys, whole, head_dim, 1.0f, values);
            lay_out(rows, whole, head_dim, strips);
            for (int64_t tile = first; tile < last; tile += kTile) {
                const int64_t count = std::min(kTile, last - tile);
                const Range seen = within(visible(shape, tile, tile + count), block);
                if (seen.begin == seen.end) continue;
                copy_rows(q.from(tile), count, round_up(count, kProductRows), head_dim, shape.scale, queries);
                meet(shape, block, tile, count, tile - first, Strips(seen));
            }
        }
        for (int64_t row = 0; row < last - first; ++row) {
            const float inverse = total[row] > 0 ? 1.0f / total[row] : total[row];  // 0 of no key, and NaN, stay
            float* sum = sums + row * padded;
            for (int64_t i = 0; i < padded; i += kLanes) store(sum + i, load(sum + i) * inverse);
            const int64_t at = batch * call.lse_batch_stride + head * call.lse_head_stride + first + row;
            call.lse[at] = max[row] + std::log(total[row]);
        }
        write_rows(sums, last - first, head_dim, call.out.rows(batch, head).from(first));
    }

    // A tile of `count` queries, whose sums begin at row `at`, meets the keys of a block.
    FASTLM_INLINE void meet(const AttentionShape& shape, int64_t block, int64_t tile, int64_t count, int64_t at,
                            Strips met) {
        const int64_t all = round_up(count, kProductRows);
        times_strips(queries, all, strips, met, head_dim, logits);
        for (int64_t row = 0; row < all; ++row) {
            float* its = logits + row * kBlock;
            const Range keys = row < count ? within(visible(shape, tile + row), block) : Range{0, 0};
            if (keys.begin == keys.end) {
                std::fill(its + met.begin, its + met.end, 0.0f);
                continue;
            }
            hide(its, keys, met);
            const float factor = softmax(its, met, max[at + row], total[at + row]);
            if (factor == 1.0f) continue;
            float* sum = sums + (at + row) * padded;
            for (int64_t i = 0; i < padded; i += kLanes) store(sum + i, load(sum + i) * factor);
        }
        const float* its_values = values + met.begin * padded;
        multiply<true>(logits + met.begin, kBlock, 1, its_values, padded, sums + at * padded, padded, all, padded,
                       met.seen - met.begin);
    }
};

// Of a row's logits and of grad_out · v makes the weights and the gradients of q · k, in place.
FASTLM_INLINE void weights_and_gradients(float* logits, float* gradients, Strips strips, float scale, float lse,
                                         float delta) {
    for (int64_t i = strips.begin; i < strips.end; i += kLanes) {
        const Floats weight = exp(load(logits + i) * scale - lse);
        store(logits + i, weight);
        store(gradients + i, weight * (load(gradients + i) - delta) * scale);
    }
}

template <class T>
FASTLM_INLINE float dot(const T* a, const T* b, int64_t n) {
    Floats sums{};
    for (int64_t i = 0; i < n; i += kLanes) sums += load_up_to(a + i, n - i) * load_up_to(b + i, n - i);
    return sum(sums);
}

struct Backward {
    int64_t head_dim, padded, length;
    Scratch scratch;
    float *keys, *grad_k, *grad_v, *key_strips, *value_strips, *queries, *grad_out, *grad_q, *logits, *gradients;
    float lse[kTile], delta[kTile];

    explicit Backward(const AttentionShape& shape)
        : head_dim(shape.head_dim),
          padded(round_up(head_dim, kLanes)),
          length(round_up(shape.seq_k, kStrip)),
          scratch(length * (3 * padded + 2 * head_dim) + kTile * (3 * padded + 2 * kBlock)) {
        keys = scratch.take(length * padded);
        grad_k = scratch.take(length * padded), grad_v = scratch.take(length * padded);
        key_strips = scratch.take(length * head_dim), value_strips = scratch.take(length * head_dim);
        queries = scratch.take(kTile * padded), grad_out = scratch.take(kTile * padded);
        grad_q = scratch.take(kTile * padded);
        logits = scratch.take(kTile * kBlock), gradients = scratch.take(kTile * kBlock);
    }

    template <class T>
    static FASTLM_INLINE void run(const AttentionBackward<T>& call, int64_t begin, int64_t end) {
        Backward backward(call.shape);
        for (int64_t item = begin; item < end; ++item) {
            backward.attend(call, item / call.shape.kv_heads, item % call.shape.kv_heads);
        }
    }

    // All queries that read a KV head.
    template <class T>
    FASTLM_INLINE void attend(const AttentionBackward<T>& call, int64_t batch, int64_t kv_head) {
        const AttentionShape& shape = call.shape;
        const int64_t group = shape.heads / shape.kv_heads;
        copy_rows(call.v.rows(batch, kv_head), shape.seq_k, length, head_dim, 1.0f, keys);
        lay_out(keys, length, head_dim, value_strips);
        copy_rows(call.k.rows(batch, kv_head), shape.seq_k, length, head_dim, 1.0f, keys);
        lay_out(keys, length, head_dim, key_strips);
        std::memset(grad_k, 0, length * padded * sizeof(float));
        std::memset(grad_v, 0, length * padded * sizeof(float));
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            for (int64_t tile = 0; tile < shape.seq_q; tile += kTile) {
                const int64_t count = std::min(kTile, shape.seq_q - tile);
                load_tile(call, batch, head, tile, count);
                const Range all = visible(shape, tile, tile + count);
                for (int64_t block = all.begin / kBlock * kBlock; block < all.end; block += kBlock) {
                    meet(shape, block, tile, count, Strips(within(all, block)));
                }
                write_rows(grad_q, count, head_dim, call.grad_q.rows(batch, head).from(tile));
            }
        }
        write_rows(grad_k, shape.seq_k, head_dim, call.grad_k.rows(batch, kv_head));
        write_rows(grad_v, shape.seq_k, head_dim, call.grad_v.rows(batch, kv_head));
    }

    template <class T>
    FASTLM_INLINE void load_tile(const AttentionBackward<T>& call, int64_t batch, int64_t head, int64_t tile,
                                 int64_t count) {
        const int64_t all = round_up(count, kProductRows);
        const Rows<const T> its_grad_out = call.grad_out.rows(batch, head).from(tile);
        const Rows<const T> out = call.out.rows(batch, head).from(tile);
        copy_rows(call.q.rows(batch, head).from(tile), count, all, head_dim, 1.0f, queries);
        copy_rows(its_grad_out, count, all, head_dim, 1.0f, grad_out);
        std::memset(grad_q, 0, all * padded * sizeof(float));
        const int64_t at = batch * call.lse_batch_stride + head * call.lse_head_stride + tile;
        for (int64_t row = 0; row < count; ++row) {
            lse[row] = call.lse[at + row];
            delta[row] = dot(its_grad_out[row], out[row], head_dim) - (call.grad_lse ? call.grad_lse[at + row] : 0.0f);
        }
    }

    FASTLM_INLINE void meet(const AttentionShape& shape, int64_t block, int64_t tile, int64_t count, Strips met) {
        const int64_t all = round_up(count, kProductRows);
        times_strips(queries, all, key_strips + block * head_dim, met, head_dim, logits);
        times_strips(grad_out, all, value_strips + block * head_dim, met, head_dim, gradients);
        for (int64_t row = 0; row < all; ++row) {
            float *its = logits + row * kBlock, *its_gradients = gradients + row * kBlock;
            const Range seen = row < count ? within(visible(shape, tile + row), block) : Range{0, 0};
            if (seen.begin == seen.end || lse[row] == -kInfinity) {
                std::fill(its + met.begin, its + met.end, 0.0f);
                std::fill(its_gradients + met.begin, its_gradients + met.end, 0.0f);
                continue;
            }
            hide(its, seen, met);
            weights_and_gradients(its, its_gradients, met, shape.scale, lse[row], delta[row]);
        }
        const int64_t key = (block + met.begin) * padded, seen = met.seen - met.begin;
        const int64_t rows = round_up(seen, kProductRows);
        const float *weights = logits + met.begin, *its_gradients = gradients + met.begin;
        multiply<true>(weights, 1, kBlock, grad_out, padded, grad_v + key, padded, rows, padded, all);
        multiply<true>(its_gradients, 1, kBlock, queries, padded, grad_k + key, padded, rows, padded, all);
        multiply<true>(its_gradients, kBlock, 1, keys + key, padded, grad_q, padded, all, padded, seen);
    }
};

template <class Call>
struct Packed {
    const Call& call;
    const std::vector<Sequence>& sequences;
};

template <class T>
void move(Heads<T>& heads, int64_t rows) {
    heads.data += rows * heads.seq_stride;
}

template <class T>
AttentionForward<T> part(AttentionForward<T> call, const Sequence& sequence) {
    call.shape.seq_q = sequence.seq_q, call.shape.seq_k = sequence.seq_k;
    move(call.q, sequence.first_q), move(call.out, sequence.first_q);
    move(call.k, sequence.first_k), move(call.v, sequence.first_k);
    call.lse += sequence.first_q;
    return call;
}

template <class T>
AttentionBackward<T> part(AttentionBackward<T> call, const Sequence& sequence) {
    call.shape.seq_q = sequence.seq_q, call.shape.seq_k = sequence.seq_k;
    move(call.q, sequence.first_q), move(call.out, sequence.first_q);
    move(call.grad_out, sequence.first_q), move(call.grad_q, sequence.first_q);
    move(call.k, sequence.first_k), move(call.v, sequence.first_k);
    move(call.grad_k, sequence.first_k), move(call.grad_v, sequence.first_k);
    call.lse += sequence.first_q;
    if (call.grad_lse) call.grad_lse += sequence.first_q;
    return call;
}

struct PackedForward {
    template <class T>
    static FASTLM_INLINE void run(const Packed<AttentionForward<T>>& packed, int64_t begin, int64_t end) {
        const int64_t heads = packed.call.shape.heads;
        Forward forward(packed.call.shape.head_dim);
        for (int64_t item = begin; item < end; ++item) {
            const Sequence& sequence = packed.sequences[item / heads];
            if (sequence.seq_k == 0) continue;
            const AttentionForward<T> call = part(packed.call, sequence);
            for (int64_t first = 0; first < sequence.seq_q; first += kQueries) {
                forward.attend(call, 0, item % heads, first, std::min(first + kQueries, sequence.seq_q));
            }
        }
    }
};

struct PackedBackward {
    template <class T>
    static FASTLM_INLINE void run(const Packed<AttentionBackward<T>>& packed, int64_t begin, int64_t end) {
        const int64_t kv_heads = packed.call.shape.kv_heads;
        AttentionShape longest = packed.call.shape;
        longest.seq_k = 0;
        for (const Sequence& sequence : packed.sequences) longest.seq_k = std::max(longest.seq_k, sequence.seq_k);
        Backward backward(longest);
        for (int64_t item = begin; item < end; ++item) {
            const Sequence& sequence = packed.sequences[item / kv_heads];
            if (sequence.seq_q == 0 || sequence.seq_k == 0) continue;
            backward.length = round_up(sequence.seq_k, kStrip);
            backward.attend(part(packed.call, sequence), 0, item % kv_heads);
        }
    }
};

}  // namespace

template <class T>
void attention_forward(const AttentionForward<T>& call, int num_threads) {
    const AttentionShape& shape = call.shape;
    const int64_t parts = (shape.seq_q + kQueries - 1) / kQueries;
    run_parallel<Forward>(call, shape.batch * shape.heads * parts, 1, num_threads);
}

template <class T>
void attention_backward(const AttentionBackward<T>& call, int num_threads) {
    run_parallel<Backward>(call, call.shape.batch * call.shape.kv_heads, 1, num_threads);
}

template <class T>
void attention_forward(const AttentionForward<T>& call, const std::vector<Sequence>& sequences, int num_threads) {
    const auto items = static_cast<int64_t>(sequences.size()) * call.shape.heads;
    run_parallel<PackedForward>(Packed<AttentionForward<T>>{call, sequences}, items, kPackedItems, num_threads);
}

template <class T>
void attention_backward(const AttentionBackward<T>& call, const std::vector<Sequence>& sequences, int num_threads) {
    const auto items = static_cast<int64_t>(sequences.size()) * call.shape.kv_heads;
    run_parallel<PackedBackward>(Packed<AttentionBackward<T>>{call, sequences}, items, kPackedItems, num_threads);
}

template void attention_forward(const AttentionForward<float>&, int);
template void attention_forward(const AttentionForward<BFloat16>&, int);
template void attention_backward(const AttentionBackward<float>&, int);
template void attention_backward(const AttentionBackward<BFloat16>&, int);
template void attention_forward(const AttentionForward<float>&, const std::vector<Sequence>&, int);
template void attention_forward(const AttentionForward<BFloat16>&, const std::vector<Sequence>&, int);
template void attention_backward(const AttentionBackward<float>&, const std::vector<Sequence>&, int);
template void attention_backward(const AttentionBackward<BFloat16>&, const std::vector<Sequence>&, int);

}  // namespace fastlm::cpu
