// The block scanner in AVX2: two halves of 32 bytes.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define FASTLM_TARGET __attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt")))

namespace {

struct Block {
    FASTLM_TARGET Block(const uint8_t* p, size_t size) {
        alignas(32) uint8_t copy[64];
        if (size < 64) {
            std::memset(copy, 0, 64);
            std::memcpy(copy, p, size);
            p = copy;
        }
        lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32));
    }

    FASTLM_TARGET uint64_t equal(uint8_t c) const {
        return mask(_mm256_cmpeq_epi8(lower, all(c)), _mm256_cmpeq_epi8(upper, all(c)));
    }
    FASTLM_TARGET uint64_t between(uint8_t low, uint8_t high) const {
        const __m256i width = all(static_cast<uint8_t>(high - low));
        const __m256i a = _mm256_sub_epi8(lower, all(low));
        const __m256i b = _mm256_sub_epi8(upper, all(low));
        return mask(_mm256_cmpeq_epi8(_mm256_min_epu8(a, width), a), _mm256_cmpeq_epi8(_mm256_min_epu8(b, width), b));
    }

    FASTLM_TARGET static __m256i all(uint8_t c) { return _mm256_set1_epi8(static_cast<char>(c)); }
    FASTLM_TARGET static uint64_t mask(__m256i a, __m256i b) {
        return static_cast<uint32_t>(_mm256_movemask_epi8(a)) |
               static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(b))) << 32;
    }

    __m256i lower, upper;
};

}  // namespace

#include "tokenizer/block_scan_body.hpp"

namespace fastlm::tokenizer {
ScanEnds avx2_scanner(Pattern pattern) { return block_scanner(pattern); }
}  // namespace fastlm::tokenizer
#endif
