// Classes of code points that the pre-tokenizer patterns tell apart, as a two-stage table (blocks of 128).
#pragma once

#include <cstdint>

namespace fastlm::tokenizer {

// One bit each, so that a set of classes is a mask. Every code point has exactly one.
enum CharClass : uint8_t {
    kNewline = 1,    // \r and \n
    kSpace = 2,      // White_Space but \r and \n
    kNumber = 4,     // N
    kUpper = 8,      // Lu and Lt
    kLower = 16,     // Ll
    kCaseless = 32,  // Lm and Lo
    kMark = 64,      // M
    kOther = 128,    // everything else, unassigned code points included
};

extern const uint8_t class_block_of[0x110000 / 128];
extern const uint8_t class_blocks[];

inline uint8_t class_of_ascii(uint8_t byte) { return class_blocks[byte]; }

// `code` must be at most 0x10ffff.
inline uint8_t class_of(uint32_t code) { return class_blocks[class_block_of[code >> 7] * 128 + (code & 127)]; }

}  // namespace fastlm::tokenizer
