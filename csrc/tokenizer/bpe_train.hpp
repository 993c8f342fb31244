// Byte-level BPE training: the merges and ids that Hugging Face's BpeTrainer finds, ties included.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "tokenizer/word_counter.hpp"

namespace fastlm::tokenizer {

struct Merge {
    uint32_t left;
    uint32_t right;
    uint32_t token;  // the id of left + right
};

struct TrainOptions {
    std::array<uint32_t, 256> byte_ids;
    // Ids of strings that are tokens before training starts (special tokens); a merge that spells one takes its id.
    std::unordered_map<std::string, uint32_t> known_tokens;
    uint32_t first_new_id;   // number of ids in use before the first merge
    uint32_t vocab_size;     // training stops when this many ids are in use
    uint64_t min_frequency;  // or when no pair occurs this often (at least once)
};

// Called about ten times a second with the number of ids in use; may throw to stop.
using TrainProgress = std::function<void(uint32_t)>;

// Consumes the counts: they are freed as soon as they have been turned into symbols.
std::vector<Merge> train_merges(WordCounter& counter, const TrainOptions& options, const TrainProgress& progress);

}  // namespace fastlm::tokenizer
