// Reads each head once and writes it once; the angles' row serves all heads of a token.
#include "cpu/rotary.hpp"

#include <cstring>

#include "cpu/parallel.hpp"

namespace fastlm::cpu {
namespace {

constexpr int64_t kPart = 131072;  // elements that a thread takes at a time: some 25 µs, thrice what waking it costs

// One head whose pairs lie half a rotation apart.
template <class T>
FASTLM_INLINE void rotate_halves(const T* x, T* y, const float* cos, const float* sin, int64_t half, float sign) {
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t left = half - i;
        const Floats a = load_up_to(x + i, left), b = load_up_to(x + half + i, left);
        const Floats c = load_up_to(cos + i, left), s = load_up_to(sin + i, left) * sign;
        store_up_to(y + i, left, a * c - b * s);
        store_up_to(y + half + i, left, b * c + a * s);
    }
}

// One head whose pairs are neighbours: x · (cos, cos) + (b, a) · (-sin, sin) with both members of a pair in one vector.
template <class T>
FASTLM_INLINE void rotate_neighbours(const T* x, T* y, const float* cos, const float* sin, int64_t half, float sign) {
    for (int64_t i = 0; i < half; i += kLanes / 2) {
        const int64_t left = 2 * (half - i);
        const Floats both = load_up_to(x + 2 * i, left);
        Floats c{}, s{}, swapped{};
        for (int64_t j = 0; j < kLanes / 2 && i + j < half; ++j) {
            c[2 * j] = c[2 * j + 1] = cos[i + j];
            s[2 * j] = -sign * sin[i + j], s[2 * j + 1] = sign * sin[i + j];
        }
        for (int64_t j = 0; j < kLanes; ++j) swapped[j] = both[j ^ 1];
        store_up_to(y + 2 * i, left, both * c + swapped * s);
    }
}

struct Tokens {
    template <class T>
    static FASTLM_INLINE void run(const Rotary<T>& call, int64_t begin, int64_t end) {
        const int64_t half = call.half, rest = call.head_dim - 2 * half;
        for (int64_t token = begin; token < end; ++token) {
            const int64_t batch = token / call.seq, at = token % call.seq;
            int64_t position = at;
            if (call.positions) {
                position = call.positions[batch * call.positions_batch_stride + at * call.positions_seq_stride];
            }
            const float *cos = call.cos + position * half, *sin = call.sin + position * half;
            for (int64_t head = 0; head < call.heads; ++head) {
                const T* x = call.x + batch * call.batch_stride + at * call.seq_stride + head * call.head_stride;
                T* y = call.y + (token * call.heads + head) * call.head_dim;
                if (call.interleaved) {
                    rotate_neighbours(x, y, cos, sin, half, call.sign);
                } else {
                    rotate_halves(x, y, cos, sin, half, call.sign);
                }
                if (rest) std::memcpy(y + 2 * half, x + 2 * half, rest * sizeof(T));
            }
        }
    }
};

}  // namespace

template <class T>
void rotary(const Rotary<T>& call, int num_threads) {
    run_parallel<Tokens>(call, call.batch * call.seq, items_of(call.heads * call.head_dim, kPart), num_threads);
}

template void rotary(const Rotary<float>&, int);
template void rotary(const Rotary<BFloat16>&, int);

}  // namespace fastlm::cpu
