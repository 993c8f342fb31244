// The block scanner in AVX-512: 64 bytes are compared by one instruction, whose result is the mask.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define FASTLM_TARGET __attribute__((target("avx512f,avx512bw,avx2,bmi,bmi2,lzcnt,popcnt")))

namespace {

struct Block {
    // Bytes that are masked out are not touched.
    FASTLM_TARGET Block(const uint8_t* p, size_t size)
        : bytes(_mm512_maskz_loadu_epi8(size >= 64 ? ~uint64_t{0} : (uint64_t{1} << size) - 1, p)) {}

    FASTLM_TARGET uint64_t equal(uint8_t c) const { return _mm512_cmpeq_epi8_mask(bytes, all(c)); }
    FASTLM_TARGET uint64_t between(uint8_t low, uint8_t high) const {
        return _mm512_cmple_epu8_mask(_mm512_sub_epi8(bytes, all(low)), all(static_cast<uint8_t>(high - low)));
    }

    FASTLM_TARGET static __m512i all(uint8_t c) { return _mm512_set1_epi8(static_cast<char>(c)); }

    __m512i bytes;
};

}  // namespace

#include "tokenizer/block_scan_body.hpp"

namespace fastlm::tokenizer {
ScanEnds avx512_scanner(Pattern pattern) { return block_scanner(pattern); }
}  // namespace fastlm::tokenizer
#endif
