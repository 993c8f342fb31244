// A tile: the weights of 32 output features over a panel of inputs, unpacked to bytes in the order in which the dot
// products take them.
#pragma once

#include <cstdint>

#include "cpu/quantized_formats.hpp"

namespace fastlm::cpu {

constexpr int kTileRows = 32;         // output features of a tile: two vectors of 16
constexpr int kPanel = 256;           // inputs of a tile: 8 KB of weights, which stay in the first-level cache
constexpr int kActivationGroup = 32;  // activations that share a scale

struct alignas(64) Tile {
    uint8_t q[kPanel / 4][kTileRows][4];  // four inputs of a feature side by side
    float scale[kPanel / 16][kTileRows];
    float minimum[kPanel / kActivationGroup][kTileRows];
};

// Eight rows, a vector each; their transpose holds four inputs of the eight rows in each vector.
struct EightRows {
    static constexpr int kRows = 8;
    using Vector = Words;

    static FASTLM_INLINE OneBlock block(const SixteenBlocks& rows, int row, int i) { return {rows.row(row + i)}; }

    static FASTLM_INLINE void transpose(Words* v) {
        Words a[8], b[8];
        for (int i = 0; i < 8; i += 2) {
            a[i] = FASTLM_SHUFFLE(Words, v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
            a[i + 1] = FASTLM_SHUFFLE(Words, v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
        }
        for (int i = 0; i < 8; i += 4) {
            for (int j = 0; j < 2; ++j) {
                b[i + 2 * j] = FASTLM_SHUFFLE(Words, a[i + j], a[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
                b[i + 2 * j + 1] = FASTLM_SHUFFLE(Words, a[i + j], a[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
            }
        }
        for (int i = 0; i < 4; ++i) {
            v[i] = FASTLM_SHUFFLE(Words, b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
            v[i + 4] = FASTLM_SHUFFLE(Words, b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
        }
    }
};

#ifdef FASTLM_JOINS_VECTORS
// Sixteen rows, two in each vector, for 64-byte registers. The third step of the transpose wants row i beside row i + 4.
struct SixteenRows {
    static constexpr int kRows = 16;
    using Vector = Bits;

    static FASTLM_INLINE TwoBlocks block(const SixteenBlocks& rows, int, int i) {
        const int row = i % 4 + i / 4 * 8;
        return {rows.row(row), rows.row(row + 4)};
    }

    static FASTLM_INLINE void transpose(Bits* v) {
        Octet a[8], b[8];
        for (int i = 0; i < 8; i += 2) {
            a[i] = (Octet)FASTLM_SHUFFLE(Bits, v[i], v[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
            a[i + 1] = (Octet)FASTLM_SHUFFLE(Bits, v[i], v[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15,
                                             31);
        }
        for (int i = 0; i < 8; i += 4) {
            for (int j = 0; j < 2; ++j) {
                b[i + 2 * j] = FASTLM_SHUFFLE(Octet, a[i + j], a[i + 2 + j], 0, 8, 2, 10, 4, 12, 6, 14);
                b[i + 2 * j + 1] = FASTLM_SHUFFLE(Octet, a[i + j], a[i + 2 + j], 1, 9, 3, 11, 5, 13, 7, 15);
            }
        }
        for (int i = 0; i < 4; ++i) {
            v[i] = (Bits)FASTLM_SHUFFLE(Octet, b[i], b[i + 4], 0, 1, 4, 5, 8, 9, 12, 13);
            v[i + 4] = (Bits)FASTLM_SHUFFLE(Octet, b[i], b[i + 4], 2, 3, 6, 7, 10, 11, 14, 15);
        }
    }
};
#else
using SixteenRows = EightRows;
#endif

// Weights 32 chunk … 32 chunk + 31 of a block of the rows `row` and on, as many as Rows holds: four inputs of each in v[i].
template <class Format, class Rows>
FASTLM_INLINE void unpack_chunk(const SixteenBlocks& source, int row, int chunk, typename Rows::Vector* v) {
    if constexpr (Rows::kRows == kLanes && Format::kUnpacksWords) {
        Format::unpack_words(source, v);
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) v[i] = (typename Rows::Vector)Format::unpack(Rows::block(source, row, i), chunk);
        Rows::transpose(v);
    }
}

// The weights of one block of sixteen rows to q[i][row][…]: four inputs of each i.
template <class Format, class Rows>
FASTLM_INLINE void unpack_block(const SixteenBlocks& source, uint8_t (*q)[kTileRows][4]) {
#pragma GCC unroll 2
    for (int row = 0; row < kLanes; row += Rows::kRows) {
#pragma GCC unroll 8
        for (int chunk = 0; chunk < Format::kBlock / 32; ++chunk) {
            typename Rows::Vector v[8];
            unpack_chunk<Format, Rows>(source, row, chunk, v);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) std::memcpy(q[chunk * 8 + i][row], &v[i], sizeof v[i]);
        }
    }
}

// Fetches as many bytes at `ahead` as one block of sixteen rows has. They may lie behind the weights: that does not fault.
template <class Format>
FASTLM_INLINE void fetch_blocks(uintptr_t& ahead) {
    for (int i = 0; i < kLanes * Format::kBlockBytes; i += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(ahead + i));
    }
    ahead += kLanes * Format::kBlockBytes;
}

// Unpacks `blocks` blocks of 32 rows that lie `stride` bytes apart, and fetches what lies at `ahead`.
template <class Format, class Rows>
FASTLM_INLINE void unpack_tile(const uint8_t* weight, int64_t stride, int blocks, uintptr_t ahead, Tile& tile) {
    constexpr int kGroups = Format::kBlock / Format::kGroup;
    for (int half = 0; half < kTileRows; half += kLanes) {
        SixteenBlocks source(weight + half * stride, stride);
        for (int block = 0; block < blocks; ++block) {
            fetch_blocks<Format>(ahead);
            Floats scale[kGroups], minimum[kGroups];
            Format::scales(source, scale, minimum);
            for (int i = 0; i < kGroups; ++i) {
                store(&tile.scale[block * kGroups + i][half], scale[i]);
                if (Format::kHasMinimum) store(&tile.minimum[block * kGroups + i][half], minimum[i]);
            }
            auto* q = reinterpret_cast<uint8_t(*)[kTileRows][4]>(tile.q[block * Format::kBlock / 4][half]);
            unpack_block<Format, Rows>(source, q);
            source.advance(Format::kBlockBytes);
        }
    }
}

}  // namespace fastlm::cpu
