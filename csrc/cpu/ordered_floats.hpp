// Floats as integers of the same order, so that a bound among them can be found by halves.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace fastlm::cpu {

inline int64_t ordered(float x) {
    const int32_t bits = std::bit_cast<int32_t>(x);
    return bits >= 0 ? bits : int64_t{std::numeric_limits<int32_t>::min()} - bits;
}

inline float from_ordered(int64_t key) {
    return std::bit_cast<float>(
        static_cast<int32_t>(key >= 0 ? key : int64_t{std::numeric_limits<int32_t>::min()} - key));
}

// The least float that `holds`, given that all floats from there to `top` do.
template <class Holds>
float least(float top, Holds&& holds) {
    int64_t low = ordered(-std::numeric_limits<float>::infinity()), high = ordered(top);
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (holds(from_ordered(middle))) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return from_ordered(high);
}

}  // namespace fastlm::cpu
