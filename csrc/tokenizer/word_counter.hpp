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

// A flat hash table with linear probing: 4-byte slots that point into a dense array of words. It keeps no copy of the
// bytes; whoever adds a word says how to make a stored copy of one that is new.
class WordTable {
public:
    template <class Store>
    void add(std::string_view word, uint32_t hash, uint64_t count, Store&& store) {
        if ((words_.size() + 1) * 2 > slots_.size()) grow();
        for (size_t slot = hash & mask();; slot = (slot + 1) & mask()) {
            if (slots_[slot] == kEmpty) {
                slots_[slot] = static_cast<uint32_t>(words_.size());
                words_.push_back({store(word), static_cast<uint32_t>(word.size()), hash, count});
                return;
            }
            CountedWord& found = words_[slots_[slot]];
            if (found.hash == hash && found.length == word.size() &&
                std::memcmp(found.data, word.data(), word.size()) == 0) {
                found.count += count;
                return;
            }
        }
    }

    const std::vector<CountedWord>& words() const { return words_; }
    void clear();

private:
    static constexpr uint32_t kEmpty = UINT32_MAX;

    size_t mask() const { return slots_.size() - 1; }
    void grow();

    std::vector<CountedWord> words_;
    std::vector<uint32_t> slots_;
};

// Bytes that never move, in blocks, freed all at once.
class Arena {
public:
    const char* copy(std::string_view bytes);

private:
    static constexpr size_t kBlockBytes = size_t{1} << 20;

    std::vector<std::unique_ptr<char[]>> blocks_;
    char* next_ = nullptr;
    size_t free_ = 0;
};

struct InvalidUtf8 {
    size_t text;    // which of the texts
    size_t offset;  // of its first byte that begins no character
};

// Counts in rounds: the threads of a round count into tables of their own, whose keys point into the caller's text;
// then each thread folds one hash range of all of them into the store. So the store holds every word once, and memory
// grows with the number of distinct words only.
class WordCounter {
public:
    WordCounter(Pattern pattern, unsigned num_threads);

    // Counts texts that have nothing to do with each other. When one is not UTF-8, says where, and counts none.
    std::optional<InvalidUtf8> add(std::span<const std::string_view> texts);

    uint64_t total_words() const;
    uint64_t distinct_words() const;

    template <class Visit>
    void for_each(Visit&& visit) const {
        for (const Shard& shard : shards_)
            for (const CountedWord& word : shard.table.words()) visit(word.view(), word.count);
    }
    void clear();

private:
    struct Shard {
        WordTable table;
        Arena arena;
    };

    Pattern pattern_;
    std::vector<WordTable> round_tables_;  // one for each thread
    std::vector<Shard> shards_;            // one for each thread, by the upper bits of the hash
};

// Length of the longest proper prefix that may be counted apart from the rest with the same result under every
// pattern; 0 when there is none. Such a place lies between a line end and the text after it, or between a letter and
// the single space before the next word.
size_t last_safe_cut(std::string_view text);

// Offset of the first byte that begins no valid UTF-8 character, or nothing.
std::optional<size_t> find_invalid_utf8(std::string_view text);

}  // namespace fastlm::tokenizer
