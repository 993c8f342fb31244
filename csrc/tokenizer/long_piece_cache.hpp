// Recent pre-tokens that have no place in PieceCache: rulers, long words, words in scripts that the vocabulary hardly
// knows, and the few whose line is full. Bytes and ids lie in one arena; when it is full everything is forgotten.
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

    void prefetch(uint64_t hash) const {
        if (!entries_.empty()) __builtin_prefetch(&entries_[hash & kMask]);
    }

    // Appends the ids of `piece` if it is known.
    bool find(std::string_view piece, uint64_t hash, IdBuffer& ids) const {
        if (entries_.empty()) return false;
        for (size_t i = hash & kMask; entries_[i].size; i = (i + 1) & kMask) {
            const Entry& entry = entries_[i];
            if (entry.tag != tag(hash) || entry.size != piece.size()) continue;
            const uint32_t* stored = arena_.data() + entry.begin;
            if (std::memcmp(stored, piece.data(), piece.size()) != 0) continue;
            ids.append(stored + words_of(piece.size()), entry.num_ids);
            return true;
        }
        return false;
    }

    // `piece` is not known and has 1 to kMaxBytes bytes, and as many ids at most.
    void insert(std::string_view piece, uint64_t hash, const uint32_t* ids, size_t num_ids) {
        const size_t words = words_of(piece.size()) + num_ids;
        if (entries_.empty() || num_entries_ == kMostEntries || arena_.size() + words > kArenaWords) {
            entries_.assign(kMask + 1, {});
            arena_.clear();
            num_entries_ = 0;
        }
        const size_t begin = arena_.size();
        arena_.resize(begin + words);
        std::memcpy(arena_.data() + begin, piece.data(), piece.size());
        std::memcpy(arena_.data() + begin + words_of(piece.size()), ids, num_ids * sizeof(*ids));
        size_t i = hash & kMask;
        while (entries_[i].size) i = (i + 1) & kMask;
        entries_[i] = {tag(hash), static_cast<uint32_t>(begin), static_cast<uint16_t>(piece.size()),
                       static_cast<uint16_t>(num_ids)};
        ++num_entries_;
    }

private:
    static constexpr size_t kMostEntries = 1 << 16;
    static constexpr size_t kMask = 2 * kMostEntries - 1;
    static constexpr size_t kArenaWords = 1 << 20;  // 4 MiB for each thread that encodes, beside 1.5 MiB of entries

    struct Entry {
        uint32_t tag;
        uint32_t begin;  // of the bytes in the arena; the ids follow
        uint16_t size;   // 0 where there is none
        uint16_t num_ids;
    };

    static uint32_t tag(uint64_t hash) { return static_cast<uint32_t>(hash >> 32); }
    static size_t words_of(size_t bytes) { return (bytes + 3) / 4; }

    std::vector<Entry> entries_;
    std::vector<uint32_t> arena_;
    size_t num_entries_ = 0;
};

}  // namespace fastlm::tokenizer
