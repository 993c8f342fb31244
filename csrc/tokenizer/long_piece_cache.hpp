// Recent pre-tokens that are too long, or have too many ids, for an entry of PieceCache: rulers, long words, words in
// scripts that the vocabulary hardly knows. Bytes and ids lie in one arena; when it is full everything is forgotten.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "tokenizer/hash.hpp"
#include "tokenizer/id_buffer.hpp"

namespace fastlm::tokenizer {

class LongPieceCache {
public:
    static constexpr size_t kMaxBytes = 512;  // longer ones are rarely seen again

    // Appends the ids of `piece` if it is known.
    bool find(std::string_view piece, uint64_t hash, IdBuffer& ids) const {
        if (slots_.empty()) return false;
        for (size_t i = hash & kMask; slots_[i]; i = (i + 1) & kMask) {
            const Entry& entry = entries_[slots_[i] - 1];
            if (entry.hash != hash || entry.size != piece.size()) continue;
            const uint32_t* stored = arena_.data() + entry.begin;
            if (std::memcmp(stored, piece.data(), piece.size()) != 0) continue;
            ids.append(stored + words_of(piece.size()), entry.num_ids);
            return true;
        }
        return false;
    }

    // `piece` is not known and has at most kMaxBytes, and so many ids.
    void insert(std::string_view piece, uint64_t hash, const uint32_t* ids, size_t num_ids) {
        const size_t words = words_of(piece.size()) + num_ids;
        if (slots_.empty() || entries_.size() == kMostEntries || arena_.size() + words > kArenaWords) {
            slots_.assign(kMask + 1, 0);
            entries_.clear();
            arena_.clear();
        }
        const size_t begin = arena_.size();
        arena_.resize(begin + words);
        std::memcpy(arena_.data() + begin, piece.data(), piece.size());
        std::memcpy(arena_.data() + begin + words_of(piece.size()), ids, num_ids * sizeof(*ids));
        entries_.push_back({hash, static_cast<uint32_t>(begin), static_cast<uint16_t>(piece.size()),
                            static_cast<uint16_t>(num_ids)});
        size_t i = hash & kMask;
        while (slots_[i]) i = (i + 1) & kMask;
        slots_[i] = static_cast<uint32_t>(entries_.size());
    }

private:
    static constexpr size_t kMostEntries = 1 << 15;
    static constexpr size_t kMask = 2 * kMostEntries - 1;
    static constexpr size_t kArenaWords = 1 << 20;  // 4 MiB for each thread that encodes

    struct Entry {
        uint64_t hash;
        uint32_t begin;  // of the bytes in the arena; the ids follow
        uint16_t size;
        uint16_t num_ids;
    };

    static size_t words_of(size_t bytes) { return (bytes + 3) / 4; }

    std::vector<uint32_t> slots_;  // 1 + index of an entry, or 0
    std::vector<Entry> entries_;
    std::vector<uint32_t> arena_;
};

}  // namespace fastlm::tokenizer
