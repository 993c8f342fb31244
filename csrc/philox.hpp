// Random numbers that depend on a seed and a position alone: Philox4x32-10 (Salmon et al., SC 2011). For host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTLM_HOST_DEVICE __host__ __device__
#else
#define FASTLM_HOST_DEVICE
#endif

namespace fastlm {

// u in [0, 1) with 53 random bits. Key: the seed's low and high word; counter: the position's, then zeros.
FASTLM_HOST_DEVICE inline double uniform(uint64_t seed, uint64_t position) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{c0} * 0xD2511F53u, product1 = uint64_t{c2} * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0, c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1, c3 = static_cast<uint32_t>(product0);
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return static_cast<double>((uint64_t{c0} << 21) | (c1 >> 11)) * 0x1p-53;
}

}  // namespace fastlm
