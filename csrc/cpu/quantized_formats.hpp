// ggml's block formats (ggml-common.h), each as a struct that unpacks them: every weight becomes an unsigned byte q, and
// weight = scale · (q - kOffset) - minimum, with a scale, and in some formats a minimum, for each kGroup weights.
// Written once in vector extensions; the function that it is inlined into decides the instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

typedef uint8_t Bytes __attribute__((vector_size(32)));   // 32 weights
typedef uint32_t Words __attribute__((vector_size(32)));  // the same, four weights an element

#if defined(__clang__)
#define FASTLM_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTLM_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

FASTLM_INLINE Bytes load_bytes(const uint8_t* p) {
    Bytes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// 16 bytes to 32: their low halves, then their high halves.
FASTLM_INLINE Bytes load_nibbles(const uint8_t* p) {
    typedef uint64_t Pair __attribute__((vector_size(16)));
    typedef uint64_t Quads __attribute__((vector_size(32)));
    Pair v;
    std::memcpy(&v, p, sizeof v);
    return (Bytes)(Quads{v[0], v[1], v[0], v[1]} >> Quads{0, 0, 4, 4}) & 15;
}

FASTLM_INLINE uint32_t load_word(const uint8_t* p) {
    uint32_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

FASTLM_INLINE uint32_t load_half(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, sizeof half);
    return half;
}

// What the formats have in common:
//   kBlock, kBlockBytes, kGroup, kOffset, kHasMinimum as above.
//   kWords and word(block, i): the 32-bit words that hold a block's scales.
//   scales(words, scale, minimum): those of kBlock / kGroup groups, of sixteen blocks at a time: words[i] holds
//       word(block, i) of sixteen blocks.
//   unpack(block, i): q of weights 32 i … 32 i + 31.

struct Q8_0 {
    static constexpr int kBlock = 32, kBlockBytes = 34, kGroup = 32, kOffset = 128, kWords = 1;
    static constexpr bool kHasMinimum = false;
    static FASTLM_INLINE uint32_t word(const uint8_t* block, int) { return load_half(block); }
    static FASTLM_INLINE void scales(const Bits* words, Floats* scale, Floats*) { scale[0] = half_to_float(words[0]); }
    static FASTLM_INLINE Bytes unpack(const uint8_t* block, int) { return load_bytes(block + 2) ^ 0x80; }
};

struct Q4_0 {
    static constexpr int kBlock = 32, kBlockBytes = 18, kGroup = 32, kOffset = 8, kWords = 1;
    static constexpr bool kHasMinimum = false;
    static FASTLM_INLINE uint32_t word(const uint8_t* block, int) { return load_half(block); }
    static FASTLM_INLINE void scales(const Bits* words, Floats* scale, Floats*) { scale[0] = half_to_float(words[0]); }
    static FASTLM_INLINE Bytes unpack(const uint8_t* block, int) { return load_nibbles(block + 2); }
};

struct Q5_0 {
    static constexpr int kBlock = 32, kBlockBytes = 22, kGroup = 32, kOffset = 16, kWords = 1;
    static constexpr bool kHasMinimum = false;
    static FASTLM_INLINE uint32_t word(const uint8_t* block, int) { return load_half(block); }
    static FASTLM_INLINE void scales(const Bits* words, Floats* scale, Floats*) { scale[0] = half_to_float(words[0]); }
    static FASTLM_INLINE Bytes unpack(const uint8_t* block, int) {
        const Bytes all = (Bytes)(Words{} + load_word(block + 2));  // bit i of the word is bit 4 of weight i
        const Bytes spread = FASTLM_SHUFFLE(Bytes, all, all, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 18, 18, 18,
                                            18, 18, 18, 18, 18, 19, 19, 19, 19, 19, 19, 19, 19);
        constexpr Bytes kBit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128,
                                1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
        const Bytes set = (Bytes)((spread & kBit) == kBit);
        return load_nibbles(block + 6) | (set & 16);
    }
};

// Eight 6-bit scales and eight 6-bit minimums in words 1 to 3; word 0 holds the fp16 scales of both.
FASTLM_INLINE void k_scales(const Bits* words, Floats* scale, Floats* minimum) {
    const Floats d = half_to_float(words[0] & 0xffffu), d_minimum = half_to_float(words[0] >> 16);
    for (int i = 0; i < 4; ++i) {
        const Bits a = words[1] >> (8 * i), b = words[2] >> (8 * i), c = words[3] >> (8 * i);
        scale[i] = d * __builtin_convertvector((Ints)(a & 63u), Floats);
        minimum[i] = d_minimum * __builtin_convertvector((Ints)(b & 63u), Floats);
        scale[i + 4] = d * __builtin_convertvector((Ints)((c & 15u) | ((a >> 2) & 48u)), Floats);
        minimum[i + 4] = d_minimum * __builtin_convertvector((Ints)(((c >> 4) & 15u) | ((b >> 2) & 48u)), Floats);
    }
}

struct Q4_K {
    static constexpr int kBlock = 256, kBlockBytes = 144, kGroup = 32, kOffset = 0, kWords = 4;
    static constexpr bool kHasMinimum = true;
    static FASTLM_INLINE uint32_t word(const uint8_t* block, int i) { return load_word(block + 4 * i); }
    static FASTLM_INLINE void scales(const Bits* words, Floats* scale, Floats* minimum) {
        k_scales(words, scale, minimum);
    }
    static FASTLM_INLINE Bytes unpack(const uint8_t* block, int i) {
        const Bytes v = load_bytes(block + 16 + i / 2 * 32);
        return i % 2 ? v >> 4 : v & 15;
    }
};

struct Q5_K {
    static constexpr int kBlock = 256, kBlockBytes = 176, kGroup = 32, kOffset = 0, kWords = 4;
    static constexpr bool kHasMinimum = true;
    static FASTLM_INLINE uint32_t word(const uint8_t* block, int i) { return load_word(block + 4 * i); }
    static FASTLM_INLINE void scales(const Bits* words, Floats* scale, Floats* minimum) {
        k_scales(words, scale, minimum);
    }
    static FASTLM_INLINE Bytes unpack(const uint8_t* block, int i) {
        const Bytes v = load_bytes(block + 48 + i / 2 * 32), high = load_bytes(block + 16);
        const Bytes bit = i < 4 ? (high << (4 - i)) & 16 : (high >> (i - 4)) & 16;
        return (i % 2 ? v >> 4 : v & 15) | bit;
    }
};

struct Q6_K {
    static constexpr int kBlock = 256, kBlockBytes = 210, kGroup = 16, kOffset = 32, kWords = 5;
    static constexpr bool kHasMinimum = false;
    static FASTLM_INLINE uint32_t word(const uint8_t* block, int i) {
        return i < 4 ? load_word(block + 192 + 4 * i) : load_half(block + 208);
    }
    static FASTLM_INLINE void scales(const Bits* words, Floats* scale, Floats*) {
        const Floats d = half_to_float(words[4]);
        for (int i = 0; i < 16; ++i) {
            const Ints code = (Ints)(words[i / 4] << (24 - 8 * (i % 4))) >> 24;  // signed bytes
            scale[i] = d * __builtin_convertvector(code, Floats);
        }
    }
    static FASTLM_INLINE Bytes unpack(const uint8_t* block, int i) {
        const int part = i / 4, quarter = i % 4;  // 128 weights a part
        const Bytes v = load_bytes(block + part * 64 + quarter % 2 * 32), high = load_bytes(block + 128 + part * 32);
        const Bytes low = quarter < 2 ? v & 15 : v >> 4;
        const Bytes bits = quarter < 2 ? high << (4 - 2 * quarter) : high >> (2 * quarter - 4);
        return low | (bits & 48);
    }
};

}  // namespace fastlm::cpu
