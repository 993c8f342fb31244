// Flash-decoding (Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html): keys and values are read
// from memory once, for all query heads that share them and all queries of a sequence. A task is 256 tokens of one
// sequence, cut at multiples of 256, whatever the batch and the threads; its result is a maximum, a sum and a weighted sum
// of values for each row (query, head). A second pass combines them in order. Within a task tiles of 16 tokens go through
// the online softmax. What limits is reading the cache, which gives twice as much when it is asked for in the order of its
// addresses as when four tokens are read side by side: so each token's heads are gone through as they lie, keys and then
// values of a tile, and what follows is fetched a fixed distance ahead.
//
// A row's arithmetic is the same whatever other rows and sequences there are: tiles that it does not see leave its
// maximum, sum and values as they are, bit for bit.
#include "cpu/decode_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/shuffle.hpp"
#include "cpu/parallel.hpp"

namespace fastlm::cpu {
namespace {

constexpr int64_t kSplit = 256;                // tokens of a task: 64 KB of a head of 64 in bf16, 6 µs at 10 GB/s
constexpr int64_t kTile = kLanes;              // tokens of one step of the online softmax
constexpr int64_t kRun = 4096;                 // bytes of a token's heads in a task, whose queries stay in the first cache
constexpr int64_t kBytesAhead = 8192;         // that are on their way
constexpr int64_t kBytesForThreads = 1 << 17;  // of keys and values, below which waking a thread takes longer
constexpr int64_t kTasksAThread = 4;           // splits a thread, from which on a task takes several heads of a split
constexpr float kNone = -std::numeric_limits<float>::infinity();

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t EightInts __attribute__((vector_size(32)));

struct Add {
    template <class V>
    static FASTLM_INLINE V of(const V& a, const V& b) {
        return a + b;
    }
};

struct Maximum {
    template <class V>
    static FASTLM_INLINE V of(const V& a, const V& b) {
        return a > b ? a : b;
    }
};

// One half of v with the other.
template <class Operation, class Half, class V>
FASTLM_INLINE Half fold(const V& v) {
    Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return Operation::of(low, high);
}

// to[i] = the sum, or the maximum, of v[i]'s elements, i < 4.
template <class Operation>
FASTLM_INLINE void reduce_four(const Floats* v, float* to) {
    Eight a[4], b[2];
    for (int i = 0; i < 4; ++i) a[i] = fold<Operation, Eight>(v[i]);
    for (int i = 0; i < 2; ++i) {
        const Eight low = FASTLM_SHUFFLE(EightInts, a[2 * i], a[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        const Eight high = FASTLM_SHUFFLE(EightInts, a[2 * i], a[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
        b[i] = Operation::of(low, high);
    }
    const Eight low = FASTLM_SHUFFLE(EightInts, b[0], b[1], 0, 1, 8, 9, 4, 5, 12, 13);
    const Eight high = FASTLM_SHUFFLE(EightInts, b[0], b[1], 2, 3, 10, 11, 6, 7, 14, 15);
    const Four four = fold<Operation, Four>(Operation::of(low, high));
    std::memcpy(to, &four, sizeof four);
}

// A cache's elements are taken 32 at a time, as two vectors. Of 16-bit elements the first holds those of even and the
// second those of odd index: a 32-bit word holds one of each, and shifts and masks are all it takes to part them. Queries
// and sums of values are kept in this order, and the results put right at the end.
constexpr int64_t kUnit = 2 * kLanes;

FASTLM_INLINE void load_unit(const float* p, Floats* v) { v[0] = load(p), v[1] = load(p + kLanes); }

FASTLM_INLINE void load_unit(const BFloat16* p, Floats* v) {
    Bits words;
    std::memcpy(&words, p, sizeof words);
    v[0] = (Floats)(words << 16), v[1] = (Floats)(words & 0xffff0000u);
}

FASTLM_INLINE void load_unit(const Float16* p, Floats* v) {
    Bits words;
    std::memcpy(&words, p, sizeof words);
    v[0] = half_to_float(words & 0xffffu), v[1] = half_to_float(words >> 16);
}

// As above, of the first `left` < 32 elements, the rest being 0.
template <class C>
FASTLM_INLINE void load_part_of_unit(const C* p, int64_t left, Floats* v) {
    C lanes[kUnit] = {};
    std::memcpy(lanes, p, left * sizeof(C));
    load_unit(lanes, v);
}

// Where element i of a head is kept.
template <class C>
FASTLM_INLINE int64_t place(int64_t i) {
    return sizeof(C) == 4 ? i : i / kUnit * kUnit + i % 2 * kLanes + i % kUnit / 2;
}

// Splits of one sequence that its queries see, and where their results go.
struct Sequence {
    int64_t first_split, splits;
    float* partials;  // [kv_heads][splits] of: (rows, padded head_dim) values, then a maximum and a sum a row
};

// Heads [head, head + heads) of one split, which lie side by side in memory where they are several.
struct Task {
    int64_t batch, split, head, heads;
};

struct Partial {
    float *values, *maximum, *sum;
};

// Memory that a thread keeps, at multiples of 64 bytes: a vector that straddles two lines of the cache costs two reads.
class Buffer {
   public:
    float* of(int64_t size) {
        if (size > size_) {
            memory_.reset(static_cast<float*>(::operator new(size * sizeof(float), std::align_val_t{64})));
            size_ = size;
        }
        return memory_.get();
    }

   private:
    struct Delete {
        void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    std::unique_ptr<float, Delete> memory_;
    int64_t size_ = 0;
};

template <class C>
struct Work {
    const DecodeAttention<C>* call;
    const Sequence* sequences;
    const Task* tasks;
    int64_t rows;        // of a KV head: queries times the query heads that share it
    int64_t padded_dim;  // head_dim rounded up to whole units

    int64_t group() const { return call->shape.heads / call->shape.kv_heads; }
    int64_t partial_size() const { return rows * (padded_dim + 2); }

    Partial partial(int64_t batch, int64_t head, int64_t split) const {
        const Sequence& sequence = sequences[batch];
        float* p = sequence.partials + (head * sequence.splits + split - sequence.first_split) * partial_size();
        return {p, p + rows * padded_dim, p + rows * (padded_dim + 1)};
    }
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

// Asks for the memory of one unit.
template <class C>
FASTLM_INLINE void fetch(const C* unit) {
    const char* p = reinterpret_cast<const char*>(unit);
    for (size_t i = 0; i < kUnit * sizeof(C); i += 64) __builtin_prefetch(p + i);
}

// scores[row] = q[row] · k of kRows rows. For each unit of k one of `ahead` is fetched.
template <int kRows, class C>
FASTLM_INLINE void dot_products(const float* q, int64_t padded_dim, const C* k, const C* ahead, int64_t head_dim,
                                float* scores) {
    Floats sums[4] = {}, others[4] = {}, keys[2];
    const auto add = [&](int64_t i) __attribute__((always_inline)) {
        for (int row = 0; row < kRows; ++row) {
            sums[row] += load(q + row * padded_dim + i) * keys[0];
            others[row] += load(q + row * padded_dim + i + kLanes) * keys[1];
        }
    };
    int64_t i = 0;
    for (; i + kUnit <= head_dim; i += kUnit) {
        load_unit(k + i, keys);
        fetch(ahead + i);
        add(i);
    }
    if (i < head_dim) {
        load_part_of_unit(k + i, head_dim - i, keys);
        fetch(ahead + i);
        add(i);
    }
    for (int row = 0; row < kRows; ++row) sums[row] += others[row];
    float results[4];
    reduce_four<Add>(sums, results);
    for (int row = 0; row < kRows; ++row) scores[row * kTile] = results[row];
}

// values[row] += weights[row] · v of kRows rows, the values being first multiplied by factor[row] where kFactor.
template <int kRows, bool kFactor, class C>
FASTLM_INLINE void add_values(float* values, int64_t padded_dim, const float* factor, const float* weights, const C* v,
                              const C* ahead, int64_t head_dim) {
    Floats weight[kRows], value[2];
    for (int row = 0; row < kRows; ++row) weight[row] = broadcast(weights[row * kTile]);
    const auto add = [&](int64_t i) __attribute__((always_inline)) {
        for (int half = 0; half < 2; ++half) {
            for (int row = 0; row < kRows; ++row) {
                float* at = values + row * padded_dim + i + half * kLanes;
                store(at, (kFactor ? load(at) * factor[row] : load(at)) + weight[row] * value[half]);
            }
        }
    };
    int64_t i = 0;
    for (; i + kUnit <= head_dim; i += kUnit) {
        load_unit(v + i, value);
        fetch(ahead + i);
        add(i);
    }
    if (i < head_dim) {
        load_part_of_unit(v + i, head_dim - i, value);
        fetch(ahead + i);
        add(i);
    }
}

// f.operator()<n>(row) for n rows from each `row` on, n being 4, and fewer for the last ones.
template <class F>
FASTLM_INLINE void for_rows(int64_t rows, const F& f) {
    for (int64_t row = 0; row < rows; row += 4) {
        switch (rows - row) {
            case 1: f.template operator()<1>(row); break;
            case 2: f.template operator()<2>(row); break;
            case 3: f.template operator()<3>(row); break;
            default: f.template operator()<4>(row);
        }
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
        const int64_t tiles_begin = (first - start) / kTile * kTile;
        const int64_t tiles_end = (last - start + kTile - 1) / kTile * kTile;
        const int32_t* table = call.block_table + task.batch * shape.max_blocks;
        int64_t block = first / shape.block_size, slot = first % shape.block_size;
        for (int64_t t = first - start; t < last - start; ++t) {
            k_offsets[t] = table[block] * call.strides.k_block + slot * call.strides.k_slot;
            v_offsets[t] = table[block] * call.strides.v_block + slot * call.strides.v_slot;
            if (++slot == shape.block_size) slot = 0, ++block;
        }
        for (int64_t* offsets : {k_offsets, v_offsets}) {  // tokens that nobody sees stand for the nearest that is seen
            std::fill(offsets + tiles_begin, offsets + (first - start), offsets[first - start]);
            std::fill(offsets + (last - start), offsets + tiles_end, offsets[last - start - 1]);
        }
        const int64_t rows = work.rows, padded = work.padded_dim, head_dim = shape.head_dim;
        const int64_t all_rows = task.heads * rows;
        thread_local Buffer buffer;
        float* q = buffer.of(all_rows * (2 * padded + kTile + 1));
        float *values = q + all_rows * padded, *scores = values + all_rows * padded, *factors = scores + all_rows * kTile;
        std::fill(q, scores, 0.0f);
        for (int64_t head = 0; head < task.heads; ++head) {
            load_queries(work, task.batch, task.head + head, q + head * rows * padded);
            const Partial partial = work.partial(task.batch, task.head + head, task.split);
            std::fill(partial.maximum, partial.sum, kNone);
            std::fill(partial.sum, partial.sum + rows, 0.0f);
        }
        const C *k = call.k + task.head * call.strides.k_head, *v = call.v + task.head * call.strides.v_head;
        const int64_t run = task.heads * head_dim * static_cast<int64_t>(sizeof(C));
        const int64_t tokens_ahead = std::clamp<int64_t>(kBytesAhead / run, 1, kTile);
        for (int64_t tile = tiles_begin; tile < tiles_end; tile += kTile) {
            for (int64_t t = 0; t < kTile; ++t) {
                const C* token = k + k_offsets[tile + t];
                const C* ahead = t + tokens_ahead < kTile ? k + k_offsets[tile + t + tokens_ahead]
                                                          : v + v_offsets[tile + t + tokens_ahead - kTile];
                for (int64_t head = 0; head < task.heads; ++head) {
                    for_rows(rows, [&]<int kRows>(int64_t row) __attribute__((always_inline)) {
                        dot_products<kRows>(q + (head * rows + row) * padded, padded,
                                            token + head * call.strides.k_head, ahead + head * head_dim, head_dim,
                                            &scores[(head * rows + row) * kTile + t]);
                    });
                }
            }
            for (int64_t head = 0; head < task.heads; ++head) {
                const Partial partial = work.partial(task.batch, task.head + head, task.split);
                for_rows(rows, [&]<int kRows>(int64_t row) __attribute__((always_inline)) {
                    softmax_step<kRows>(work, partial, row, start + tile, length - shape.query_len,
                                        &scores[(head * rows + row) * kTile], &factors[head * rows + row]);
                });
            }
            for (int64_t t = 0; t < kTile; ++t) {
                const C* token = v + v_offsets[tile + t];
                const int64_t next = std::min(tile + t + tokens_ahead, tiles_end - 1);
                const C* ahead = t + tokens_ahead < kTile ? v + v_offsets[next] : k + k_offsets[next];
                for (int64_t head = 0; head < task.heads; ++head) {
                    const auto add = [&]<bool kFactor>() __attribute__((always_inline)) {
                        for_rows(rows, [&]<int kRows>(int64_t row) __attribute__((always_inline)) {
                            add_values<kRows, kFactor>(values + (head * rows + row) * padded, padded,
                                                       &factors[head * rows + row],
                                                       &scores[(head * rows + row) * kTile + t],
                                                       token + head * call.strides.v_head, ahead + head * head_dim,
                                                       head_dim);
                        });
                    };
                    t == 0 ? add.template operator()<true>() : add.template operator()<false>();
                }
            }
        }
        for (int64_t head = 0; head < task.heads; ++head) {
            const Partial partial = work.partial(task.batch, task.head + head, task.split);
            std::copy(values + head * rows * padded, values + (head + 1) * rows * padded, partial.values);
        }
    }

    template <class C>
    static FASTLM_INLINE void load_queries(const Work<C>& work, int64_t batch, int64_t head, float* q) {
        const DecodeAttention<C>& call = *work.call;
        for (int64_t row = 0; row < work.rows; ++row) {
            const int64_t at = batch * call.strides.batch + row / work.group() * call.strides.seq +
                               (head * work.group() + row % work.group()) * call.strides.head;
            for (int64_t i = 0; i < call.shape.head_dim; i += kLanes) {
                const Floats query = load_from(call.type, call.q, at + i, call.shape.head_dim - i) * call.scale;
                for (int64_t j = 0; j < kLanes; ++j) q[row * work.padded_dim + place<C>(i + j)] = query[j];
            }
        }
    }

    // One step of the online softmax for kRows rows and a tile that begins at `token`: turns scores into weights, and gives
    // each row the factor that its sums have shrunk by. The first query stands at `first_position`.
    template <int kRows, class C>
    static FASTLM_INLINE void softmax_step(const Work<C>& work, const Partial& partial, int64_t row, int64_t token,
                                           int64_t first_position, float* scores, float* factor) {
        const DecodeAttention<C>& call = *work.call;
        float highest[4], total[4];
        Floats x[4] = {};
        for (int r = 0; r < kRows; ++r) {
            const int64_t position = first_position + (row + r) / work.group();
            const int64_t from = call.window ? position - call.window + 1 : 0;
            x[r] = load(scores + r * kTile);
            if (call.softcap != 0.0f) x[r] = call.softcap * tanh(x[r] / call.softcap);
            if (from > token || position < token + kTile - 1) {
                const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
                x[r] = lane >= clamped(from - token) ? x[r] : broadcast(kNone);
                x[r] = lane <= clamped(position - token) ? x[r] : broadcast(kNone);
            }
        }
        reduce_four<Maximum>(x, highest);
        for (int r = 0; r < kRows; ++r) {
            float& before = partial.maximum[row + r];
            highest[r] = std::max(before, highest[r]);
            const float shift = highest[r] == kNone ? 0.0f : highest[r];  // -inf - shift is then -inf, and its weight 0
            factor[r] = before == highest[r] ? 1.0f : exp(broadcast(before - shift))[0];
            before = highest[r];
            x[r] = exp(x[r] - shift);
            store(scores + r * kTile, x[r]);
        }
        reduce_four<Add>(x, total);
        for (int r = 0; r < kRows; ++r) partial.sum[row + r] = partial.sum[row + r] * factor[r] + total[r];
    }

    static FASTLM_INLINE int32_t clamped(int64_t lane) { return static_cast<int32_t>(std::clamp<int64_t>(lane, -1, kTile)); }
};

struct Combine {
    template <class C>
    static FASTLM_INLINE void run(const Work<C>& work, int64_t begin, int64_t end) {
        const int64_t kv_heads = work.call->shape.kv_heads;
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t row = 0; row < work.rows; ++row) combine(work, i / kv_heads, i % kv_heads, row);
        }
    }

    template <class C>
    static FASTLM_INLINE void combine(const Work<C>& work, int64_t batch, int64_t head, int64_t row) {
        const DecodeShape& shape = work.call->shape;
        const Sequence& sequence = work.sequences[batch];
        const int64_t begin = sequence.first_split, end = begin + sequence.splits;
        float highest = kNone, total = 0.0f;
        for (int64_t s = begin; s < end; ++s) highest = std::max(highest, work.partial(batch, head, s).maximum[row]);
        const float shift = highest == kNone ? 0.0f : highest;
        thread_local std::vector<float> result, in_order;
        result.assign(work.padded_dim, 0.0f);
        for (int64_t s = begin; s < end; ++s) {
            const Partial partial = work.partial(batch, head, s);
            const float factor = exp(broadcast(partial.maximum[row] - shift))[0];
            total += partial.sum[row] * factor;
            const float* values = partial.values + row * work.padded_dim;
            for (int64_t i = 0; i < work.padded_dim; i += kLanes) {
                store(&result[i], load(&result[i]) + load(values + i) * factor);
            }
        }
        in_order.resize(work.padded_dim);
        for (int64_t i = 0; i < work.padded_dim; ++i) in_order[i] = result[place<C>(i)];
        const int64_t query = row / work.group(), query_head = head * work.group() + row % work.group();
        const int64_t at = ((batch * shape.query_len + query) * shape.heads + query_head) * shape.head_dim;
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        for (int64_t i = 0; i < shape.head_dim; i += kLanes) {
            store_to(work.call->type, work.call->out, at + i, shape.head_dim - i, load(&in_order[i]) * inverse);
        }
    }
};

}  // namespace

void check_block_table(const DecodeShape& shape, const int32_t* table, const int32_t* lengths, int64_t window) {
    const int64_t most = shape.max_blocks * shape.block_size;
    for (int64_t row = 0; row < shape.batch; ++row) {
        const int64_t length = lengths[row];
        if (length < 0 || length > most) {
            throw std::invalid_argument("context_lens[" + std::to_string(row) + "] is " + std::to_string(length) +
                                        ", but a row of block_table holds 0 to " + std::to_string(most) + " tokens");
        }
        const int64_t first = first_visible(length, shape.query_len, window);
        for (int64_t i = first / shape.block_size; i * shape.block_size < length; ++i) {
            const int64_t block = table[row * shape.max_blocks + i];
            if (block < 0 || block >= shape.blocks) {
                throw std::invalid_argument("block_table[" + std::to_string(row) +
                                            "] names a block outside the cache of " + std::to_string(shape.blocks) +
                                            ": " + std::to_string(block));
            }
        }
    }
}

template <class C>
void decode_attention(const DecodeAttention<C>& call, int num_threads) {
    const DecodeShape& shape = call.shape;
    Work<C> work{&call, nullptr, nullptr, shape.query_len * (shape.heads / shape.kv_heads),
                 (shape.head_dim + kUnit - 1) / kUnit * kUnit};
    std::vector<Sequence> sequences;
    int64_t tokens = 0, splits = 0;
    for (int64_t batch = 0; batch < shape.batch; ++batch) {
        const int64_t length = call.context_lens[batch], first = first_visible(length, shape.query_len, call.window);
        const int64_t end = (length + kSplit - 1) / kSplit;
        sequences.push_back({first / kSplit, std::max<int64_t>(end - first / kSplit, 0), nullptr});
        tokens += length - first, splits += sequences.back().splits;
    }
    const std::unique_ptr<float[]> partials(new float[splits * shape.kv_heads * work.partial_size()]);
    float* next = partials.get();
    for (Sequence& sequence : sequences) {
        sequence.partials = next;
        next += sequence.splits * shape.kv_heads * work.partial_size();
    }
    const int64_t bytes = 2 * tokens * shape.kv_heads * shape.head_dim * static_cast<int64_t>(sizeof(C));
    if (bytes < kBytesForThreads) num_threads = 1;
    const bool is_dense = call.strides.k_head == shape.head_dim && call.strides.v_head == shape.head_dim;
    const int64_t most_heads = kRun / (shape.head_dim * static_cast<int64_t>(sizeof(C)));
    const int64_t heads = is_dense && splits >= kTasksAThread * num_threads ? std::max<int64_t>(most_heads, 1) : 1;
    std::vector<Task> tasks;
    for (int64_t batch = 0; batch < shape.batch; ++batch) {
        for (int64_t s = 0; s < sequences[batch].splits; ++s) {
            for (int64_t head = 0; head < shape.kv_heads; head += heads) {
                tasks.push_back({batch, sequences[batch].first_split + s, head, std::min(heads, shape.kv_heads - head)});
            }
        }
    }
    work.sequences = sequences.data(), work.tasks = tasks.data();
    run_parallel<Attend>(work, static_cast<int64_t>(tasks.size()), 1, num_threads);
    run_parallel<Combine>(work, shape.batch * shape.kv_heads, 8, num_threads);
}

template void decode_attention(const DecodeAttention<float>&, int);
template void decode_attention(const DecodeAttention<BFloat16>&, int);
template void decode_attention(const DecodeAttention<Float16>&, int);

}  // namespace fastlm::cpu
