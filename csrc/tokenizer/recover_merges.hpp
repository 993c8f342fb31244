// The merge list behind a rank-only vocabulary (tiktoken's format), for formats that store merges.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fastlm::tokenizer {

// For each token, in order of rank, the ranks of the two tokens that BPE merges last to make it; nothing for single
// bytes and for tokens that merging never makes (only a whole pre-token can be one of those).
// Takes time quadratic in the length of a token, so the caller bounds that.
std::vector<std::optional<std::pair<uint32_t, uint32_t>>> recover_merges(const std::vector<std::string>& tokens);

}  // namespace fastlm::tokenizer
