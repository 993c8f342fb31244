// Splits text into the pre-tokens that byte-pair merges stay inside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "tokenizer/scalar_scan.hpp"

namespace fastlm::tokenizer {

// Throws std::invalid_argument that lists the names.
Pattern pattern_from_name(std::string_view name);

// What finds the ends of pre-tokens: the wide ones look at 64 bytes at a time.
enum class Scanner { scalar, portable, avx2, avx512 };

// The fastest that this processor has, unless `name` ("scalar", "portable", "avx2", "avx512") asks for another. Throws
// std::invalid_argument when there is none of that name here.
Scanner scanner_from_name(std::string_view name);

constexpr size_t kMostEnds = 256;                // found by one call of a ScanEnds
constexpr size_t kEndsCapacity = kMostEnds + 8;  // room that it needs: the last ones are written eight at a time

// Writes where the pre-tokens from `begin` on end, in order, and returns how many it wrote: at least one, unless there
// is no text. `begin` must be the start of a pre-token.
using ScanEnds = size_t (*)(const uint8_t* begin, const uint8_t* end, const uint8_t** ends);

ScanEnds scan_ends(Pattern pattern, Scanner scanner);

// Calls emit(const char* begin, size_t length) for each pre-token in order. Together they are the whole text.
template <typename Emit>
inline void split(Pattern pattern, Scanner scanner, const char* text, size_t size, Emit&& emit) {
    const ScanEnds scan = scan_ends(pattern, scanner);
    const auto* p = reinterpret_cast<const uint8_t*>(text);
    const uint8_t* end = p + size;
    const uint8_t* ends[kEndsCapacity];
    while (p < end) {
        const size_t count = scan(p, end, ends);
        for (size_t i = 0; i < count; ++i) {
            emit(reinterpret_cast<const char*>(p), static_cast<size_t>(ends[i] - p));
            p = ends[i];
        }
    }
}

}  // namespace fastlm::tokenizer
