// Scanners that find the ends of pre-tokens 64 bytes at a time. Each is built from block_scan_body.hpp in a file of its
// own, for one instruction set.
#pragma once

#include "tokenizer/pretokenize.hpp"

namespace fastlm::tokenizer {

ScanEnds portable_scanner(Pattern pattern);
#if defined(__x86_64__)
ScanEnds avx2_scanner(Pattern pattern);    // needs AVX2, BMI1, BMI2, LZCNT
ScanEnds avx512_scanner(Pattern pattern);  // needs AVX-512 F and BW besides
#endif

}  // namespace fastlm::tokenizer
