// The body of the block scanners. A file that includes this first defines FASTLM_TARGET (the attribute of functions
// that use its instructions) and the class `Block`: at most 64 bytes, the rest 0, and comparisons that give a mask.
//
// A block begins at the start of a pre-token. Its bytes are classified into one bit mask for each class of characters,
// where every byte of a character has the character's class; which bytes start a pre-token is then arithmetic on whole
// masks, as simdjson does for JSON (Langdale and Lemire 2019, arXiv:1902.08318). A regular expression's findall has no
// memory across matches, so the last start that was found is where the next block begins, and no state is carried over.
// About 90 instructions for each block, thirteen pre-tokens of English.
//
// What the arithmetic cannot decide (a mark in a word, digits of other scripts, wide spaces, white space whose end is
// not in the block) is in doubt: starts before the first doubt count, and where there is none the scalar scanner
// finds one end.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tokenizer/block_scan.hpp"

namespace fastlm::tokenizer {
namespace {

constexpr size_t kBlockBytes = 64;

uint64_t bit(size_t i) { return uint64_t{1} << i; }
uint64_t lowest_bits(size_t n) { return n >= 64 ? ~uint64_t{0} : bit(n) - 1; }

// Bytes by the class of their character. Letters are upper, lower or caseless.
struct Masks {
    uint64_t upper, lower, caseless;
    uint64_t number;
    uint64_t space;    // all white space but \r and \n
    uint64_t newline;  // \r and \n
    uint64_t blank;    // ' ' alone, which is in `space` too
    uint64_t apostrophe;
    uint64_t inside;  // bytes after the first of their character
    uint64_t doubt;   // first bytes of characters that the arithmetic leaves to the scalar scanner
};

FASTLM_TARGET inline Masks ascii_masks(const Block& block) {
    Masks m{};
    m.upper = block.between('A', 'Z');
    m.lower = block.between('a', 'z');
    m.number = block.between('0', '9');
    m.newline = block.equal('\n') | block.equal('\r');
    m.blank = block.equal(' ');
    m.space = m.blank | (block.between('\t', '\r') & ~m.newline);
    m.apostrophe = block.equal('\'');
    return m;
}

// First bytes of the characters U+5000-8FFF, U+AC00-CFFF and U+D000-D77F, which are all caseless letters: most of
// Chinese and all but 36 of the syllables of Korean. One that the block cuts off is left out.
FASTLM_TARGET inline uint64_t ideographs(const Block& block) {
    const uint64_t continuation = block.between(0x80, 0xbf);
    const uint64_t first = block.between(0xe5, 0xe8) | block.between(0xeb, 0xec) |
                           (block.equal(0xea) & block.between(0xb0, 0xbf) >> 1) |
                           (block.equal(0xed) & block.between(0x80, 0x9d) >> 1);
    return first & continuation >> 1 & continuation >> 2;
}

// Adds the characters outside ASCII, whose bytes are `wide`.
template <Pattern pattern>
FASTLM_TARGET inline void add_wide(const Block& block, const uint8_t* p, const uint8_t* end, uint64_t wide,
                                   Masks& masks) {
    constexpr bool numbers_are_cut = pattern != Pattern::gpt2 && pattern != Pattern::qwen2;
    const uint64_t first = ideographs(block);
    const uint64_t second_and_third = first << 1 | first << 2;
    masks.caseless |= first | second_and_third;
    masks.inside |= second_and_third;
    for (wide &= ~(first | second_and_third); wide;) {
        const int i = std::countr_zero(wide);
        const scan::Char c = scan::wide_char_at(p + i, end);
        const uint64_t bytes = lowest_bits(c.size) << i;
        wide &= ~bytes;
        masks.inside |= bytes & (bytes << 1);
        switch (c.cls) {
            case kUpper: masks.upper |= bytes; break;
            case kLower: masks.lower |= bytes; break;
            case kCaseless: masks.caseless |= bytes; break;
            case kSpace:
                masks.space |= bytes;
                masks.doubt |= bit(i);
                break;
            case kNumber:
                masks.number |= bytes;
                if (numbers_are_cut) masks.doubt |= bit(i);
                break;
            case kMark:
                if (pattern == Pattern::o200k) masks.doubt |= bit(i);
                break;
            default: break;
        }
    }
}

// Every third character of a run of digits starts a pre-token.
FASTLM_TARGET inline uint64_t number_starts_by_three(uint64_t number) {
    const uint64_t after_three = number & number << 1 & number << 2 & number << 3;
    uint64_t starts = 0;
    for (uint64_t next = number & ~(number << 1); next; next = next << 3 & after_three) starts |= next;
    return starts;
}

// Bytes that start a pre-token, given that the first does. `valid` are the bytes before the end of the text.
template <Pattern pattern>
FASTLM_TARGET inline uint64_t find_starts(const Masks& m, uint64_t valid, bool at_end, const uint8_t* p,
                                          const uint8_t* end, uint64_t& doubt) {
    constexpr bool gpt2 = pattern == Pattern::gpt2;
    constexpr bool o200k = pattern == Pattern::o200k;
    const uint64_t letter = m.upper | m.lower | m.caseless;
    const uint64_t white = m.space | m.newline;
    const uint64_t text = valid & ~white;
    const uint64_t other = text & ~(letter | m.number);  // punctuation and marks
    const uint64_t letter_first = letter & ~(letter << 1);
    const uint64_t other_first = other & ~(other << 1);
    const uint64_t other_alone = other_first & ~(m.blank << 1);  // " !" is one pre-token
    doubt |= m.doubt;
    // White space goes to what follows, if it is the last before that; an apostrophe of o200k to what is before it.
    if (!at_end) doubt |= (o200k ? white | m.apostrophe : white) & bit(63);

    uint64_t starts;
    if constexpr (gpt2) {
        starts = ((letter_first | other_first | (m.number & ~(m.number << 1))) & ~(m.blank << 1)) |
                 (white & ~(white << 1)) | (white & text >> 1);
    } else {
        // One character that is no letter, number or line end goes with the letters after it: the last of white space,
        // or punctuation that stands alone and has no space before it.
        uint64_t prefix = other_alone;
        for (int i = 0; i < 3; ++i) prefix |= prefix << 1 & m.inside;
        starts = other_alone | (letter_first & ~((m.space | prefix) << 1));
        starts |= m.space & text >> 1;
        // Line ends go with punctuation before them, else with white space up to the last of them.
        starts |= white & ~(white << 1) & ~(m.newline & other << 1);
        starts |= pattern == Pattern::qwen2 ? m.number & ~m.inside : number_starts_by_three(m.number);
        if (const uint64_t indent = m.space & ~(m.space << 1) & m.newline << 1) {
            starts |= indent;
            const uint64_t sum = m.space + indent;  // carries through a run of spaces to the byte after it
            if (sum & ~m.space & m.newline) doubt |= indent;
            const bool is_cut = !at_end && sum < indent;
            const bool ends_text = pattern == Pattern::cl100k && at_end && (sum < indent || (sum & ~m.space & ~valid));
            if (is_cut || ends_text) doubt |= std::bit_floor(indent);
        }
    }
    if constexpr (o200k) {
        starts |= m.upper & m.lower << 1;
        doubt |= m.upper & m.caseless << 1;
        for (uint64_t rest = other & m.newline << 1; rest; rest &= rest - 1) {
            if (p[std::countr_zero(rest)] == '/') doubt |= rest & (0 - rest);
        }
        // A contraction belongs to the word before it, unless that is one.
        const uint8_t* last_end = p;
        for (uint64_t rest = m.apostrophe & letter << 1 & letter >> 1; rest; rest &= rest - 1) {
            const uint8_t* at = p + std::countr_zero(rest);
            if (at == last_end) continue;
            const uint8_t* after = scan::contraction_end<true>(at, end);
            if (after == at) continue;
            last_end = after;
            const uint64_t before_after = lowest_bits(static_cast<size_t>(after - p));
            starts &= ~before_after | lowest_bits(static_cast<size_t>(at - p));
            starts |= letter & (before_after + 1);
        }
    } else {
        for (uint64_t rest = m.apostrophe & other_alone & letter >> 1; rest; rest &= rest - 1) {
            const uint8_t* at = p + std::countr_zero(rest);
            const uint8_t* after = scan::contraction_end<!gpt2>(at, end);
            if (after == at) continue;
            const uint64_t before_after = lowest_bits(static_cast<size_t>(after - p));
            if (gpt2) starts &= ~before_after | lowest_bits(static_cast<size_t>(at + 1 - p));
            starts |= letter & (before_after + 1);
        }
    }
    return starts;
}

// `p` is inside a run of ASCII letters at least a block long, which is one pre-token.
FASTLM_TARGET inline const uint8_t* letters_end(const uint8_t* p, const uint8_t* end) {
    while (static_cast<size_t>(end - p) >= kBlockBytes) {
        const Masks masks = ascii_masks(Block(p, kBlockBytes));
        if (~(masks.upper | masks.lower)) break;
        p += kBlockBytes;
    }
    return scan::skip(p, end, scan::kLetter);
}

template <Pattern pattern>
FASTLM_TARGET size_t scan_blocks(const uint8_t* p, const uint8_t* end, const uint8_t** ends) {
    size_t count = 0;
    while (p < end && count + kBlockBytes <= kMostEnds) {
        const size_t left = static_cast<size_t>(end - p);
        const bool at_end = left <= kBlockBytes;
        const uint64_t valid = lowest_bits(left);
        const Block block(p, left);
        Masks masks = ascii_masks(block);
        const uint64_t wide = block.between(0x80, 0xff);
        if (wide) add_wide<pattern>(block, p, end, wide, masks);
        uint64_t doubt = 0;
        uint64_t starts = find_starts<pattern>(masks, valid, at_end, p, end, doubt) & valid & ~uint64_t{1};
        if (doubt) starts &= (doubt & (0 - doubt)) - 1;

        if (starts == 0 && !(at_end && !doubt)) {
            if (pattern != Pattern::o200k && !wide && !~(masks.upper | masks.lower)) {
                p = letters_end(p + kBlockBytes, end);
            } else {
                p = scan::pretoken_end<pattern>(p, end);
            }
            ends[count++] = p;
            continue;
        }
        const uint8_t** next = ends + count;
        count += static_cast<size_t>(std::popcount(starts));
        const uint8_t* last = starts ? p + 63 - std::countl_zero(starts) : p;
        for (; starts; next += 8) {
            for (int i = 0; i < 8; ++i) {
                next[i] = p + std::countr_zero(starts);
                starts &= starts - 1;
            }
        }
        if (at_end && !doubt) {
            ends[count++] = end;
            return count;
        }
        p = last;
    }
    return count;
}

ScanEnds block_scanner(Pattern pattern) {
    switch (pattern) {
        case Pattern::gpt2: return scan_blocks<Pattern::gpt2>;
        case Pattern::cl100k: return scan_blocks<Pattern::cl100k>;
        case Pattern::o200k: return scan_blocks<Pattern::o200k>;
        case Pattern::llama3: return scan_blocks<Pattern::llama3>;
        case Pattern::qwen2: return scan_blocks<Pattern::qwen2>;
    }
    return nullptr;
}

}  // namespace
}  // namespace fastlm::tokenizer
