// sums[row][feature] += tile · activations, for each instruction set. All compute, for each group of weights in order,
//     sums += float(integer dot product + correction) · (weight scale · activation scale)  -  minimum · activation sum
// where the integers are exact, and what is done in floats is the same for every number of rows: a row's result does not
// depend on the rows beside it.
#pragma once

#include <cstdint>

#include "cpu/quantized_tile.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastlm::cpu {

constexpr int kMaxRowsOnce = 6;  // rows of activations that a kernel takes at once: 6 · 2 sums fit the registers

// Rows of activations, at most kMaxRowsOnce, over a panel.
struct Activations {
    const int8_t* q;            // [inputs / 4][rows][4]
    const float* scale;         // [inputs / 32][rows]
    const int32_t* correction;  // [inputs / weights' group][rows]: -kOffset · the sum of q in the group
    const float* sum;           // [inputs / 32][rows]: scale · the sum of q
};

using Sums = float (*)[kTileRows];

struct Portable {
    static constexpr bool kMultipliesRow = false;

    template <class Format>
    static void unpack(const uint8_t* weight, int64_t stride, int blocks, uintptr_t ahead, Tile& tile) {
        unpack_tile<Format, EightRows>(weight, stride, blocks, ahead, tile);
    }

    template <class Format, int kRows>
    static void dot(const Tile& tile, int groups, const Activations& x, Sums sums) {
        constexpr int kPerScale = kActivationGroup / Format::kGroup, kSteps = Format::kGroup / 4;
        for (int g = 0; g < groups; ++g) {
            for (int row = 0; row < kRows; ++row) {
                const float x_scale = x.scale[g / kPerScale * kRows + row];
                for (int feature = 0; feature < kTileRows; ++feature) {
                    int32_t dot = x.correction[g * kRows + row];
                    for (int k = g * kSteps; k < (g + 1) * kSteps; ++k) {
                        for (int i = 0; i < 4; ++i) dot += tile.q[k][feature][i] * x.q[(k * kRows + row) * 4 + i];
                    }
                    float& sum = sums[row][feature];
                    sum += static_cast<float>(dot) * (tile.scale[g][feature] * x_scale);
                    if (Format::kHasMinimum) sum -= tile.minimum[g][feature] * x.sum[g * kRows + row];
                }
            }
        }
    }
};

#if defined(__x86_64__)

FASTLM_INLINE int32_t four_bytes(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

// _mm512_cvtepi32_ps makes GCC 12 warn of its own header.
FASTLM_INLINE Floats to_floats(__m512i v) { return __builtin_convertvector((Ints)v, Floats); }

#define FASTLM_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))

struct Avx512Vnni {
    static constexpr bool kMultipliesRow = SixteenRows::kRows == kLanes;

    template <class Format>
    FASTLM_AVX512_VNNI static void unpack(const uint8_t* weight, int64_t stride, int blocks, uintptr_t ahead, Tile& tile) {
        unpack_tile<Format, SixteenRows>(weight, stride, blocks, ahead, tile);
    }

    template <class Format, int kRows>
    FASTLM_AVX512_VNNI static void dot(const Tile& tile, int groups, const Activations& x, Sums sums) {
        constexpr int kPerScale = kActivationGroup / Format::kGroup, kSteps = Format::kGroup / 4;
        __m512 sum[kRows][2];
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row) {
            for (int half = 0; half < 2; ++half) sum[row][half] = _mm512_loadu_ps(&sums[row][half * 16]);
        }
        for (int g = 0; g < groups; ++g) {
            __m512i dot[kRows][2];
#pragma GCC unroll 6
            for (int row = 0; row < kRows; ++row) {
                dot[row][0] = dot[row][1] = _mm512_set1_epi32(x.correction[g * kRows + row]);
            }
#pragma GCC unroll 8
            for (int step = 0; step < kSteps; ++step) {
                const int k = g * kSteps + step;
                const __m512i w0 = _mm512_load_si512(&tile.q[k][0]), w1 = _mm512_load_si512(&tile.q[k][16]);
#pragma GCC unroll 6
                for (int row = 0; row < kRows; ++row) {
                    const __m512i four = _mm512_set1_epi32(four_bytes(x.q + (k * kRows + row) * 4));
                    dot[row][0] = _mm512_dpbusd_epi32(dot[row][0], w0, four);
                    dot[row][1] = _mm512_dpbusd_epi32(dot[row][1], w1, four);
                }
            }
            for (int half = 0; half < 2; ++half) {
                const __m512 scale = _mm512_load_ps(&tile.scale[g][half * 16]);
#pragma GCC unroll 6
                for (int row = 0; row < kRows; ++row) {
                    const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scale[g / kPerScale * kRows + row]));
                    sum[row][half] = _mm512_fmadd_ps(to_floats(dot[row][half]), both, sum[row][half]);
                }
                if (Format::kHasMinimum) {
                    const __m512 minimum = _mm512_load_ps(&tile.minimum[g][half * 16]);
#pragma GCC unroll 6
                    for (int row = 0; row < kRows; ++row) {
                        const __m512 x_sum = _mm512_set1_ps(x.sum[g * kRows + row]);
                        sum[row][half] = _mm512_fnmadd_ps(minimum, x_sum, sum[row][half]);
                    }
                }
            }
        }
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row) {
            for (int half = 0; half < 2; ++half) _mm512_storeu_ps(&sums[row][half * 16], sum[row][half]);
        }
    }

    // The same sums for 32 features over whole rows of weights and one row of activations: what is unpacked is used once, and
    // does not go through memory.
    template <class Format>
    FASTLM_AVX512_VNNI static void multiply_row(const uint8_t* weight, int64_t stride, int64_t blocks, uintptr_t ahead,
                                                const Activations& x, float* sums) {
        constexpr int kGroups = Format::kBlock / Format::kGroup, kSteps = Format::kGroup / 4;
        for (int half = 0; half < kTileRows; half += kLanes) {
            SixteenBlocks source(weight + half * stride, stride);
            const int8_t* q = x.q;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t block = 0; block < blocks; ++block) {
                fetch_blocks<Format>(ahead);
                Floats scale[kGroups], minimum[kGroups];
                Format::scales(source, scale, minimum);
#pragma GCC unroll 8
                for (int chunk = 0; chunk < Format::kBlock / 32; ++chunk) {
                    Bits words[8];
                    unpack_chunk<Format, SixteenRows>(source, 0, chunk, words);
#pragma GCC unroll 2
                    for (int part = 0; part < 8 / kSteps; ++part) {
                        const int i = chunk * (8 / kSteps) + part;
                        const int64_t g = block * kGroups + i;
                        __m512i even = _mm512_set1_epi32(x.correction[g]), odd = _mm512_setzero_si512();
#pragma GCC unroll 4
                        for (int step = 0; step < kSteps; step += 2, q += 8) {
                            const int word = part * kSteps + step;
                            even = _mm512_dpbusd_epi32(even, (__m512i)words[word], _mm512_set1_epi32(four_bytes(q)));
                            odd = _mm512_dpbusd_epi32(odd, (__m512i)words[word + 1], _mm512_set1_epi32(four_bytes(q + 4)));
                        }
                        const __m512 x_scale = _mm512_set1_ps(x.scale[g / (kActivationGroup / Format::kGroup)]);
                        const __m512 both = _mm512_mul_ps((__m512)scale[i], x_scale);
                        sum = _mm512_fmadd_ps(to_floats(_mm512_add_epi32(even, odd)), both, sum);
                        if (Format::kHasMinimum) {
                            sum = _mm512_fnmadd_ps((__m512)minimum[i], _mm512_set1_ps(x.sum[g]), sum);
                        }
                    }
                }
                source.advance(Format::kBlockBytes);
            }
            _mm512_storeu_ps(sums + half, sum);
        }
    }
};

#define FASTLM_AVX2 __attribute__((target("avx2,fma")))

struct Avx2 {
    static constexpr bool kMultipliesRow = false;

    template <class Format>
    FASTLM_AVX2 static void unpack(const uint8_t* weight, int64_t stride, int blocks, uintptr_t ahead, Tile& tile) {
        unpack_tile<Format, EightRows>(weight, stride, blocks, ahead, tile);
    }

    // Products of pairs are added in 16 bits, which saturate: two steps of weights up to 63 fit (2 · 2 · 63 · 127), and
    // one of signed weights, whose sign moves to the activations.
    template <class Format, int kRows>
    FASTLM_AVX2 static void dot(const Tile& tile, int groups, const Activations& x, Sums sums) {
        constexpr int kPerScale = kActivationGroup / Format::kGroup, kSteps = Format::kGroup / 4;
        constexpr bool kSigned = Format::kOffset == 128;
        const __m256i ones = _mm256_set1_epi16(1);
        for (int quarter = 0; quarter < kTileRows; quarter += 8) {
            __m256 sum[kRows];
            for (int row = 0; row < kRows; ++row) sum[row] = _mm256_loadu_ps(&sums[row][quarter]);
            for (int g = 0; g < groups; ++g) {
                __m256i dot[kRows];
                for (int row = 0; row < kRows; ++row) {
                    dot[row] = _mm256_set1_epi32(kSigned ? 0 : x.correction[g * kRows + row]);
                }
#pragma GCC unroll 4
                for (int step = 0; step < kSteps; step += 2) {
                    const int k = g * kSteps + step;
                    __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(&tile.q[k][quarter]));
                    __m256i w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(&tile.q[k + 1][quarter]));
                    if (kSigned) {
                        w0 = _mm256_xor_si256(w0, _mm256_set1_epi8(-128));
                        w1 = _mm256_xor_si256(w1, _mm256_set1_epi8(-128));
                    }
#pragma GCC unroll 6
                    for (int row = 0; row < kRows; ++row) {
                        const __m256i x0 = _mm256_set1_epi32(four_bytes(x.q + (k * kRows + row) * 4));
                        const __m256i x1 = _mm256_set1_epi32(four_bytes(x.q + ((k + 1) * kRows + row) * 4));
                        if (kSigned) {
                            const __m256i p0 = _mm256_maddubs_epi16(_mm256_abs_epi8(w0), _mm256_sign_epi8(x0, w0));
                            const __m256i p1 = _mm256_maddubs_epi16(_mm256_abs_epi8(w1), _mm256_sign_epi8(x1, w1));
                            dot[row] = _mm256_add_epi32(dot[row], _mm256_madd_epi16(p0, ones));
                            dot[row] = _mm256_add_epi32(dot[row], _mm256_madd_epi16(p1, ones));
                        } else {
                            const __m256i p =
                                _mm256_add_epi16(_mm256_maddubs_epi16(w0, x0), _mm256_maddubs_epi16(w1, x1));
                            dot[row] = _mm256_add_epi32(dot[row], _mm256_madd_epi16(p, ones));
                        }
                    }
                }
                const __m256 scale = _mm256_load_ps(&tile.scale[g][quarter]);
                for (int row = 0; row < kRows; ++row) {
                    const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x.scale[g / kPerScale * kRows + row]));
                    sum[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[row]), both, sum[row]);
                }
                if (Format::kHasMinimum) {
                    const __m256 minimum = _mm256_load_ps(&tile.minimum[g][quarter]);
                    for (int row = 0; row < kRows; ++row) {
                        sum[row] = _mm256_fnmadd_ps(minimum, _mm256_set1_ps(x.sum[g * kRows + row]), sum[row]);
                    }
                }
            }
            for (int row = 0; row < kRows; ++row) _mm256_storeu_ps(&sums[row][quarter], sum[row]);
        }
    }
};

#endif

}  // namespace fastlm::cpu
