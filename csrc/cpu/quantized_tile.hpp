// A tile: the weights of 32 output features over a panel of inputs, unpacked to bytes in the order in which a vector
// kernel takes them, and its product with rows of 8-bit activations. Integer sums are exact, and what is done in floats is
// the same for every number of rows, so a row's result does not depend on the rows beside it.
#pragma once

#include <cstdint>

#include "cpu/quantized_formats.hpp"

namespace fastlm::cpu {

constexpr int kTileRows = 32;    // output features of a tile: two vectors of 16
constexpr int kPanel = 512;      // inputs of a tile: 16 KB of weights, which stay in the first-level cache
constexpr int kActivationGroup = 32;  // activations that share a scale
constexpr int kMaxRowsOnce = 6;  // rows of activations that a kernel takes at once: 6 · 2 sums fit the registers

struct alignas(64) Tile {
    uint8_t q[kPanel / 4][kTileRows][4];  // four inputs of a feature side by side
    float scale[kPanel / 16][kTileRows];
    float minimum[kPanel / kActivationGroup][kTileRows];
    uint32_t words[kPanel / 32][kTileRows];  // scales as they are stored: the most words a block are 1 of 32, 5 of 256
};

// Rows of activations, at most kMaxRowsOnce, over a panel.
struct Activations {
    const int8_t* q;            // [inputs / 4][rows][4]
    const float* scale;         // [inputs / 32][rows]
    const int32_t* correction;  // [inputs / weights' group][rows]: -kOffset · the sum of q in the group
    const float* sum;           // [inputs / 32][rows]: scale · the sum of q; only for formats with a minimum
};

// [8] vectors of eight 32-bit elements to their transpose.
FASTLM_INLINE void transpose(Words* v) {
    Words a[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = FASTLM_SHUFFLE(Words, v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        a[i + 1] = FASTLM_SHUFFLE(Words, v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    Words b[8];
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

// Asks for the line `distance` bytes on: the eight rows after these. It may lie behind the weights; that does not fault.
FASTLM_INLINE void fetch(const uint8_t* p, int64_t distance) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + distance));
}

// Unpacks `rows` <= 32 rows of `blocks` blocks, which lie `stride` bytes apart; features beyond `rows` get scale 0.
template <class Format>
FASTLM_INLINE void unpack_tile(const uint8_t* weight, int64_t stride, int rows, int blocks, Tile& tile) {
    constexpr int kChunks = Format::kBlock / 32, kGroups = Format::kBlock / Format::kGroup;
    for (int row = 0; row < kTileRows; row += 8) {
        const uint8_t* from[8];  // rows beyond the last repeat it; their scales become 0 below
        for (int r = 0; r < 8; ++r) from[r] = weight + (row + r < rows ? row + r : rows - 1) * stride;
        for (int block = 0; block < blocks; ++block) {
            for (int r = 0; r < 8; ++r) {
                for (int i = 0; i < Format::kWords; ++i) {
                    tile.words[block * Format::kWords + i][row + r] = Format::word(from[r], i);
                }
                for (int i = 0; i < Format::kBlockBytes; i += 64) fetch(from[r], 8 * stride + i);
            }
#pragma GCC unroll 8
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                Words v[8];
#pragma GCC unroll 8
                for (int r = 0; r < 8; ++r) v[r] = (Words)Format::unpack(from[r], chunk);
                transpose(v);
                auto* q = &tile.q[(block * kChunks + chunk) * 8][row];
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) std::memcpy(q + i * kTileRows, &v[i], sizeof v[i]);
            }
            for (int r = 0; r < 8; ++r) from[r] += Format::kBlockBytes;
        }
    }
    if (rows < kTileRows) {
        for (int i = 0; i < blocks * Format::kWords; ++i) {
            for (int row = rows; row < kTileRows; ++row) tile.words[i][row] = 0;
        }
    }
    for (int block = 0; block < blocks; ++block) {
        for (int half = 0; half < kTileRows; half += kLanes) {
            Bits words[Format::kWords];
            for (int i = 0; i < Format::kWords; ++i) {
                std::memcpy(&words[i], &tile.words[block * Format::kWords + i][half], sizeof words[i]);
            }
            Floats scale[kGroups], minimum[kGroups];
            Format::scales(words, scale, minimum);
            for (int i = 0; i < kGroups; ++i) {
                store(&tile.scale[block * kGroups + i][half], scale[i]);
                if (Format::kHasMinimum) store(&tile.minimum[block * kGroups + i][half], minimum[i]);
            }
        }
    }
}

}  // namespace fastlm::cpu
