// Sixteen floats at a time, in GCC's and Clang's vector extensions: one source that becomes AVX-512, AVX2, NEON or SSE
// by the target of the function it is inlined into. A kernel is a struct with an always-inline
// `run(const Args&, begin, end)`; `run_best` holds a build of it for each instruction set and calls the best one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/features.hpp"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed only to functions that are inlined

#define FASTLM_INLINE inline __attribute__((always_inline))

namespace fastlm::cpu {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr int64_t kLanes = 16;

FASTLM_INLINE Floats broadcast(float x) { return Floats{} + x; }

FASTLM_INLINE Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

FASTLM_INLINE Floats load(const BFloat16* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return (Floats)(__builtin_convertvector(h, Bits) << 16);
}

// fp16 numbers in the low halves. Exponent and mantissa move to where fp32 has them, and the exponent gets fp32's bias. A
// subnormal becomes 2^-14 + its value, less 2^-14: no step has a subnormal operand, which would take a hundred cycles.
FASTLM_INLINE Floats half_to_float(Bits bits) {
    const Bits magnitude = (bits & 0x7fffu) << 13;
    const Floats subnormal = (Floats)(magnitude + (113u << 23)) - 0x1p-14f;
    const Bits special = magnitude | 0x7f800000u;  // infinity or NaN, whose mantissa stays
    Bits value = magnitude >= 0x0f800000u ? special : magnitude + (112u << 23);
    value = magnitude < 0x00800000u ? (Bits)subnormal : value;
    return (Floats)(value | (bits & 0x8000u) << 16);
}

FASTLM_INLINE Floats load(const Float16* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return half_to_float(__builtin_convertvector(h, Bits));
}

FASTLM_INLINE void store(float* p, const Floats& v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even; NaN stays NaN.
FASTLM_INLINE void store(BFloat16* p, const Floats& v) {
    Bits bits = (Bits)v;
    Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    rounded = (Ints)(v != v) ? (Bits{} + 0x7fc0u) : rounded;
    Halves h = __builtin_convertvector(rounded, Halves);
    std::memcpy(p, &h, sizeof h);
}

// Rounds to nearest, ties to even; NaN stays NaN. Below 2^-14, where 0.5's last place is the subnormals', adding 0.5 rounds.
FASTLM_INLINE void store(Float16* p, const Floats& v) {
    const Bits sign = ((Bits)v >> 16) & 0x8000u, magnitude = (Bits)v & 0x7fffffffu;
    Bits rounded = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Bits subnormal = (Bits)((Floats)magnitude + 0.5f) - (Bits)broadcast(0.5f);
    rounded = magnitude < (113u << 23) ? subnormal : rounded;
    rounded = magnitude >= (143u << 23) ? Bits{} + 0x7c00u : rounded;
    rounded = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : rounded;
    const Halves h = __builtin_convertvector(rounded | sign, Halves);
    std::memcpy(p, &h, sizeof h);
}

// The first n < 16 elements at p, the rest `fill`.
template <class T>
FASTLM_INLINE Floats load_first(const T* p, int64_t n, float fill) {
    T lanes[kLanes] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    Floats v = load(lanes);
    for (int64_t i = n; i < kLanes; ++i) v[i] = fill;
    return v;
}

template <class T>
FASTLM_INLINE void store_first(T* p, int64_t n, const Floats& v) {
    T lanes[kLanes];
    store(lanes, v);
    std::memcpy(p, lanes, n * sizeof(T));
}

// The elements at p, at most 16: `left` of them, the rest 0.
template <class T>
FASTLM_INLINE Floats load_up_to(const T* p, int64_t left) {
    return left >= kLanes ? load(p) : load_first(p, left, 0.0f);
}

template <class T>
FASTLM_INLINE void store_up_to(T* p, int64_t left, const Floats& v) {
    left >= kLanes ? store(p, v) : store_first(p, left, v);
}

FASTLM_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

FASTLM_INLINE float sum(Floats v) {
    float half[8];
    for (int i = 0; i < 8; ++i) half[i] = v[i] + v[i + 8];
    for (int i = 0; i < 4; ++i) half[i] += half[i + 4];
    return (half[0] + half[2]) + (half[1] + half[3]);
}

FASTLM_INLINE float maximum(Floats v) {
    float half[8];
    for (int i = 0; i < 8; ++i) half[i] = v[i] > v[i + 8] ? v[i] : v[i + 8];
    for (int i = 0; i < 4; ++i) half[i] = half[i] > half[i + 4] ? half[i] : half[i + 4];
    const float even = half[0] > half[2] ? half[0] : half[2], odd = half[1] > half[3] ? half[1] : half[3];
    return even > odd ? even : odd;
}

// e^x to about one unit in the last place: x = n·ln 2 + r, |r| <= ln 2 / 2, and e^r = 1 + r + r²·p(r), p fitted for
// least greatest relative error (4e-9). Below -87.33, where results stop being normal, it is 0; from 88.38 it is
// infinity; NaN stays NaN.
FASTLM_INLINE Floats exp(Floats x) {
    // Between 127.5 · ln 2 and 128 · ln 2 r would be negative, and infinity + r · infinity is NaN.
    const Floats clamped = x > 88.376f ? broadcast(89.0f) : x;
    const float kRounder = 12582912.0f;  // 1.5·2^23: adding it leaves the nearest integer in the low bits
    const Floats shifted = clamped * 1.44269504f + kRounder;
    const Floats n = shifted - kRounder;
    const Floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats p = r * 0.0013814613f + 0.00836871f;
    p = p * r + 0.041668387f;
    p = p * r + 0.16666521f;
    p = p * r + 0.49999993f;
    const Floats power = (Floats)(((Bits)shifted << 23) + (Bits)broadcast(1.0f));
    const Floats result = ((p * r) * r + r) * power + power;
    return x < -87.33f ? broadcast(0.0f) : result;
}

FASTLM_INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

// To about two units in the last place; near 0, where the exponential form cancels, by its Taylor series.
FASTLM_INLINE Floats tanh(Floats x) {
    const Floats squared = x * x;
    Floats series = squared * (62.0f / 2835.0f) + -17.0f / 315.0f;
    series = series * squared + 2.0f / 15.0f;
    series = series * squared + -1.0f / 3.0f;
    series = (series * squared) * x + x;
    const Floats far = 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
    return squared < 0.0625f ? series : far;
}

#if defined(__x86_64__)
template <class Kernel, class Args>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(const Args& args, int64_t begin,
                                                                                      int64_t end) {
    Kernel::run(args, begin, end);
}

template <class Kernel, class Args>
__attribute__((target("avx2,fma"))) void run_avx2(const Args& args, int64_t begin, int64_t end) {
    Kernel::run(args, begin, end);
}
#endif

// Runs `Kernel` over [begin, end) of `args` with the widest instructions that this processor has.
template <class Kernel, class Args>
void run_best(const Args& args, int64_t begin, int64_t end) {
#if defined(__x86_64__)
    if (features().avx512) return run_avx512<Kernel>(args, begin, end);
    if (features().avx2) return run_avx2<Kernel>(args, begin, end);
#endif
    Kernel::run(args, begin, end);
}

}  // namespace fastlm::cpu
