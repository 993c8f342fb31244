#pragma once

#include "cuda_runtime_api.h"

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    float size = exponent == 31 ? (fraction ? NAN : INFINITY) : std::ldexp(1024.0f + fraction, exponent - 25);
    if (exponent == 0) size = std::ldexp(static_cast<float>(fraction), -24);
    return x.bits >> 15 ? -size : size;
}

inline __half __float2half_rn(float x) {
    const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
    if (x != x) return {0x7FFF};
    const float size = std::fabs(x);
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
    int exponent = -13;  // that of a subnormal number, whose exponent is fixed
    if (size > 0) std::frexp(size, &exponent);
    const int last = exponent < -13 ? -24 : exponent - 11;  // the last bit's exponent
    const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -last)));  // ties to even
    // A carry out of the fraction is the next exponent, as it should be.
    return {static_cast<uint16_t>(sign | (last == -24 ? steps : (last + 24) * 1024 + steps))};
}
