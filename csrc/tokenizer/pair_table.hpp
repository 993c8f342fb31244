// Pairs of adjacent symbols with their counts: a flat hash table for the merge loop of BPE training.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastlm::tokenizer {

using Symbol = uint32_t;

constexpr uint32_t kNotListed = UINT32_MAX;

inline uint64_t pair_key(Symbol left, Symbol right) { return static_cast<uint64_t>(left) << 32 | right; }
inline Symbol left_of(uint64_t key) { return static_cast<Symbol>(key >> 32); }
inline Symbol right_of(uint64_t key) { return static_cast<Symbol>(key); }

inline uint64_t hash_key(uint64_t key) {
    key *= 0x9E3779B97F4A7C15ull;
    key ^= key >> 32;
    return key * 0xD6E8FEB86659FD93ull >> 20;
}

struct Pair {
    uint64_t key;
    int64_t count;
    uint64_t words_begin;  // its words: a range of the trainer's lists
    uint32_t num_words;
};

// From pair key to index in a dense array of pairs.
class PairTable {
public:
    void clear() {
        pairs.clear();
        slots_.assign(size_t{1} << 12, kNotListed);
    }

    // kNotListed when there is none.
    uint32_t index_of(uint64_t key) const { return slots_[slot_of(key)]; }

    uint32_t find_or_add(uint64_t key) {
        if ((pairs.size() + 1) * 2 > slots_.size()) grow();
        uint32_t& index = slots_[slot_of(key)];
        if (index == kNotListed) {
            index = static_cast<uint32_t>(pairs.size());
            pairs.push_back({key, 0, 0, 0});
        }
        return index;
    }

    std::vector<Pair> pairs;

private:
    size_t slot_of(uint64_t key) const {
        const size_t mask = slots_.size() - 1;
        size_t slot = hash_key(key) & mask;
        while (slots_[slot] != kNotListed && pairs[slots_[slot]].key != key) slot = (slot + 1) & mask;
        return slot;
    }

    void grow() {
        slots_.assign(slots_.size() * 2, kNotListed);
        const size_t mask = slots_.size() - 1;
        for (uint32_t i = 0; i < pairs.size(); ++i) {
            size_t slot = hash_key(pairs[i].key) & mask;
            while (slots_[slot] != kNotListed) slot = (slot + 1) & mask;
            slots_[slot] = i;
        }
    }

    std::vector<uint32_t> slots_;
};

}  // namespace fastlm::tokenizer
