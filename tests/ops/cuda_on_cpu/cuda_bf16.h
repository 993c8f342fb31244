#pragma once

#include "cuda_runtime_api.h"

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __int_as_float(static_cast<int>(uint32_t{x.bits} << 16)); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const auto bits = static_cast<uint32_t>(__float_as_int(x));
    if (x != x) return {0x7FFF};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
