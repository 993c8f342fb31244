// The block scanner for any processor: eight bytes at a time in a 64-bit word.
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define FASTLM_TARGET

namespace {

struct Block {
    Block(const uint8_t* p, size_t size) {
        std::memset(words, 0, sizeof(words));
        std::memcpy(words, p, size < 64 ? size : 64);
        if constexpr (std::endian::native == std::endian::big) {
            for (uint64_t& word : words) word = __builtin_bswap64(word);
        }
    }

    uint64_t equal(uint8_t c) const { return between(c, c); }
    uint64_t between(uint8_t low, uint8_t high) const {
        uint64_t mask = 0;
        for (int i = 0; i < 8; ++i) mask |= gather(at_least(words[i], low) & ~at_least(words[i], high + 1u)) << 8 * i;
        return mask;
    }

private:
    static constexpr uint64_t kOnes = 0x0101010101010101u;
    static constexpr uint64_t kTops = 0x80 * kOnes;

    // The top bit of each byte that is at least `low`, which is at most 256.
    static uint64_t at_least(uint64_t bytes, unsigned low) {
        if (low > 255) return 0;
        const uint64_t rest = (bytes & ~kTops) + (0x80 - (low & 0x7f)) * kOnes;  // of seven bits each, so none carries
        return (low & 0x80 ? bytes & rest : bytes | rest) & kTops;
    }
    // The eight top bits, in order.
    static uint64_t gather(uint64_t tops) { return (tops >> 7) * 0x0102040810204080u >> 56; }

    uint64_t words[8];
};

}  // namespace

#include "tokenizer/block_scan_body.hpp"

namespace fastlm::tokenizer {
ScanEnds portable_scanner(Pattern pattern) { return block_scanner(pattern); }
}  // namespace fastlm::tokenizer
