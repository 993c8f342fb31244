// How often each distinct pre-token occurs in a stream of text: the only thing that BPE training needs to know of it.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "tokenizer/pretokenize.hpp"

namespace fastlm::tokenizer {

struct CountedWord {
    const char* data;
    uint32_t length;
    uint32_t hash;
    uint64_t count;

    std::string_view view() const { return {data, length}; }
};

// A hash table with linear probing: 4-byte slots that point into an array of words, which grows by blocks, so that
// growing moves no word. It keeps no copy of the bytes; whoever adds a word says how to make a stored copy of one that
// is new.
class WordTable {
public:
    template <class Store>
    void add(std::string_view word, uint32_t hash, uint64_t count, Store&& store) {
        if ((size_ + 1) * 2 > slots_.size()) grow();
        for (size_t slot = hash & mask();; slot = (slot + 1) & mask()) {
            if (slots_[slot] == kEmpty) {
                slots_[slot] = static_cast<uint32_t>(size_);
                if (size_ >> kBlockBits == blocks_.size()) blocks_.emplace_back(new CountedWord[kBlockWords]);
                word_at(size_++) = {store(word), static_cast<uint32_t>(word.size()), hash, count};
                return;
            }
            CountedWord& found = word_at(slots_[slot]);
            if (found.hash == hash && found.length == word.size() &&
                std::memcmp(found.data, word.data(), word.size()) == 0) {
                found.count += count;
                return;
            }
        }
    }

    size_t size() const { return size_; }
    template <class Visit>
    void for_each(Visit&& visit) const {
        for (size_t i = 0; i < size_; ++i) visit(blocks_[i >> kBlockBits][i & (kBlockWords - 1)]);
    }
    size_t memory() const { return size_ * sizeof(CountedWord) + slots_.size() * sizeof(uint32_t); }
    void clear();

private:
    static constexpr uint32_t kEmpty = UINT32_MAX;
    static constexpr size_t kBlockBits = 13;
    static constexpr size_t kBlockWords = size_t{1} << kBlockBits;  // 192 KiB

    size_t mask() const { return slots_.size() - 1; }
    CountedWord& word_at(size_t i) { return blocks_[i >> kBlockBits][i & (kBlockWords - 1)]; }
    void grow();

    std::vector<std::unique_ptr<CountedWord[]>> blocks_;
    size_t size_ = 0;
    std::vector<uint32_t> slots_;
};

// Bytes that never move, in blocks, freed all at once.
class Arena {
public:
    const char* copy(std::string_view bytes);
    size_t memory() const { return memory_; }  // in use

private:
    static constexpr size_t kBlockBytes = size_t{1} << 18;

    std::vector<std::unique_ptr<char[]>> blocks_;
    size_t memory_ = 0;
    char* next_ = nullptr;
    size_t free_ = 0;
};

struct InvalidUtf8 {
    size_t text;    // which of the texts
    size_t offset;  // of its first byte that begins no character
};

// Counts in rounds: the threads of a round count into tables of their own, whose keys point into the caller's text;
// then each thread folds one hash range of all of them into the store. So the store holds every word once, and memory
// grows with the number of distinct words only. When the store is larger than it may be, the rarest words are forgotten
// until half of it is free, as in lossy counting (Manku and Motwani 2002).
class WordCounter {
public:
    // `most_bytes` is the limit of the store; 0 is none.
    WordCounter(Pattern pattern, unsigned num_threads, size_t most_bytes = 0);

    // Counts texts that have nothing to do with each other; with `by_line`, each line of them, its end included, is
    // one. When one is not UTF-8, says where, and counts none.
    std::optional<InvalidUtf8> add(std::span<const std::string_view> texts, bool by_line = false);

    uint64_t total_bytes() const { return total_bytes_; }
    uint64_t total_words() const { return total_words_; }  // those that were forgotten too
    uint64_t distinct_words() const;
    uint64_t forgotten_words() const { return forgotten_words_; }

    template <class Visit>
    void for_each(Visit&& visit) const {
        for (const Shard& shard : shards_) {
            shard.table.for_each([&](const CountedWord& word) { visit(word.view(), word.count); });
        }
    }
    // As for_each, and frees each part of the store when it has been visited.
    template <class Visit>
    void consume(Visit&& visit) {
        for (WordTable& table : round_tables_) table = WordTable{};
        for (Shard& shard : shards_) {
            shard.table.for_each([&](const CountedWord& word) { visit(word.view(), word.count); });
            shard = Shard{};
        }
    }

private:
    // Many, so that little is there twice while a shard is freed or rebuilt.
    static constexpr size_t kShards = 64;

    struct Shard {
        WordTable table;
        Arena arena;
    };

    size_t memory() const;
    void forget_rarest();

    Pattern pattern_;
    Scanner scanner_;
    size_t most_bytes_;
    uint64_t total_bytes_ = 0;
    uint64_t total_words_ = 0;
    uint64_t forgotten_words_ = 0;
    std::vector<WordTable> round_tables_;  // one for each thread
    std::vector<Shard> shards_;            // by the upper bits of the hash
};

// Length of the longest proper prefix that may be counted apart from the rest with the same result under every
// pattern; 0 when there is none. Such a place lies between a line end and the text after it, or between a letter and
// the single space before the next word.
size_t last_safe_cut(std::string_view text);

// Offset of the first byte that begins no valid UTF-8 character, or nothing.
std::optional<size_t> find_invalid_utf8(std::string_view text);

}  // namespace fastlm::tokenizer
