// (left id, right id) -> how soon they merge; the lowest priority comes first. Most pairs have no merge, so a bitmap that
// fits the L2 cache is asked first; eight bits for each merge let one absent pair in eight through to the table.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "tokenizer/hash.hpp"

namespace fastlm::tokenizer {

template <typename Value>
class PairTable {
public:
    static constexpr Value kNone = std::numeric_limits<Value>::max();

    // Empties the table and makes room for that many merges.
    void reset(size_t num_merges) {
        const size_t size = std::bit_ceil(std::max<size_t>(num_merges * 2, 16));
        slots_ = std::vector<Slot>(size);  // not assign, which would keep the room of a larger table
        mask_ = size - 1;
        shift_ = 64 - std::countr_zero(size);
        const size_t num_bits = std::bit_ceil(std::max<size_t>(num_merges * 8, 64));
        bitmap_.assign(num_bits / 64, 0);
        bit_mask_ = num_bits - 1;
    }

    // Throws std::invalid_argument when the pair is there already.
    void add(uint32_t left, uint32_t right, Value value) {
        const uint64_t added = key(left, right);
        const uint64_t hash = hash_of(added);
        bitmap_[(hash & bit_mask_) >> 6] |= uint64_t{1} << (hash & 63);
        size_t i = hash >> shift_;
        while (slots_[i].key != kEmpty && slots_[i].key != added) i = (i + 1) & mask_;
        if (slots_[i].key == added) throw std::invalid_argument("a merge is there twice");
        slots_[i] = {added, value};
    }

    // The value, or kNone.
    Value find(uint32_t left, uint32_t right) const {
        const uint64_t wanted = key(left, right);
        const uint64_t hash = hash_of(wanted);
        const uint64_t bit = hash & bit_mask_;
        if (!(bitmap_[bit >> 6] >> (bit & 63) & 1)) return kNone;
        for (size_t i = hash >> shift_;; i = (i + 1) & mask_) {
            if (slots_[i].key == wanted) return slots_[i].value;
            if (slots_[i].key == kEmpty) return kNone;
        }
    }

    // Calls f(left, right, value) for each merge, in no order.
    template <typename F>
    void for_each(F&& f) const {
        for (const Slot& slot : slots_) {
            if (slot.key != kEmpty) f(static_cast<uint32_t>(slot.key >> 32), static_cast<uint32_t>(slot.key), slot.value);
        }
    }

private:
    static constexpr uint64_t kEmpty = UINT64_MAX;
    struct Slot {
        uint64_t key = kEmpty;
        Value value = kNone;
    };

    static uint64_t key(uint32_t left, uint32_t right) { return static_cast<uint64_t>(left) << 32 | right; }
    static uint64_t hash_of(uint64_t key) { return mix(key ^ 0x9e3779b97f4a7c15u, 0xd6e8feb86659fd93u); }

    std::vector<Slot> slots_;
    std::vector<uint64_t> bitmap_;
    size_t mask_ = 0;
    uint64_t bit_mask_ = 0;
    int shift_ = 0;
};

using MergeTable = PairTable<uint32_t>;  // of priorities

}  // namespace fastlm::tokenizer
