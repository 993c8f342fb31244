// The pre-tokenizer patterns as hand-written scanners over UTF-8, one pre-token at a time: they give what the published
// regular expressions give (as a findall), in one pass and without backtracking beyond the end of a run. Each
// looks at the class of at most two characters, then skips a run of one class. `block_scan.hpp` finds the same ends
// 64 bytes at a time and asks here where its rules do not reach.
//
//   gpt2     '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s        (also r50k, p50k)
//   cl100k   '(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+$|\s*[\r\n]
//            |\s+(?!\S)|\s
//   llama3   cl100k without \s+$
//   qwen2    llama3 with \p{N} in place of \p{N}{1,3}
//   o200k    [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?
//            |[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?
//            |\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+
//
// A byte that is not part of well-formed UTF-8 counts as one character that is neither letter, number nor space.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tokenizer/unicode_tables.hpp"

namespace fastlm::tokenizer {

enum class Pattern { gpt2, cl100k, o200k, llama3, qwen2 };

namespace scan {

constexpr uint8_t kWhite = kNewline | kSpace;
constexpr uint8_t kLetter = kUpper | kLower | kCaseless;
constexpr uint8_t kPunctuation = kMark | kOther;  // [^\s\p{L}\p{N}]
constexpr uint8_t kPrefix = kSpace | kMark | kOther;  // [^\r\n\p{L}\p{N}]

struct Char {
    uint8_t cls;
    uint8_t size;
};

inline bool is_continuation(uint8_t byte) { return (byte & 0xc0) == 0x80; }

inline Char wide_char_at(const uint8_t* p, const uint8_t* end) {
    const uint8_t lead = *p;
    const size_t left = static_cast<size_t>(end - p);
    if (lead >= 0xe0 && lead < 0xf0 && left >= 3 && is_continuation(p[1]) && is_continuation(p[2])) {
        const uint32_t code = (lead & 15u) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u);
        if (code >= 0x800 && (code < 0xd800 || code > 0xdfff)) return {class_of(code), 3};
    } else if (lead >= 0xc2 && lead < 0xe0 && left >= 2 && is_continuation(p[1])) {
        return {class_of((lead & 31u) << 6 | (p[1] & 63u)), 2};
    } else if (lead >= 0xf0 && lead < 0xf5 && left >= 4 && is_continuation(p[1]) && is_continuation(p[2]) &&
               is_continuation(p[3])) {
        const uint32_t code = (lead & 7u) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u);
        if (code >= 0x10000 && code <= 0x10ffff) return {class_of(code), 4};
    }
    return {kOther, 1};
}

inline Char char_at(const uint8_t* p, const uint8_t* end) {
    return *p < 0x80 ? Char{class_of_ascii(*p), 1} : wide_char_at(p, end);
}

inline const uint8_t* skip(const uint8_t* p, const uint8_t* end, uint8_t classes) {
    while (p < end) {
        const Char c = char_at(p, end);
        if (!(c.cls & classes)) break;
        p += c.size;
    }
    return p;
}

// End of 's, 't, 'm, 'd, 're, 've or 'll at `p`, or `p`. Folding case, the long s (U+017F) is an s too.
template <bool fold_case>
inline const uint8_t* contraction_end(const uint8_t* p, const uint8_t* end) {
    if (end - p < 2 || *p != '\'') return p;
    constexpr uint8_t fold = fold_case ? 0x20 : 0;
    const uint8_t a = p[1] | fold;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return p + 2;
    if (end - p < 3) return p;
    if (fold_case && p[1] == 0xc5 && p[2] == 0xbf) return p + 3;
    const uint8_t b = p[2] | fold;
    if ((b == 'e' && (a == 'r' || a == 'v')) || (a == 'l' && b == 'l')) return p + 3;
    return p;
}

template <int most>
inline const uint8_t* number_end(const uint8_t* p, const uint8_t* end) {
    for (int i = 0; i < most && p < end; ++i) {
        const Char c = char_at(p, end);
        if (c.cls != kNumber) break;
        p += c.size;
    }
    return p;
}

// `p` is at white space. The last character of a run that other text follows is left to that text.
template <Pattern pattern>
inline const uint8_t* white_space_end(const uint8_t* p, const uint8_t* end) {
    const uint8_t* start = p;
    const uint8_t* last = p;
    const uint8_t* after_newline = nullptr;
    while (p < end) {
        const Char c = char_at(p, end);
        if (!(c.cls & kWhite)) break;
        last = p;
        p += c.size;
        if (c.cls == kNewline) after_newline = p;
    }
    if (pattern == Pattern::cl100k && p == end) return p;
    if (pattern != Pattern::gpt2 && after_newline) return after_newline;
    return p == end || last == start ? p : last;
}

// End of the first two alternatives of o200k at `p`, or nullptr. They overlap in caseless letters and marks, and the
// regular expression backtracks: a word ends after its lower-case part if it has one, else after the last character
// that could be one, else it is all upper case.
inline const uint8_t* o200k_word_end(const uint8_t* p, const uint8_t* end, Char first) {
    constexpr uint8_t both = kCaseless | kMark;
    const uint8_t* word = first.cls & kPrefix ? p + first.size : p;
    const uint8_t* q = word;
    const uint8_t* after_caseless = nullptr;
    Char c{kOther, 0};
    while (q < end) {
        c = char_at(q, end);
        if (!(c.cls & (kUpper | both))) break;
        q += c.size;
        if (c.cls & both) after_caseless = q;
    }
    const uint8_t* found = nullptr;
    if (q < end && c.cls == kLower) {
        found = skip(q + c.size, end, kLower | both);
    } else if (after_caseless) {
        found = after_caseless;
    } else if (first.cls == kMark) {
        found = p + first.size;  // the mark is the word itself, not its prefix
    } else if (q > word) {
        found = q;
    }
    return found ? contraction_end<true>(found, end) : nullptr;
}

// End of the pre-token that starts at `p`; `p` must be before `end`.
template <Pattern pattern>
inline const uint8_t* pretoken_end(const uint8_t* p, const uint8_t* end) {
    const Char first = char_at(p, end);
    const uint8_t* after = p + first.size;
    const Char none{0, 0};

    if constexpr (pattern == Pattern::gpt2) {
        if (*p == '\'') {
            if (const uint8_t* found = contraction_end<false>(p, end); found != p) return found;
        }
        Char c = first;
        if (*p == ' ') {
            c = after < end ? char_at(after, end) : none;
            after += c.size;
        }
        if (c.cls & kLetter) return skip(after, end, kLetter);
        if (c.cls & kNumber) return skip(after, end, kNumber);
        if (c.cls & kPunctuation) return skip(after, end, kPunctuation);
        return white_space_end<pattern>(p, end);
    } else {
        if (first.cls & kNumber) return number_end<pattern == Pattern::qwen2 ? 1 : 3>(p, end);
        const Char second = after < end ? char_at(after, end) : none;
        if constexpr (pattern == Pattern::o200k) {
            if (const uint8_t* found = o200k_word_end(p, end, first)) return found;
        } else {
            if (*p == '\'') {
                if (const uint8_t* found = contraction_end<true>(p, end); found != p) return found;
            }
            if (first.cls & kLetter) return skip(after, end, kLetter);
            if ((first.cls & kPrefix) && (second.cls & kLetter)) return skip(after + second.size, end, kLetter);
        }
        if ((first.cls & kPunctuation) || (*p == ' ' && (second.cls & kPunctuation))) {
            const uint8_t* q = skip(after, end, kPunctuation);
            while (q < end && (*q == '\r' || *q == '\n' || (pattern == Pattern::o200k && *q == '/'))) ++q;
            return q;
        }
        return white_space_end<pattern>(p, end);
    }
}

}  // namespace scan
}  // namespace fastlm::tokenizer
