// Unaligned loads and a mixing multiplication, for hash tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastlm::tokenizer {

inline uint64_t load8(const void* p) {
    uint64_t value;
    std::memcpy(&value, p, 8);
    return value;
}

inline uint64_t load4(const void* p) {
    uint32_t value;
    std::memcpy(&value, p, 4);
    return value;
}

inline uint64_t mix(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// `size` is at least 1. Two loads that overlap cover up to 16 bytes.
inline uint64_t hash_bytes(const char* p, size_t size) {
    uint64_t first, last = 0;
    if (size >= 8) {
        first = load8(p);
        last = load8(p + size - 8);
    } else if (size >= 4) {
        first = load4(p);
        last = load4(p + size - 4);
    } else {
        const auto byte = [p](size_t i) { return static_cast<uint64_t>(static_cast<uint8_t>(p[i])); };
        first = byte(0) | byte(size / 2) << 8 | byte(size - 1) << 16;
    }
    uint64_t hash = mix(first ^ 0xa0761d6478bd642fu, last ^ 0xe7037ed1a0b428dbu ^ size);
    for (size_t i = 8; i + 8 < size; i += 8) hash = mix(hash ^ load8(p + i), 0x8ebc6af09c88c6e3u);
    return hash;
}

}  // namespace fastlm::tokenizer
