// Three passes over a row that stays in cache (32 KB in fp32 at a vocabulary of 8192): its maximum and sum; the
// exponentials, their sum and the entropy's; the gradient. The exponentials of the second pass are kept for the third
// in the row itself, or, for bf16 and under a softcap, in an fp32 scratch row, so that each is taken once. The slope of
// the softcap is taken from the logits as they were: 1 - tanh² of the capped ones has no digits left near ±softcap.
// Rows are independent: the result does not depend on the number of threads.
#include "cpu/cross_entropy.hpp"

#include <limits>
#include <memory>
#include <type_traits>

#include "cpu/parallel.hpp"

namespace fastlm::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPart = 131072;  // elements that a thread takes at a time: some 25 µs, thrice what waking it costs

template <bool kSoftcap>
FASTLM_INLINE Floats cap(Floats x, float softcap, float inverse) {
    if constexpr (kSoftcap) return softcap * tanh(x * inverse);
    return x;
}

// The derivative of tanh, 1 / cosh², from t = exp(-2 |x|), of which no digit cancels.
FASTLM_INLINE Floats tanh_slope(Floats x) {
    const Floats t = exp(-2.0f * maximum(x, -x)), sum = 1.0f + t;
    return 4.0f * t / (sum * sum);
}

// One row whose target counts. `work` holds vocab_size floats; without a softcap it may be the row itself.
template <class T, bool kSoftcap>
FASTLM_INLINE void run_row(const CrossEntropy<T>& call, int64_t row, float* work) {
    T* logits = call.logits + row * call.stride;
    const int64_t vocab_size = call.vocab_size, target = call.targets[row];
    const int64_t whole = vocab_size / kLanes * kLanes, rest = vocab_size - whole;
    const float softcap = call.softcap, inverse = kSoftcap ? 1.0f / softcap : 0.0f;
    constexpr bool kCopies = kSoftcap || !std::is_same_v<T, float>;

    Floats max0 = broadcast(-kInfinity), max1 = max0, sum0{}, sum1{};
    int64_t i = 0;
    for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
        const Floats x0 = cap<kSoftcap>(load(logits + i), softcap, inverse);
        const Floats x1 = cap<kSoftcap>(load(logits + i + kLanes), softcap, inverse);
        max0 = maximum(max0, x0), max1 = maximum(max1, x1);
        sum0 += x0, sum1 += x1;
        if constexpr (kCopies) store(work + i, x0), store(work + i + kLanes, x1);
    }
    for (; i < vocab_size; i += kLanes) {
        const int64_t n = i < whole ? kLanes : rest;
        const Floats x = cap<kSoftcap>(load_first(logits + i, n, 0.0f), softcap, inverse);
        sum0 += x;
        store_first(work + i, n, x);
        max0 = maximum(max0, load_first(work + i, n, -kInfinity));
    }
    const float max = maximum(maximum(max0, max1)), mean = sum(sum0 + sum1) / vocab_size;
    const float target_logit = work[target];

    Floats exp0{}, exp1{}, weighted0{}, weighted1{};
    const bool keeps = call.scale;
    for (i = 0; i + 2 * kLanes <= whole; i += 2 * kLanes) {
        const Floats x0 = load(work + i) - max, x1 = load(work + i + kLanes) - max;
        const Floats e0 = exp(x0), e1 = exp(x1);
        exp0 += e0, exp1 += e1;
        weighted0 += e0 * x0, weighted1 += e1 * x1;
        if (keeps) store(work + i, e0), store(work + i + kLanes, e1);
    }
    for (; i < vocab_size; i += kLanes) {
        const int64_t n = i < whole ? kLanes : rest;
        const Floats x = load_first(work + i, n, max - 1000.0f) - max;  // e^-1000 is 0
        const Floats e = exp(x);
        exp0 += e, weighted0 += e * x;
        if (keeps) store_first(work + i, n, e);
    }
    const float normalizer = sum(exp0 + exp1), log_normalizer = std::log(normalizer);
    const float lse = max + log_normalizer, logprob = (target_logit - max) - log_normalizer;
    const float smoothing = call.label_smoothing;
    call.losses[row] = -(1.0f - smoothing) * logprob + smoothing * (lse - mean) + call.z_loss * lse * lse;
    call.logprobs[row] = logprob;
    call.entropy[row] = log_normalizer - sum(weighted0 + weighted1) / normalizer;
    if (!call.scale) return;

    const float scale = call.scale[row];
    const float factor = scale * (1.0f + 2.0f * call.z_loss * lse) / normalizer;
    const float uniform = scale * smoothing / vocab_size;
    float at_target = factor * std::exp(target_logit - max) - uniform - scale * (1.0f - smoothing);
    if constexpr (kSoftcap) at_target *= tanh_slope(load_first(logits + target, 1, 0.0f) * inverse)[0];
    for (i = 0; i < vocab_size; i += kLanes) {
        const int64_t left = vocab_size - i;
        Floats gradient = load_up_to(work + i, left) * factor - uniform;
        if constexpr (kSoftcap) gradient *= tanh_slope(load_up_to(logits + i, left) * inverse);
        store_up_to(logits + i, left, gradient);
    }
    store_first(logits + target, 1, broadcast(at_target));
}

// A row whose target is ignored (value 0) or out of range (NaN).
template <class T>
FASTLM_INLINE void fill_row(const CrossEntropy<T>& call, int64_t row, float value) {
    call.losses[row] = call.logprobs[row] = call.entropy[row] = value;
    if (!call.scale) return;
    T* logits = call.logits + row * call.stride;
    for (int64_t i = 0; i < call.vocab_size; i += kLanes) {
        store_first(logits + i, call.vocab_size - i < kLanes ? call.vocab_size - i : kLanes, broadcast(value));
    }
}

struct Rows {
    template <class T>
    static FASTLM_INLINE void run(const CrossEntropy<T>& call, int64_t begin, int64_t end) {
        std::unique_ptr<float[]> scratch;
        if (!std::is_same_v<T, float> || call.softcap > 0) scratch.reset(new float[call.vocab_size]);
        for (int64_t row = begin; row < end; ++row) {
            const int64_t target = call.targets[row];
            float* work = scratch.get();
            if constexpr (std::is_same_v<T, float>) work = work ? work : call.logits + row * call.stride;
            if (target == call.ignore_index) {
                fill_row(call, row, 0.0f);
            } else if (target < 0 || target >= call.vocab_size) {
                fill_row(call, row, std::numeric_limits<float>::quiet_NaN());
            } else if (call.softcap > 0) {
                run_row<T, true>(call, row, work);
            } else {
                run_row<T, false>(call, row, work);
            }
        }
    }
};

}  // namespace

template <class T>
void cross_entropy(const CrossEntropy<T>& call, int num_threads) {
    run_parallel<Rows>(call, call.rows, items_of(call.vocab_size, kPart), num_threads);
}

template void cross_entropy(const CrossEntropy<float>&, int);
template void cross_entropy(const CrossEntropy<BFloat16>&, int);

}  // namespace fastlm::cpu
