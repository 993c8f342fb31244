// Rows of activations as 8-bit integers in groups of 32 that share a scale, laid out as the dot products read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/quantized_dot.hpp"
#include "cpu/vector16.hpp"

namespace fastlm::cpu {

// Batches of up to kMaxRowsOnce rows, as even as they come.
struct RowBatches {
    explicit RowBatches(int64_t rows) : rows(rows), count((rows + kMaxRowsOnce - 1) / kMaxRowsOnce) {}
    int64_t begin(int64_t batch) const { return rows * batch / count; }
    int64_t size(int64_t batch) const { return begin(batch + 1) - begin(batch); }
    int64_t rows, count;
};

template <class T>
struct QuantizedRows {
    const T* x;
    int64_t stride, in_features;
    RowBatches batches;
    int weight_group, weight_offset;
    int8_t* q;
    float *scale, *sum;
    int32_t* correction;

    // Batch `i` from input `k` on.
    Activations at(int64_t i, int64_t k) const {
        const int64_t rows = batches.size(i), start = batches.begin(i) * in_features + k * rows;
        return {q + start, scale + start / kActivationGroup, correction + start / weight_group,
                sum + start / kActivationGroup};
    }
};

// Quantizes batches [begin, end): q = round(x / scale), scale = max |x| / 127. A group with NaN or infinity gets the scale
// NaN, so that every result of its row is NaN.
struct QuantizeRows {
    template <class T>
    static FASTLM_INLINE void run(const QuantizedRows<T>& to, int64_t begin, int64_t end) {
        for (int64_t batch = begin; batch < end; ++batch) {
            const int64_t rows = to.batches.size(batch);
            const Activations at = to.at(batch, 0);
            for (int64_t r = 0; r < rows; ++r) {
                const T* x = to.x + (to.batches.begin(batch) + r) * to.stride;
                for (int64_t k = 0; k < to.in_features; k += kActivationGroup) {
                    const Floats values[2] = {load(x + k), load(x + k + kLanes)};
                    group(to, at, rows, r, k, values);
                }
            }
        }
    }

    template <class T>
    static FASTLM_INLINE void group(const QuantizedRows<T>& to, const Activations& at, int64_t rows, int64_t r, int64_t k,
                                    const Floats* values) {
        const Floats a = values[0], b = values[1];
        const Bits magnitude_a = (Bits)a & 0x7fffffffu, magnitude_b = (Bits)b & 0x7fffffffu;
        const float largest = maximum_magnitude(magnitude_a > magnitude_b ? magnitude_a : magnitude_b);
        // Below 1e-30, 127 / largest would overflow; such a group is 0.
        const bool is_finite = largest <= 3.4028234e38f, is_zero = largest < 1e-30f;
        const float inverse = is_finite && !is_zero ? 127.0f / largest : 0.0f;
        const float scale = is_finite ? (is_zero ? 0.0f : largest / 127.0f) : __builtin_nanf("");
        const Ints q_a = rounded(a, inverse, is_finite), q_b = rounded(b, inverse, is_finite);
        int8_t q[kActivationGroup];
        narrow(q_a, q), narrow(q_b, q + kLanes);
        for (int i = 0; i < kActivationGroup / 4; ++i) {
            std::memcpy(const_cast<int8_t*>(at.q) + ((k / 4 + i) * rows + r) * 4, q + 4 * i, 4);
        }
        const int32_t sum_a = sum(q_a), sum_b = sum(q_b);
        const int64_t g = k / kActivationGroup * rows + r;
        const_cast<float*>(at.scale)[g] = scale;
        const_cast<float*>(at.sum)[g] = scale * static_cast<float>(sum_a + sum_b);
        int32_t* correction = const_cast<int32_t*>(at.correction);
        if (to.weight_group == kActivationGroup) {
            correction[g] = -to.weight_offset * (sum_a + sum_b);
        } else {
            correction[k / kLanes * rows + r] = -to.weight_offset * sum_a;
            correction[(k / kLanes + 1) * rows + r] = -to.weight_offset * sum_b;
        }
    }

    static FASTLM_INLINE float maximum_magnitude(Bits v) {
        uint32_t m = v[0];
        for (int i = 1; i < kLanes; ++i) m = m > v[i] ? m : v[i];
        float f;
        std::memcpy(&f, &m, sizeof f);
        return f;
    }

    static FASTLM_INLINE Ints rounded(Floats x, float inverse, bool is_finite) {
        const float kRounder = 12582912.0f;  // 1.5·2^23: adding it leaves the nearest integer in the low bits
        const Ints q = (Ints)(x * inverse + kRounder) - (Ints)broadcast(kRounder);
        return is_finite ? q : Ints{};
    }

    static FASTLM_INLINE void narrow(Ints v, int8_t* p) {
        typedef int8_t Narrow __attribute__((vector_size(16)));
        const Narrow n = __builtin_convertvector(v, Narrow);
        std::memcpy(p, &n, sizeof n);
    }

    static FASTLM_INLINE int32_t sum(Ints v) {
        int32_t total = 0;
        for (int i = 0; i < kLanes; ++i) total += v[i];
        return total;
    }
};

}  // namespace fastlm::cpu
