// The kernels of single ops, one after another: what `Transformer.hidden_states` computes over a paged cache, bit for bit
// where its linear layers are quantized. A step of one row is some ten small kernels a layer, each of a few microseconds,
// and in Python reaching them takes longer than they do. Reading the weights limits what is left.
#include "cpu/decoder.hpp"

#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "cpu/decode_attention.hpp"
#include "cpu/linear.hpp"
#include "cpu/quantized_linear.hpp"
#include "cpu/rms_norm.hpp"
#include "cpu/rotary.hpp"
#include "cpu/swiglu.hpp"

namespace fastlm::cpu {
namespace {

template <class T>
constexpr FloatType kFloatType = FloatType::kFloat32;
template <>
constexpr FloatType kFloatType<BFloat16> = FloatType::kBFloat16;

struct Add {
    template <class T>
    struct Args {
        const T *a, *b;
        T* y;
    };

    template <class T>
    static FASTLM_INLINE void run(const Args<T>& args, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += kLanes) {
            store_up_to(args.y + i, end - i, load_up_to(args.a + i, end - i) + load_up_to(args.b + i, end - i));
        }
    }
};

struct Convert {
    template <class T, class C>
    struct Args {
        const T* from;
        C* to;
    };

    template <class T, class C>
    static FASTLM_INLINE void run(const Args<T, C>& args, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += kLanes) {
            store_up_to(args.to + i, end - i, load_up_to(args.from + i, end - i));
        }
    }
};

template <class T, class C>
class Run {
   public:
    Run(const Decoder<T, C>& decoder, const DecoderStep<T>& step, int num_threads)
        : shape_(decoder.shape), step_(step), num_threads_(num_threads) {
        const int64_t q = shape_.heads * shape_.head_dim, kv = shape_.kv_heads * shape_.head_dim;
        const int64_t hidden = shape_.hidden_size, inner = shape_.intermediate_size;
        memory_.reset(new T[step.rows * (4 * hidden + 3 * q + 3 * kv + 3 * inner)]);
        rstd_.reset(new float[step.rows * shape_.heads]);
        T* next = memory_.get();
        const auto take = [&](int64_t width) { return std::exchange(next, next + step.rows * width); };
        hidden_ = take(hidden), normed_ = take(hidden), stream_ = take(hidden), next_stream_ = take(hidden);
        q_ = take(q), normed_q_ = take(q), attended_ = take(q);
        k_ = take(kv), normed_k_ = take(kv), v_ = take(kv);
        gate_ = take(inner), up_ = take(inner), activated_ = take(inner);
        std::memcpy(hidden_, step.hidden, step.rows * hidden * sizeof(T));
    }

    void layer(const DecoderLayer<C>& layer) {
        add_and_norm(layer.input_norm, hidden_, normed_);
        project(layer.q, normed_, q_), project(layer.k, normed_, k_), project(layer.v, normed_, v_);
        if (layer.q_norm) {
            norm(layer.q_norm, q_, shape_.heads, shape_.head_dim, normed_q_), std::swap(q_, normed_q_);
            norm(layer.k_norm, k_, shape_.kv_heads, shape_.head_dim, normed_k_), std::swap(k_, normed_k_);
        }
        if (layer.table >= 0) {
            rotate(layer, q_, shape_.heads, normed_q_), std::swap(q_, normed_q_);
            rotate(layer, k_, shape_.kv_heads, normed_k_), std::swap(k_, normed_k_);
        }
        const int64_t width = shape_.kv_heads * shape_.head_dim;
        const int64_t* slots = step_.slots[layer.pool];
        for (int64_t row = 0; row < step_.rows; ++row) {
            keep(k_ + row * width, width, layer.keys + slots[row] * width);
            keep(v_ + row * width, width, layer.values + slots[row] * width);
        }
        for (const DecoderGroup& group : step_.groups) attend(layer, group);
        project(layer.o, attended_, hidden_);
        if (layer.attention_norm) norm_hidden(layer.attention_norm);
        add_and_norm(layer.mlp_norm, hidden_, normed_);
        project(layer.gate, normed_, gate_), project(layer.up, normed_, up_);
        activate();
        project(layer.down, activated_, hidden_);
        if (layer.output_norm) norm_hidden(layer.output_norm);
    }

    void finish(const float* weight) { add_and_norm(weight, hidden_, step_.out); }

   private:
    const DecoderShape& shape_;
    const DecoderStep<T>& step_;
    const int num_threads_;
    std::unique_ptr<T[]> memory_;
    std::unique_ptr<float[]> rstd_;
    T *hidden_, *normed_, *stream_, *next_stream_, *q_, *normed_q_, *attended_, *k_, *normed_k_, *v_, *gate_, *up_,
        *activated_;
    bool has_stream_ = false;  // the first block has nothing to add to

    static void keep(const T* from, int64_t width, C* to) {
        if constexpr (std::is_same_v<T, C>) {
            std::memcpy(to, from, width * sizeof(T));
        } else {
            run_best<Convert>(typename Convert::Args<T, C>{from, to}, 0, width);
        }
    }

    void project(const Projection& to, const T* x, T* y) const {
        if (to.quantization.empty()) {
            const auto stride = to.stride / static_cast<int64_t>(sizeof(T));
            linear(Linear<T>{x, step_.rows, to.in_features, static_cast<const T*>(to.weight), to.out_features, stride,
                             to.bias, y},
                   num_threads_);
        } else {
            quantized_linear(QuantizedLinear<T>{x, step_.rows, to.in_features, to.in_features,
                                                static_cast<const uint8_t*>(to.weight), to.out_features, to.stride,
                                                to.bias, y},
                             to.quantization, num_threads_);
        }
    }

    // y = norm(x + stream), and the sum is the next stream; without a norm, y is the sum.
    void add_and_norm(const float* weight, const T* x, T* y) {
        const int64_t size = step_.rows * shape_.hidden_size;
        if (weight) {
            rms_norm_forward(
                RMSNormForward<T>{x, has_stream_ ? stream_ : nullptr, weight, step_.rows, shape_.hidden_size,
                                  shape_.hidden_size, shape_.hidden_size, shape_.eps, y, next_stream_, rstd_.get()},
                num_threads_);
            if (!has_stream_) std::memcpy(next_stream_, x, size * sizeof(T));
        } else {
            if (has_stream_) run_best<Add>(typename Add::Args<T>{x, stream_, y}, 0, size);
            if (!has_stream_) std::memcpy(y, x, size * sizeof(T));
            std::memcpy(next_stream_, y, size * sizeof(T));
        }
        std::swap(stream_, next_stream_);
        has_stream_ = true;
    }

    void norm(const float* weight, const T* x, int64_t parts, int64_t width, T* y) const {
        rms_norm_forward(RMSNormForward<T>{x, nullptr, weight, step_.rows * parts, width, width, width, shape_.eps, y,
                                           nullptr, rstd_.get()},
                         num_threads_);
    }

    void norm_hidden(const float* weight) {
        norm(weight, hidden_, 1, shape_.hidden_size, normed_), std::swap(hidden_, normed_);
    }

    void rotate(const DecoderLayer<C>& layer, const T* x, int64_t heads, T* y) const {
        const RotaryTable& table = step_.tables[layer.table];
        const int64_t width = shape_.head_dim;
        rotary(Rotary<T>{x, 1, step_.rows, heads, width, 0, heads * width, width, table.cos, table.sin, width / 2,
                         step_.positions, 0, 1, 1.0f, false, y},
               num_threads_);
    }

    void attend(const DecoderLayer<C>& layer, const DecoderGroup& group) const {
        const int64_t heads = shape_.heads, kv_heads = shape_.kv_heads, width = shape_.head_dim, row = heads * width;
        const int64_t slot = kv_heads * width, block = shape_.block_size * slot, first = group.first_row * row;
        const DecodeShape shape{group.size, group.query_len,           heads,              kv_heads,
                                width,      shape_.blocks[layer.pool], shape_.block_size, group.max_blocks};
        const DecodeStrides strides{group.query_len * row, row, width, block, slot, width, block, slot, width};
        decode_attention(DecodeAttention<C>{shape, strides, kFloatType<T>, q_ + first, layer.keys, layer.values,
                                            group.block_tables[layer.pool], group.context_lens, shape_.scale, layer.window,
                                            shape_.softcap, attended_ + first},
                         num_threads_);
    }

    void activate() const {
        SwiGLU<T> call{};
        call.gate = gate_, call.up = up_, call.y = activated_, call.rows = 1;
        call.columns = call.gate_stride = call.up_stride = step_.rows * shape_.intermediate_size;
        call.gelu = shape_.gelu;
        swiglu_forward(call, num_threads_);
    }
};

}  // namespace

template <class T, class C>
void Decoder<T, C>::run(const DecoderStep<T>& step, int num_threads) const {
    Run<T, C> run(*this, step, num_threads);
    for (const DecoderLayer<C>& layer : layers) run.layer(layer);
    run.finish(norm);
}

template struct Decoder<float, float>;
template struct Decoder<float, Float16>;
template struct Decoder<BFloat16, BFloat16>;

}  // namespace fastlm::cpu
