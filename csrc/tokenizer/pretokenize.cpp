#include "tokenizer/pretokenize.hpp"

#include <stdexcept>
#include <string>

#include "cpu/features.hpp"
#include "tokenizer/block_scan.hpp"

namespace fastlm::tokenizer {

namespace {

template <Pattern pattern>
size_t scan_scalar(const uint8_t* p, const uint8_t* end, const uint8_t** ends) {
    size_t count = 0;
    for (; p < end && count < kMostEnds; ++count) ends[count] = p = scan::pretoken_end<pattern>(p, end);
    return count;
}

ScanEnds scalar_scanner(Pattern pattern) {
    switch (pattern) {
        case Pattern::gpt2: return scan_scalar<Pattern::gpt2>;
        case Pattern::cl100k: return scan_scalar<Pattern::cl100k>;
        case Pattern::o200k: return scan_scalar<Pattern::o200k>;
        case Pattern::llama3: return scan_scalar<Pattern::llama3>;
        case Pattern::qwen2: return scan_scalar<Pattern::qwen2>;
    }
    return nullptr;
}

}  // namespace

Pattern pattern_from_name(std::string_view name) {
    if (name == "gpt2") return Pattern::gpt2;
    if (name == "cl100k") return Pattern::cl100k;
    if (name == "o200k") return Pattern::o200k;
    if (name == "llama3") return Pattern::llama3;
    if (name == "qwen2") return Pattern::qwen2;
    throw std::invalid_argument("no pattern named '" + std::string(name) +
                                "'; there are gpt2, cl100k, o200k, llama3, qwen2");
}

Scanner scanner_from_name(std::string_view name) {
    const cpu::Features& has = cpu::features();
    const bool fastest = name.empty();
    if (has.avx512 && (fastest || name == "avx512")) return Scanner::avx512;
    if (has.avx2 && (fastest || name == "avx2")) return Scanner::avx2;
    if (fastest || name == "portable") return Scanner::portable;
    if (name == "scalar") return Scanner::scalar;
    throw std::invalid_argument("this processor has no scanner named '" + std::string(name) + "'");
}

ScanEnds scan_ends(Pattern pattern, Scanner scanner) {
    switch (scanner) {
        case Scanner::scalar: return scalar_scanner(pattern);
        case Scanner::portable: return portable_scanner(pattern);
#if defined(__x86_64__)
        case Scanner::avx2: return avx2_scanner(pattern);
        case Scanner::avx512: return avx512_scanner(pattern);
#else
        default: return portable_scanner(pattern);
#endif
    }
    return nullptr;
}

}  // namespace fastlm::tokenizer
