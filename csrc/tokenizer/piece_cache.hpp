// Recent pre-tokens and their ids. One entry is one cache line: a key of up to 23 bytes and up to nine ids, which is
// 99 % of the pre-tokens of English and code and 95 % of Korean. An entry lives in one of the two lines of a pair: in its
// home, or, when another with the same home came after it, beside that. The table doubles while it fills, up to 16 MiB;
// from then on the older of two gives way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "tokenizer/hash.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastlm::tokenizer {

constexpr size_t kMaxCachedBytes = 23;

// By size: ones over the bytes of a key that a piece of that size fills.
struct KeyMasks {
    uint64_t words[kMaxCachedBytes + 1][3]{};

    constexpr KeyMasks() {
        for (size_t size = 0; size <= kMaxCachedBytes; ++size) {
            for (size_t i = 0; i < size; ++i) words[size][i / 8] |= uint64_t{0xff} << (i % 8 * 8);
        }
    }
};
inline constexpr KeyMasks kKeyMasks;

class PieceCache {
public:
    static constexpr size_t kMaxBytes = kMaxCachedBytes;
    static constexpr size_t kMaxIds = 9;

    // The bytes, zeros, and the size in the last byte. An empty entry has size 0, a piece that is too long kUncached.
    struct Key {
        uint64_t words[3];

        bool operator==(const Key& other) const {
            return !((words[0] ^ other.words[0]) | (words[1] ^ other.words[1]) | (words[2] ^ other.words[2]));
        }
    };
    static constexpr Key kUncached{{0, 0, UINT64_MAX}};

    struct alignas(64) Entry {
        Key key;
        uint16_t num_ids;
        uint16_t tag_beside;  // of the key beside: a miss seldom has to look there
        uint32_t ids[kMaxIds];
    };

    PieceCache() { allocate(kFirstEntries); }

    // `size` is at most kMaxBytes; 24 bytes at `p` must be readable.
    static Key key_of(const char* p, size_t size) {
        const uint64_t* keep = kKeyMasks.words[size];
        return {{load8(p) & keep[0], load8(p + 8) & keep[1], (load8(p + 16) & keep[2]) | uint64_t{size} << 56}};
    }
    static Key key_of_last(const char* p, size_t size) {
        char copy[24] = {};
        std::memcpy(copy, p, size);
        return key_of(copy, size);
    }

    // Valid until `grow_if_full`.
    Entry& home(const Key& key) { return entries_[hash(key) & mask_]; }

    // An entry with this key beside `home`, which then trades places with it; nullptr if there is none.
    const Entry* find_beside(Entry& home, const Key& key) {
        Entry& found = beside(home);
        __builtin_prefetch(&found, 1);
        if (home.tag_beside != tag(key)) return nullptr;
        if (!(found.key == key)) return nullptr;
        std::swap(home, found);
        home.tag_beside = tag(found.key);
        found.tag_beside = tag(key);
        return &home;
    }

    // `count` is at most kMaxIds.
    void insert(Entry& home, const Key& key, const uint32_t* ids, size_t count) {
        Entry& older = beside(home);
        older = home;
        older.tag_beside = tag(key);
        home.tag_beside = tag(older.key);
        home.key = key;
        home.num_ids = static_cast<uint16_t>(count);
        std::memcpy(home.ids, ids, count * sizeof(*ids));
        ++num_inserted_;
    }

    void grow_if_full() {
        const size_t size = mask_ + 1;
        if (num_inserted_ * 2 < size || size >= kMostEntries) return;
        const std::unique_ptr<void, Free> old_memory = std::move(memory_);
        const Entry* old = entries_;
        allocate(size * 8);
        for (size_t i = 0; i < size; ++i) {
            if (old[i].num_ids) insert(home(old[i].key), old[i].key, old[i].ids, old[i].num_ids);
        }
    }

private:
    static constexpr size_t kFirstEntries = 1 << 15;  // 2 MiB, one huge page
    static constexpr size_t kMostEntries = 1 << 18;   // 16 MiB for each thread that encodes

    static uint64_t hash(const Key& key) {
        return mix(key.words[0] ^ 0xa0761d6478bd642fu, (key.words[1] ^ 0xe7037ed1a0b428dbu) + key.words[2] * 0x9e3779b97f4a7c15u);
    }

    Entry& beside(Entry& home) { return entries_[static_cast<size_t>(&home - entries_) ^ 1]; }
    static uint16_t tag(const Key& key) { return static_cast<uint16_t>(hash(key) >> 48); }

    void allocate(size_t size) {
        const size_t bytes = size * sizeof(Entry);
        memory_.reset(std::calloc(1, bytes + kHugePage));
        if (!memory_) throw std::bad_alloc();
        void* start = memory_.get();
        size_t space = bytes + kHugePage;
        entries_ = static_cast<Entry*>(std::align(bytes >= kHugePage ? kHugePage : alignof(Entry), bytes, start, space));
#if defined(__linux__)
        // Prefetches that miss the TLB are lost. Asked for before the pages are touched, huge ones avoid that.
        if (bytes >= kHugePage) madvise(entries_, bytes, MADV_HUGEPAGE);
#endif
        mask_ = size - 1;
        num_inserted_ = 0;
    }

    static constexpr size_t kHugePage = size_t{2} << 20;
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<void, Free> memory_;  // zeroed by the system, page by page as they are used
    Entry* entries_ = nullptr;            // aligned, inside memory_
    size_t mask_ = 0;
    size_t num_inserted_ = 0;
};

}  // namespace fastlm::tokenizer
