// ggml's block formats (ggml-common.h), each as a struct that unpacks them: every weight becomes an unsigned byte q, and
// weight = scale · (q - kOffset) - minimum, with a scale, and in some formats a minimum, for each kGroup weights.
// Written once in vector extensions; the function that it is inlined into decides the instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/shuffle.hpp"
#include "cpu/vector16.hpp"

namespace fastlm::cpu {

typedef uint8_t Bytes __attribute__((vector_size(32)));    // 32 weights of a row
typedef uint32_t Words __attribute__((vector_size(32)));   // the same, four weights an element
typedef uint8_t Bytes2 __attribute__((vector_size(64)));   // 32 weights of each of two rows
typedef uint64_t Pair __attribute__((vector_size(16)));
typedef uint64_t Quad __attribute__((vector_size(32)));
typedef uint64_t Octet __attribute__((vector_size(64)));

#ifdef FASTLM_JOINS_VECTORS
FASTLM_INLINE Quad join(const Pair& a, const Pair& b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3); }

FASTLM_INLINE Octet join(const Quad& a, const Quad& b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
}
#endif

template <class V>
FASTLM_INLINE V load_as(const uint8_t* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// A block of one row, and what formats read of its bytes.
struct OneBlock {
    const uint8_t* p;

    FASTLM_INLINE Bytes bytes(int at) const { return load_as<Bytes>(p + at); }

    // 16 bytes to 32: their low halves, then their high halves.
    FASTLM_INLINE Bytes nibbles(int at) const {
        const Pair v = load_as<Pair>(p + at);
        return (Bytes)(Quad{v[0], v[1], v[0], v[1]} >> Quad{0, 0, 4, 4}) & 15;
    }

    // 32 bits to 32 bytes: bit i becomes bit 4 of byte i.
    FASTLM_INLINE Bytes bits(int at) const {
        const Bytes all = (Bytes)(Words{} + load_as<uint32_t>(p + at));
        const Bytes spread = FASTLM_SHUFFLE(Bytes, all, all, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 18, 18, 18,
                                            18, 18, 18, 18, 18, 19, 19, 19, 19, 19, 19, 19, 19);
        const Bytes bit = (Bytes)(Quad{} + 0x8040201008040201u);
        return (Bytes)((spread & bit) == bit) & 16;
    }
};

#ifdef FASTLM_JOINS_VECTORS
// Blocks of two rows, beside each other in one vector.
struct TwoBlocks {
    const uint8_t *p, *q;

    FASTLM_INLINE Bytes2 bytes(int at) const { return (Bytes2)join(load_as<Quad>(p + at), load_as<Quad>(q + at)); }
};
#endif

// The same block of sixteen rows.
struct SixteenBlocks {
    const uint8_t* p[4];  // of rows 0, 4, 8 and 12: compilers that see one pointer keep sixteen, and spill them
    int64_t stride;       // bytes from row to row

    FASTLM_INLINE SixteenBlocks(const uint8_t* first, int64_t stride) : stride(stride) {
        for (int i = 0; i < 4; ++i) {
            p[i] = first + 4 * i * stride;
            asm("" : "+r"(p[i]));
        }
    }

    FASTLM_INLINE const uint8_t* row(int i) const { return p[i / 4] + i % 4 * stride; }

    FASTLM_INLINE void advance(int bytes) {
        for (int i = 0; i < 4; ++i) p[i] += bytes;
    }

    // The four 32-bit words at byte `at` of each.
    FASTLM_INLINE void words(int at, Bits* w) const {
#ifdef FASTLM_JOINS_VECTORS
        Bits rows[4], halves[4];  // rows[i] holds rows i, 4 + i, 8 + i, 12 + i
        for (int i = 0; i < 4; ++i) {
            Pair v[4];
            for (int j = 0; j < 4; ++j) v[j] = load_as<Pair>(row(4 * j + i) + at);
            rows[i] = (Bits)join(join(v[0], v[1]), join(v[2], v[3]));
        }
        for (int i = 0; i < 2; ++i) {
            const Bits a = rows[2 * i], b = rows[2 * i + 1];
            halves[i] = FASTLM_SHUFFLE(Bits, a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
            halves[i + 2] = FASTLM_SHUFFLE(Bits, a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
        }
        for (int i = 0; i < 4; i += 2) {
            const Octet a = (Octet)halves[i], b = (Octet)halves[i + 1];
            w[i] = (Bits)FASTLM_SHUFFLE(Octet, a, b, 0, 8, 2, 10, 4, 12, 6, 14);
            w[i + 1] = (Bits)FASTLM_SHUFFLE(Octet, a, b, 1, 9, 3, 11, 5, 13, 7, 15);
        }
#else
        for (int i = 0; i < 4; ++i) {
            for (int lane = 0; lane < kLanes; ++lane) w[i][lane] = load_as<uint32_t>(row(lane) + at + 4 * i);
        }
#endif
    }

    // Of 16 bytes each: the low halves as four words, then the high halves.
    FASTLM_INLINE void nibbles(int at, Bits* w) const {
        words(at, w);
        for (int i = 0; i < 4; ++i) {
            w[i + 4] = (w[i] >> 4) & 0x0f0f0f0fu;
            w[i] &= 0x0f0f0f0fu;
        }
    }
};

// What the formats have in common:
//   kBlock, kBlockBytes, kGroup, kOffset, kHasMinimum as above.
//   scales(blocks, scale, minimum): those of the kBlock / kGroup groups of sixteen blocks.
//   unpack(block, i): q of weights 32 i … 32 i + 31, of OneBlock or TwoBlocks.
//   unpack_words(blocks, q), where kUnpacksWords, is quicker for wide registers: q[i] holds weights 4 i … 4 i + 3 of a block of sixteen rows.

// Of the formats of 32 weights: the block begins with its scale.
FASTLM_INLINE Floats first_half(const SixteenBlocks& blocks) {
    Bits words[4];
    blocks.words(0, words);
    return half_to_float(words[0] & 0xffffu);
}

struct Q8_0 {
    static constexpr int kBlock = 32, kBlockBytes = 34, kGroup = 32, kOffset = 128;
    static constexpr bool kHasMinimum = false, kUnpacksWords = false;
    static FASTLM_INLINE void scales(const SixteenBlocks& blocks, Floats* scale, Floats*) { scale[0] = first_half(blocks); }
    template <class Block>
    static FASTLM_INLINE auto unpack(const Block& block, int) {
        return block.bytes(2) ^ 0x80;
    }
};

struct Q4_0 {
    static constexpr int kBlock = 32, kBlockBytes = 18, kGroup = 32, kOffset = 8;
    static constexpr bool kHasMinimum = false, kUnpacksWords = true;
    static FASTLM_INLINE void scales(const SixteenBlocks& blocks, Floats* scale, Floats*) { scale[0] = first_half(blocks); }
    template <class Block>
    static FASTLM_INLINE auto unpack(const Block& block, int) {
        return block.nibbles(2);
    }
    static FASTLM_INLINE void unpack_words(const SixteenBlocks& blocks, Bits* q) { blocks.nibbles(2, q); }
};

// Bits 0 to 3 of a word to bit 4 of its four bytes.
FASTLM_INLINE Bits fifth_bits(const Bits& v) {
#if defined(__clang__)
    return ((v & 15u) * 0x02040810u) & 0x10101010u;
#else  // a look-up among sixteen lanes, which is quicker than multiplying
    const Bits all = {0x00000000, 0x00000010, 0x00001000, 0x00001010, 0x00100000, 0x00100010, 0x00101000, 0x00101010,
                      0x10000000, 0x10000010, 0x10001000, 0x10001010, 0x10100000, 0x10100010, 0x10101000, 0x10101010};
    return __builtin_shuffle(all, v);
#endif
}

struct Q5_0 {
    static constexpr int kBlock = 32, kBlockBytes = 22, kGroup = 32, kOffset = 16;
    static constexpr bool kHasMinimum = false, kUnpacksWords = true;
    static FASTLM_INLINE void scales(const SixteenBlocks& blocks, Floats* scale, Floats*) { scale[0] = first_half(blocks); }
    template <class Block>
    static FASTLM_INLINE auto unpack(const Block& block, int) {
        return block.nibbles(6) | block.bits(2);
    }
    static FASTLM_INLINE void unpack_words(const SixteenBlocks& blocks, Bits* q) {
        Bits first[4];
        blocks.words(2, first);
        blocks.nibbles(6, q);
        for (int i = 0; i < 8; ++i) q[i] |= fifth_bits(first[0] >> (4 * i));
    }
};

// Of Q4_K and Q5_K: the first word holds the fp16 scales of scales and of minimums, the other three eight scales and
// eight minimums of 6 bits each.
FASTLM_INLINE void k_scales(const SixteenBlocks& blocks, Floats* scale, Floats* minimum) {
    Bits words[4];
    blocks.words(0, words);
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
    static constexpr int kBlock = 256, kBlockBytes = 144, kGroup = 32, kOffset = 0;
    static constexpr bool kHasMinimum = true, kUnpacksWords = false;
    static FASTLM_INLINE void scales(const SixteenBlocks& blocks, Floats* scale, Floats* minimum) {
        k_scales(blocks, scale, minimum);
    }
    template <class Block>
    static FASTLM_INLINE auto unpack(const Block& block, int i) {
        const auto v = block.bytes(16 + i / 2 * 32);
        return i % 2 ? v >> 4 : v & 15;
    }
};

struct Q5_K {
    static constexpr int kBlock = 256, kBlockBytes = 176, kGroup = 32, kOffset = 0;
    static constexpr bool kHasMinimum = true, kUnpacksWords = false;
    static FASTLM_INLINE void scales(const SixteenBlocks& blocks, Floats* scale, Floats* minimum) {
        k_scales(blocks, scale, minimum);
    }
    template <class Block>
    static FASTLM_INLINE auto unpack(const Block& block, int i) {
        const auto v = block.bytes(48 + i / 2 * 32), high = block.bytes(16);
        const auto bit = i < 4 ? high << (4 - i) : high >> (i - 4);
        return (i % 2 ? v >> 4 : v & 15) | (bit & 16);
    }
};

struct Q6_K {
    static constexpr int kBlock = 256, kBlockBytes = 210, kGroup = 16, kOffset = 32;
    static constexpr bool kHasMinimum = false, kUnpacksWords = false;
    static FASTLM_INLINE void scales(const SixteenBlocks& blocks, Floats* scale, Floats*) {
        Bits words[4];
        blocks.words(192, words);
        Bits last[4];
        blocks.words(194, last);
        const Floats d = half_to_float(last[3] >> 16);
        for (int i = 0; i < 16; ++i) {
            const Ints code = (Ints)(words[i / 4] << (24 - 8 * (i % 4))) >> 24;  // signed bytes
            scale[i] = d * __builtin_convertvector(code, Floats);
        }
    }
    template <class Block>
    static FASTLM_INLINE auto unpack(const Block& block, int i) {
        const int part = i / 4, quarter = i % 4;  // 128 weights a part
        const auto v = block.bytes(part * 64 + quarter % 2 * 32), high = block.bytes(128 + part * 32);
        const auto bits = quarter < 2 ? high << (4 - 2 * quarter) : high >> (2 * quarter - 4);
        return (quarter < 2 ? v & 15 : v >> 4) | (bits & 48);
    }
};

}  // namespace fastlm::cpu
