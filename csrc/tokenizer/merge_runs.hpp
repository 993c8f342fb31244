// Merging of rulers and other text of a few runs of one byte ("=====", 100,000 times "a"): run lengths are merged, not
// bytes, so it takes about as long as reading the text and writing the ids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "tokenizer/id_buffer.hpp"
#include "tokenizer/merge_rules.hpp"

namespace fastlm::tokenizer {

// Appends the ids of `piece` and returns true, or returns false if it is of too many runs. In `rules`, every merge must
// join tokens that were made before it: then all merges of one pair can be done at once.
bool merge_runs(const MergeRules& rules, std::string_view piece, IdBuffer& ids);

}  // namespace fastlm::tokenizer
