// Each output is a dot product in sixteen lanes, which are added up at the end: an order that no other row and no thread
// changes. Tiles of four features by four rows keep 16 sums in registers and load 8 vectors for 16 products. The weights
// are read from memory once; with one row, that limits.
#include "cpu/linear.hpp"

#include <algorithm>

#include "cpu/parallel.hpp"

namespace fastlm::cpu {
namespace {

constexpr int kTile = 4;           // features, and rows, at once
constexpr int64_t kPart = 131072;  // products that a thread takes at a time: some 5 µs, what a waiting thread is worth

struct Multiply {
    template <class T>
    static FASTLM_INLINE void run(const Linear<T>& call, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t feature = i * kTile;
            if (feature + kTile <= call.out_features) {
                features<T, kTile>(call, feature);
            } else {
                for (int64_t f = feature; f < call.out_features; ++f) features<T, 1>(call, f);
            }
        }
    }

    template <class T, int kFeatures>
    static FASTLM_INLINE void features(const Linear<T>& call, int64_t feature) {
        int64_t row = 0;
        for (; row + kTile <= call.rows; row += kTile) tile<T, kFeatures, kTile>(call, feature, row);
        for (; row < call.rows; ++row) tile<T, kFeatures, 1>(call, feature, row);
    }

    template <class T, int kFeatures, int kRows>
    static FASTLM_INLINE void tile(const Linear<T>& call, int64_t feature, int64_t row) {
        const int64_t n = call.in_features, whole = n / kLanes * kLanes;
        const T *w = call.weight + feature * call.weight_stride, *x = call.x + row * n;
        Floats sums[kRows][kFeatures] = {};
        for (int64_t k = 0; k < whole; k += kLanes) add<T, kFeatures, kRows>(call, w + k, x + k, kLanes, sums);
        if (whole < n) add<T, kFeatures, kRows>(call, w + whole, x + whole, n - whole, sums);
        for (int r = 0; r < kRows; ++r) {
            for (int f = 0; f < kFeatures; ++f) {
                float result = sum(sums[r][f]);
                if (call.bias) result += call.bias[feature + f];
                set(call.y + (row + r) * call.out_features + feature + f, result);
            }
        }
    }

    template <class T, int kFeatures, int kRows>
    static FASTLM_INLINE void add(const Linear<T>& call, const T* w, const T* x, int64_t left,
                                  Floats (*sums)[kFeatures]) {
        Floats weights[kFeatures];
#pragma GCC unroll 4
        for (int f = 0; f < kFeatures; ++f) weights[f] = load_up_to(w + f * call.weight_stride, left);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const Floats values = load_up_to(x + r * call.in_features, left);
#pragma GCC unroll 4
            for (int f = 0; f < kFeatures; ++f) sums[r][f] += weights[f] * values;
        }
    }

    template <class T>
    static FASTLM_INLINE void set(T* p, float value) {
        store_first(p, 1, broadcast(value));
    }
};

}  // namespace

template <class T>
void linear(const Linear<T>& call, int num_threads) {
    const int64_t tiles = (call.out_features + kTile - 1) / kTile;
    const int64_t least = items_of(kTile * call.in_features * call.rows, kPart);
    const int64_t grain = std::max(least, tiles / (4 * std::max(num_threads, 1)));
    run_parallel<Multiply>(call, tiles, grain, num_threads);
}

template void linear(const Linear<float>&, int);
template void linear(const Linear<BFloat16>&, int);

}  // namespace fastlm::cpu
