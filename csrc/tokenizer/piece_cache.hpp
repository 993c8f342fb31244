// Recent pre-tokens of up to 15 bytes, which is 99 % of those of English and code and 89 % of Korean, and their ids.
//
// One cache line is fetched for each pre-token, and it is all that is looked at. Each half of a line holds a key and up
// to four ids. A pre-token has its home in one half and moves to the other when one with the same home comes after it.
// Up to twelve ids take the whole line: the key and the first four are in the home, the others beside it, where they
// read as an empty entry, because the top byte of an id is zero and that of a key is not.
//
// The table starts with 2 MiB, one huge page, and while it is that small nothing is dropped: what finds its line full
// stays in the cache of long pieces. When it is half full it grows to 16 MiB, where the older of two gives way.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "tokenizer/hash.hpp"
#include "tokenizer/vocabulary.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastlm::tokenizer {

class PieceCache {
public:
    static constexpr size_t kMaxBytes = 15;
    static constexpr size_t kMaxIds = 12;

    // The bytes, zeros, and in the last byte the size. In an entry, the upper half of that byte is the number of ids.
    struct Key {
        uint64_t words[2];
    };

    // Of a piece that is too long: equal to no entry, since it has no size, and no id has the top bit of `hash`.
    static Key long_key(uint64_t hash) { return {{hash | uint64_t{1} << 63, 0}}; }

    struct Entry {
        Key key;
        uint32_t ids[4];

        size_t num_ids() const { return key.words[1] >> 60; }
        bool holds(const Key& other) const {
            return !((key.words[0] ^ other.words[0]) | (key.words[1] ^ other.words[1]) << 4);
        }
    };

    PieceCache() { allocate(kFirstEntries); }

    // Of the `size` bytes at `p`, at most kMaxBytes, in a text that ends at `end`.
    static Key key_of(const uint8_t* p, size_t size, const uint8_t* end) {
        uint8_t copy[sizeof(Key)] = {};
        if (static_cast<size_t>(end - p) < sizeof(Key)) [[unlikely]] {
            std::memcpy(copy, p, size);
            p = copy;
        }
        const uint64_t* keep = kKeep.words[size];
        return {{load8(p) & keep[0], (load8(p + 8) & keep[1]) | uint64_t{size} << 56}};
    }

    // Valid until `grow_if_full`.
    struct Table {
        Entry* entries;
        unsigned shift;

        Entry* home(const Key& key) const {
            const uint64_t hash = key.words[0] * 0x9e3779b97f4a7c15u + key.words[1] * 0xe7037ed1a0b428dbu;
            return entries + (hash >> shift);
        }
    };
    Table table() const { return {entries_, shift_}; }

    // Writes the ids of `entry` to `out`, where there is room for kMaxIds, and returns how many those are.
    static size_t copy_ids(const Entry& entry, uint32_t* out) {
        std::memcpy(out, entry.ids, sizeof(entry.ids));
        std::memcpy(out + 4, &beside(entry), sizeof(Entry));
        return entry.num_ids();
    }

    // An entry with this key beside `home`, which then trades places with it; nullptr if there is none.
    static const Entry* find_beside(Entry& home, const Key& key) {
        Entry& found = beside(home);
        if (!found.holds(key)) return nullptr;
        std::swap(home, found);
        return &home;
    }

    // Returns false where that would drop another while the table is small. `count` is 1 to kMaxIds.
    bool insert(Entry& home, const Key& key, const uint32_t* ids, size_t count) {
        Entry& other = beside(home);
        const bool is_taken_whole = home.num_ids() > 4 || other.num_ids() > 4;
        const int taken = (home.num_ids() > 0) + (other.num_ids() > 0);
        const bool drops = is_taken_whole || taken > (count > 4 ? 0 : 1);
        if (drops && !is_grown()) return false;
        if (is_taken_whole || count > 4) {
            other = {};
        } else if (home.num_ids()) {
            other = home;
        }
        if (count > 4) std::memcpy(&other, ids + 4, (count - 4) * sizeof(*ids));
        num_filled_ += count > 4 ? 2 : 1;
        home.key = {{key.words[0], key.words[1] | uint64_t{count} << 60}};
        std::memcpy(home.ids, ids, std::min<size_t>(count, 4) * sizeof(*ids));
        return true;
    }

    void grow_if_full() {
        const size_t old_size = size();
        if (num_filled_ * 2 < old_size || is_grown()) return;
        const std::unique_ptr<void, Free> old_memory = std::move(memory_);
        const Entry* old = entries_;
        allocate(kGrownEntries);
        for (size_t i = 0; i < old_size; ++i) {
            if (!old[i].num_ids()) continue;
            uint32_t ids[kMaxIds];
            const size_t count = copy_ids(old[i], ids);
            const Key key{{old[i].key.words[0], old[i].key.words[1] & ~(uint64_t{0xf} << 60)}};
            insert(*table().home(key), key, ids, count);
        }
    }

private:
    static constexpr size_t kFirstEntries = 1 << 16;
    static constexpr size_t kGrownEntries = 1 << 19;  // for each thread that encodes

    // By size: ones over the bytes of a key that a piece of that size fills.
    struct Keep {
        uint64_t words[kMaxBytes + 1][2]{};

        constexpr Keep() {
            for (size_t size = 0; size <= kMaxBytes; ++size) {
                for (size_t i = 0; i < size; ++i) words[size][i / 8] |= uint64_t{0xff} << (i % 8 * 8);
            }
        }
    };
    static const Keep kKeep;

    bool is_grown() const { return size() == kGrownEntries; }
    size_t size() const { return size_t{1} << (64 - shift_); }

    // The other half of the line.
    static Entry& beside(const Entry& entry) {
        return *reinterpret_cast<Entry*>(reinterpret_cast<uintptr_t>(&entry) ^ sizeof(Entry));
    }

    void allocate(size_t size) {
        const size_t bytes = size * sizeof(Entry);
        memory_.reset(std::calloc(1, bytes + kHugePage));
        if (!memory_) throw std::bad_alloc();
        void* start = memory_.get();
        size_t space = bytes + kHugePage;
        entries_ = static_cast<Entry*>(std::align(kHugePage, bytes, start, space));
#if defined(__linux__)
        // Prefetches that miss the TLB are lost. Asked for before the pages are touched, huge ones avoid that.
        madvise(entries_, bytes, MADV_HUGEPAGE);
#endif
        shift_ = 65 - static_cast<unsigned>(std::bit_width(size));
        num_filled_ = 0;
    }

    static constexpr size_t kHugePage = size_t{2} << 20;
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<void, Free> memory_;  // zeroed by the system, page by page as they are used
    Entry* entries_ = nullptr;            // aligned, inside memory_
    unsigned shift_ = 0;
    size_t num_filled_ = 0;
};
inline constexpr PieceCache::Keep PieceCache::kKeep;

static_assert(kMaxId >> 24 == 0, "the top byte of an id tells it from a key");

}  // namespace fastlm::tokenizer
