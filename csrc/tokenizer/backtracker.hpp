// Byte-pair encoding without merging, in time and memory linear in the text, for vocabularies made by training.
//
// Two tokens may be adjacent if merging their bytes gives the two again. Where every merge joins tokens that were made
// before it, a sequence in which all neighbours may be adjacent is what merging gives, and there is exactly one (van
// Antwerpen and Neubeck 2024, github/rust-gems): the first merge across a border would happen between those two tokens
// alone as well. So: take the longest token; if it may not stand there, or what follows has no solution, a shorter
// one, or another before it. A position without solution is not tried again.
//
// Limited by latency: about one load for each byte in the trie, and one for each pair of tokens that was seen before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "tokenizer/id_buffer.hpp"
#include "tokenizer/merge_rules.hpp"
#include "tokenizer/token_trie.hpp"
#include "tokenizer/vocabulary.hpp"

namespace fastlm::tokenizer {

// What one thread keeps from one piece to the next.
struct BacktrackScratch {
    static constexpr size_t kKnownPairs = 1 << 12;  // 32 KiB, a part of the L2 cache

    std::vector<uint64_t> hopeless;  // one bit for each position
    // Recent pairs: left << 34 | right << 2 | 2 | whether they may be adjacent; 0 is no pair.
    std::vector<uint64_t> known_pairs = std::vector<uint64_t>(kKnownPairs);

    // A piece of megabytes is rare, so the room for it is not kept.
    void shrink() {
        if (hopeless.capacity() > (1 << 16)) hopeless = {};
    }
};

class Backtracker {
public:
    // `rules` must outlive it.
    Backtracker(const Vocabulary& vocabulary, const MergeRules& rules);

    // False if some merge joins a token that is made after it, or a token is made in two ways.
    bool applies() const { return applies_; }

    // Appends the ids of `piece`, or returns false where there are so many dead ends that merging is faster.
    bool encode(std::string_view piece, BacktrackScratch& scratch, IdBuffer& ids) const;

private:
    // How merging makes a token.
    struct Origin {
        uint32_t left = 0;
        uint32_t right = 0;
        uint32_t order = 0;  // 1 + the priority of the merge of left and right; 0 for a single byte
        uint32_t prefix = TokenTrie::kNone;  // the longest other token that it begins with
        uint32_t size = 0;                   // bytes; 0 for a token that merging never makes
    };

    bool may_follow(uint32_t left, uint32_t right, BacktrackScratch& scratch) const;
    bool may_be_adjacent(uint32_t left, uint32_t right) const;

    const MergeRules& rules_;
    std::vector<Origin> origins_;  // by id
    TokenTrie trie_;
    bool applies_ = false;
};

}  // namespace fastlm::tokenizer
