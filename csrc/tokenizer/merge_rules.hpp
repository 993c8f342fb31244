// Which two neighbouring tokens merge, into what and how soon: what a vocabulary says about merging.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer/merge_table.hpp"
#include "tokenizer/vocabulary.hpp"

namespace fastlm::tokenizer {

constexpr size_t kMaxRankedTokenBytes = 8192;  // all ways to split a token in two are looked up at construction

class MergeRules {
public:
    static constexpr uint32_t kNone = MergeTable::kNone;

    struct Merge {
        uint32_t left;
        uint32_t right;
        uint32_t priority;  // the lowest is done first
    };

    // tiktoken's rules: any two tokens whose concatenation is a token merge, and priority is the result's id. `merges`
    // holds only what can happen: for each token that merging makes, the last merge. Throws std::invalid_argument for
    // a byte without a token or too long a token.
    explicit MergeRules(const Vocabulary& vocabulary);

    // Hugging Face's: these pairs of ids merge, and priority is the position. Throws std::invalid_argument.
    MergeRules(const Vocabulary& vocabulary, const std::vector<std::pair<uint32_t, uint32_t>>& pairs);

    uint32_t byte_id(uint8_t byte) const { return byte_ids_[byte]; }
    // Priorities, or kNone.
    uint32_t find(uint32_t left, uint32_t right) const { return table_.find(left, right); }
    uint32_t find_bytes(uint8_t left, uint8_t right) const { return byte_pairs_[left << 8 | right]; }
    // The id that a merge makes.
    uint32_t result(uint32_t priority) const { return results_.empty() ? priority : results_[priority]; }

    uint32_t num_priorities() const { return num_priorities_; }
    const std::vector<Merge>& merges() const { return merges_; }

private:
    void set_byte_ids(const Vocabulary& vocabulary);
    void build_tables();

    std::vector<Merge> merges_;
    MergeTable table_;
    uint32_t num_priorities_ = 0;
    std::vector<uint32_t> results_;  // by priority; empty where a merge's priority is the id of its result
    std::array<uint32_t, 256> byte_ids_;
    std::vector<uint32_t> byte_pairs_;  // priority by first byte << 8 | second byte: half of L2, of which text uses little
};

}  // namespace fastlm::tokenizer
