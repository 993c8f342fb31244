// Products of small fp32 matrices that lie in cache. Four rows by four vectors of the result stay in registers: sixteen
// sums, each a chain of its own, which cover the multipliers' latency, and eight loads for sixteen multiplications.
#pragma once

#include <cstdint>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

constexpr int64_t kProductRows = 4;

// c += a · b for four rows of c and kVectors vectors of columns; or c = a · b. Element (row, step) of a is at
// a[row · a_row + step · a_step].
template <int kVectors, bool kAdd>
FASTLM_INLINE void multiply_registers(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                                      float* c, int64_t c_row, int64_t depth) {
    Floats sums[kProductRows][kVectors];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kProductRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = kAdd ? load(c + r * c_row + v * kLanes) : Floats{};
    }
    for (int64_t step = 0; step < depth; ++step, a += a_step, b += b_row) {
        Floats column[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) column[v] = load(b + v * kLanes);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kProductRows; ++r) {
            const float factor = a[r * a_row];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * column[v];
        }
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < kProductRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(c + r * c_row + v * kLanes, sums[r][v]);
    }
}

// The same for `rows`, a multiple of 4, and `columns`, a multiple of 16.
template <bool kAdd>
FASTLM_INLINE void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, float* c,
                            int64_t c_row, int64_t rows, int64_t columns, int64_t depth) {
    for (int64_t row = 0; row < rows; row += kProductRows) {
        const float* its_a = a + row * a_row;
        float* its_c = c + row * c_row;
        int64_t column = 0;
        for (; column + 4 * kLanes <= columns; column += 4 * kLanes) {
            multiply_registers<4, kAdd>(its_a, a_row, a_step, b + column, b_row, its_c + column, c_row, depth);
        }
        for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
            multiply_registers<2, kAdd>(its_a, a_row, a_step, b + column, b_row, its_c + column, c_row, depth);
        }
        if (column < columns) {
            multiply_registers<1, kAdd>(its_a, a_row, a_step, b + column, b_row, its_c + column, c_row, depth);
        }
    }
}

}  // namespace fastlm::cpu
