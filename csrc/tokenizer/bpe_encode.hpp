// Byte-pair encoding with a fixed vocabulary.
//
// Pre-tokens are found in batches (block_scan_body.hpp). For each of a batch its key is made and the line of the cache
// that may hold it is fetched; only then are the lines compared and the ids written, so that misses of the processor's
// caches overlap. What is not there is looked up whole in the vocabulary (if that is ordered by rank), and else merged:
// the adjacent pair of lowest priority first, the leftmost among equals, until no pair has a merge.
//
// What limits it, on a Zen 5 core at 3 GHz with a text that has been seen: 3 cycles a byte of English and 3.7 of code,
// that is 14 and 17 a pre-token. 40 % is the scan, which waits for itself: a block begins where the last pre-token of
// the one before it does. The rest is instructions, about 60 a pre-token. Memory would give 0.3 cycles a byte, text read
// and ids written once. Korean takes 6 cycles a byte: its words are many, so their lines come from L3, and 12 % of them
// are too long for a line. Making the list of int costs another 4 cycles an id, and twice that when the objects have
// left the caches.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tokenizer/backtracker.hpp"
#include "tokenizer/id_buffer.hpp"
#include "tokenizer/merge_rules.hpp"
#include "tokenizer/piece_cache.hpp"
#include "tokenizer/pretokenize.hpp"
#include "tokenizer/vocabulary.hpp"

namespace fastlm::tokenizer {

// What one thread needs while it encodes: caches and scratch space.
struct EncodeState;

class BpeEncoder {
public:
    // With `merges` (pairs of ids, first first), priority is the position in the list. Without, any two tokens whose
    // concatenation is a token merge, priority is the result's id, and a pre-token that is a token is not merged at
    // all: tiktoken's rules. Throws std::invalid_argument.
    BpeEncoder(const std::vector<std::pair<std::string, uint32_t>>& tokens,
               const std::optional<std::vector<std::pair<uint32_t, uint32_t>>>& merges);
    ~BpeEncoder();

    const Vocabulary& vocabulary() const { return vocabulary_; }

    // Appends the ids of `text`. Thread-safe. Throws std::length_error for a pre-token of 4 GiB.
    void encode(Pattern pattern, std::string_view text, IdBuffer& ids) const;

    // Appends the ids of one pre-token.
    void encode_piece(std::string_view piece, IdBuffer& ids) const;

private:
    class StateLease;

    void encode_missed(std::string_view piece, const PieceCache::Key& key, PieceCache::Entry& home, EncodeState& state,
                       IdBuffer& ids) const;
    void encode_uncached(std::string_view piece, EncodeState& state, IdBuffer& ids) const;

    Vocabulary vocabulary_;
    bool whole_tokens_first_;
    std::array<bool, 256> lacks_byte_{};  // bytes of no text, or of few
    bool lacks_bytes_ = false;
    MergeRules rules_;
    Backtracker backtracker_;

    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<EncodeState>> idle_states_;
};

}  // namespace fastlm::tokenizer
