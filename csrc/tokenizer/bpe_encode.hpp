// Byte-pair encoding with a fixed vocabulary.
//
// A pre-token is looked up in a cache of recent ones, then (vocabularies ordered by rank) whole in the vocabulary, and
// only then merged: the adjacent pair of lowest priority first, the leftmost among equals, until no pair has a merge.
// Text is Zipfian, so most pre-tokens end at the cache, and the entries in use mostly sit in a core's L2: one hash of
// at most 32 bytes, one cache line read, a few ids written. The rest costs a bitmap probe for each pair and a
// hash-table probe for each that may merge, so it is bounded by memory latency.
//
// Short pieces are merged in a flat array, where finding the lowest pair is a scan. Long ones in a linked list with
// one queue of positions for each priority, so the cost is O(n log n) at worst and O(n) on repetitive text.
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

#include "tokenizer/pretokenize.hpp"

namespace fastlm::tokenizer {

constexpr uint32_t kMaxId = (1u << 24) - 1;     // sixty times the largest vocabularies in use
constexpr size_t kMaxRankedTokenBytes = 8192;  // all ways to split a token in two are looked up at construction

// Growing array of ids. A piece of n bytes has at most n ids; `reserve` makes room before they are written unchecked.
class IdBuffer {
public:
    uint32_t* data() { return data_.get(); }
    const uint32_t* data() const { return data_.get(); }
    size_t size() const { return size_; }
    void reserve(size_t more) {
        if (capacity_ - size_ < more) grow(more);
    }
    uint32_t* end() { return data_.get() + size_; }
    void advance(size_t count) { size_ += count; }
    void truncate(size_t size) { size_ = size; }
    void push(uint32_t id) {
        reserve(1);
        data_[size_++] = id;
    }

private:
    void grow(size_t more);

    std::unique_ptr<uint32_t[]> data_;
    size_t size_ = 0;
    size_t capacity_ = 0;
};

// The tokens by id and by bytes: open addressing, linear probing, keys in one arena.
class Vocabulary {
public:
    static constexpr uint32_t kNone = UINT32_MAX;

    // Throws std::invalid_argument when a token or id occurs twice, is empty or out of range, or a byte has no token.
    explicit Vocabulary(const std::vector<std::pair<std::string, uint32_t>>& tokens);

    uint32_t find(std::string_view token) const;  // id or kNone
    bool has(uint32_t id) const { return id < spans_.size() && spans_[id].size; }
    std::string_view bytes(uint32_t id) const { return {arena_.data() + spans_[id].begin, spans_[id].size}; }
    size_t num_ids() const { return spans_.size(); }  // highest id + 1

private:
    struct Slot {
        uint32_t tag;
        uint32_t id;
    };
    struct Span {
        uint32_t begin = 0;
        uint32_t size = 0;
    };

    std::string arena_;
    std::vector<Span> spans_;
    std::vector<Slot> slots_;
    size_t mask_;
};

// (left id, right id) -> what merging them makes and how soon. Most pairs have no merge, so a bitmap that fits the L2
// cache is asked first; eight bits for each merge let one absent pair in eight through to the table.
class MergeTable {
public:
    // priority << 32 | id of the result, so the lowest value is the merge to do first.
    using Merge = uint64_t;
    static constexpr Merge kNone = UINT64_MAX;

    static Merge pack(uint32_t priority, uint32_t id) { return static_cast<Merge>(priority) << 32 | id; }
    static uint32_t priority(Merge merge) { return static_cast<uint32_t>(merge >> 32); }
    static uint32_t result(Merge merge) { return static_cast<uint32_t>(merge); }

    void build(const std::vector<std::pair<uint64_t, Merge>>& merges);  // keys made by key()
    static uint64_t key(uint32_t left, uint32_t right) { return static_cast<uint64_t>(left) << 32 | right; }

    Merge find(uint32_t left, uint32_t right) const {
        const uint64_t wanted = key(left, right);
        const uint64_t hash = hash_of(wanted);
        const uint64_t bit = hash & bit_mask_;
        if (!(bitmap_[bit >> 6] >> (bit & 63) & 1)) return kNone;
        for (size_t i = hash >> shift_;; i = (i + 1) & mask_) {
            const Slot& slot = slots_[i];
            if (slot.key == wanted) return slot.merge;
            if (slot.key == kEmpty) return kNone;
        }
    }

private:
    static constexpr uint64_t kEmpty = UINT64_MAX;
    struct Slot {
        uint64_t key = kEmpty;
        Merge merge = kNone;
    };

    static uint64_t hash_of(uint64_t key) {
        const auto product = static_cast<unsigned __int128>(key ^ 0x9e3779b97f4a7c15u) * 0xd6e8feb86659fd93u;
        return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }

    std::vector<Slot> slots_;
    std::vector<uint64_t> bitmap_;
    size_t mask_ = 0;
    uint64_t bit_mask_ = 0;
    int shift_ = 0;
};

// What one thread needs while it encodes: the cache and the arrays of long pieces.
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

    void encode_cached(std::string_view piece, EncodeState& state, IdBuffer& ids) const;
    void encode_uncached(std::string_view piece, EncodeState& state, IdBuffer& ids) const;
    void merge_short(std::string_view piece, IdBuffer& ids, uint64_t* last_pair) const;
    void merge_long(std::string_view piece, EncodeState& state, IdBuffer& ids, uint64_t* last_pair) const;
    void use_ranks(const std::vector<std::pair<std::string, uint32_t>>& tokens);
    void use_merges(const std::vector<std::pair<uint32_t, uint32_t>>& merges);
    void build_merges(const std::vector<std::pair<uint64_t, MergeTable::Merge>>& merges);

    Vocabulary vocabulary_;
    bool whole_tokens_first_;
    MergeTable merges_;
    uint32_t num_priorities_ = 0;
    std::array<uint32_t, 256> byte_ids_;
    std::vector<MergeTable::Merge> byte_pairs_;  // of first byte << 8 | second byte

    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<EncodeState>> idle_states_;
};

}  // namespace fastlm::tokenizer
