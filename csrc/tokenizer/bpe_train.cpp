// The merge loop of BPE (Sennrich, Haddow and Birch 2016, arXiv:1508.07909, algorithm 1) over distinct words.
//
// Each step takes the most frequent pair of adjacent symbols; among equals the one with the smaller (left, right) ids.
// A pair's occurrences are all known when it appears, because one of its two symbols is then new: its count can only
// fall afterwards. Two consequences make training fast:
//   * The queue may hold outdated counts: a pair that comes to the top with one is put back with its present count.
//   * Only pairs above a threshold need a count, a place in the queue and a list of words. When the top falls below
//     the threshold, one pass over the (by then much shorter) words finds the pairs above a lower one. So the long tail
//     of rare pairs costs neither memory nor cache misses.
// While a pair is merged, changes are summed by neighbour in plain arrays; the hash table sees one update for each
// distinct neighbour instead of four for each occurrence.
#include "tokenizer/bpe_train.hpp"

#include <algorithm>
#include <chrono>
#include <queue>
#include <stdexcept>

#include "tokenizer/pair_table.hpp"

namespace fastlm::tokenizer {
namespace {

// Each threshold is this many times lower than the last: few passes, and few pairs listed that never get merged.
constexpr uint64_t kThresholdStep = 16;
constexpr size_t kSketchBuckets = size_t{1} << 20;
constexpr auto kProgressInterval = std::chrono::milliseconds(100);

struct Word {
    uint64_t begin;  // of its symbols
    uint64_t count;
    uint32_t length;
};

struct Candidate {
    int64_t count;
    uint64_t key;
    uint32_t pair;

    // std::priority_queue pops the greatest.
    bool operator<(const Candidate& other) const {
        return count != other.count ? count < other.count : key > other.key;
    }
};

// What the merge of one pair changes beside one neighbour symbol, on one side.
struct Neighbour {
    int64_t count = 0;
    uint32_t num_words = 0;
    uint32_t last_word = UINT32_MAX;
    uint64_t next = 0;  // where the next word goes in its list
};

class Side {
public:
    void resize(size_t num_symbols) { neighbours.resize(num_symbols); }

    void add(Symbol symbol, uint32_t word, int64_t count) {
        Neighbour& neighbour = neighbours[symbol];
        if (neighbour.last_word == UINT32_MAX) touched.push_back(symbol);
        neighbour.count += count;
        if (neighbour.last_word == word) return;
        neighbour.last_word = word;
        ++neighbour.num_words;
        events.emplace_back(symbol, word);
    }

    void clear() {
        for (Symbol symbol : touched) neighbours[symbol] = {};
        touched.clear();
        events.clear();
    }

    std::vector<Neighbour> neighbours;  // by symbol
    std::vector<Symbol> touched;
    std::vector<std::pair<Symbol, uint32_t>> events;  // (neighbour, word)
};

// `Stored` is the narrowest type that holds every id: words are most of what is read and written.
template <class Stored>
class Trainer {
public:
    Trainer(const TrainOptions& options, const TrainProgress& progress) : options_(options), progress_(progress) {
        left_.resize(options.vocab_size);
        right_.resize(options.vocab_size);
    }

    void load_words(WordCounter& counter);
    std::vector<Merge> run();

private:
    void drop_finished_words();
    void list_pairs(uint64_t threshold);
    void list_pairs_by_matrix(uint64_t threshold);
    void list_pairs_by_sketch(uint64_t threshold);
    void set_threshold(uint64_t threshold, const std::vector<uint64_t>& counts);
    template <class IndexOf>
    void list_words(IndexOf&& index_of);
    bool is_listed(const Pair& pair) const { return pair.count >= static_cast<int64_t>(threshold_); }
    template <class Visit>
    void for_each_pair(Visit&& visit) const {
        for (uint32_t w = 0; w < words_.size(); ++w) {
            const Stored* s = &symbols_[words_[w].begin];
            for (uint32_t i = 0; i + 1 < words_[w].length; ++i) visit(s[i], s[i + 1], w);
        }
    }
    void merge(const Pair& pair, Symbol merged);
    void merge_in_word(uint32_t word_index, Symbol left, Symbol right, Symbol merged);
    template <class MakeKey>
    void add_new_pairs(Side& side, MakeKey&& make_key);
    Symbol id_of(Symbol left, Symbol right);

    const TrainOptions& options_;
    const TrainProgress& progress_;
    std::vector<Stored> symbols_;
    std::vector<Word> words_;
    uint64_t threshold_ = 0;
    PairTable table_;
    std::vector<uint32_t> word_lists_;
    std::priority_queue<Candidate> queue_;
    Side left_, right_;
    std::vector<std::string> spelling_;  // by id, filled only when known_tokens has to be compared with
    uint32_t next_id_ = 0;
};

template <class Stored>
void Trainer<Stored>::load_words(WordCounter& counter) {
    size_t num_words = 0, num_symbols = 0;
    counter.for_each([&](std::string_view word, uint64_t) {
        if (word.size() < 2) return;
        ++num_words;
        num_symbols += word.size();
    });
    if (num_words >= UINT32_MAX) throw std::length_error("more than 2^32 distinct words");
    words_.reserve(num_words);
    symbols_.reserve(num_symbols);
    counter.consume([&](std::string_view word, uint64_t count) {
        if (word.size() < 2) return;
        words_.push_back({symbols_.size(), count, static_cast<uint32_t>(word.size())});
        for (unsigned char byte : word) symbols_.push_back(static_cast<Stored>(options_.byte_ids[byte]));
    });
}

template <class Stored>
void Trainer<Stored>::drop_finished_words() {
    size_t kept_words = 0, end = 0;
    for (const Word& word : words_) {
        if (word.length < 2) continue;
        std::copy_n(symbols_.begin() + word.begin, word.length, symbols_.begin() + end);
        words_[kept_words++] = {end, word.count, word.length};
        end += word.length;
    }
    words_.resize(kept_words);
    symbols_.resize(end);
}

// Finds every pair that occurs at least `threshold` times and the words it is in. With threshold 0 one is chosen by
// the most frequent pair.
template <class Stored>
void Trainer<Stored>::list_pairs(uint64_t threshold) {
    drop_finished_words();
    table_.clear();
    queue_ = {};
    if (static_cast<uint64_t>(next_id_) * next_id_ <= kSketchBuckets)
        list_pairs_by_matrix(threshold);
    else
        list_pairs_by_sketch(threshold);
}

template <class Stored>
void Trainer<Stored>::set_threshold(uint64_t threshold, const std::vector<uint64_t>& counts) {
    if (threshold == 0) threshold = *std::max_element(counts.begin(), counts.end()) / kThresholdStep;
    threshold_ = std::max<uint64_t>({1, options_.min_frequency, threshold});
}

// While ids are few, a matrix holds every pair's count.
template <class Stored>
void Trainer<Stored>::list_pairs_by_matrix(uint64_t threshold) {
    const uint64_t num_ids = next_id_;
    const auto cell = [&](Symbol left, Symbol right) { return left * num_ids + right; };
    std::vector<uint64_t> counts(num_ids * num_ids);
    std::vector<uint32_t> occurrences(num_ids * num_ids);
    for_each_pair([&](Symbol left, Symbol right, uint32_t w) {
        counts[cell(left, right)] += words_[w].count;
        ++occurrences[cell(left, right)];
    });
    set_threshold(threshold, counts);

    std::vector<uint32_t>& index_of = occurrences;  // the same memory, in its second role
    for (Symbol left = 0; left < num_ids; ++left) {
        for (Symbol right = 0; right < num_ids; ++right) {
            uint32_t& index = index_of[cell(left, right)];
            const uint64_t count = counts[cell(left, right)];
            if (count < threshold_) {
                index = kNotListed;
                continue;
            }
            const uint32_t num_words = index;
            index = table_.find_or_add(pair_key(left, right));
            table_.pairs[index].count = static_cast<int64_t>(count);
            table_.pairs[index].num_words = num_words;
        }
    }
    list_words([&](Symbol left, Symbol right) { return index_of[cell(left, right)]; });
}

// Later, pairs are first summed by hash into a sketch. Its sums are never too low, so that most rare pairs are known to
// be rare without a place in the table.
template <class Stored>
void Trainer<Stored>::list_pairs_by_sketch(uint64_t threshold) {
    std::vector<uint64_t> sketch(kSketchBuckets);
    const auto bucket = [&](uint64_t key) -> uint64_t& { return sketch[hash_key(key) % kSketchBuckets]; };
    for_each_pair([&](Symbol left, Symbol right, uint32_t w) { bucket(pair_key(left, right)) += words_[w].count; });
    set_threshold(threshold, sketch);
    for_each_pair([&](Symbol left, Symbol right, uint32_t w) {
        const uint64_t key = pair_key(left, right);
        if (bucket(key) < threshold_) return;
        Pair& pair = table_.pairs[table_.find_or_add(key)];
        pair.count += static_cast<int64_t>(words_[w].count);
        ++pair.num_words;
    });
    list_words([&](Symbol left, Symbol right) {
        const uint64_t key = pair_key(left, right);
        return bucket(key) < threshold_ ? kNotListed : table_.index_of(key);
    });
}

// Fills the list of words of each pair above the threshold, and the queue. `num_words` comes as an upper bound.
template <class Stored>
template <class IndexOf>
void Trainer<Stored>::list_words(IndexOf&& index_of) {
    uint64_t total = 0;
    for (uint32_t i = 0; i < table_.pairs.size(); ++i) {
        Pair& pair = table_.pairs[i];
        if (is_listed(pair)) {
            pair.words_begin = total;
            total += pair.num_words;
            queue_.push({pair.count, pair.key, i});
        }
        pair.num_words = 0;
    }
    word_lists_.resize(total);
    for_each_pair([&](Symbol left, Symbol right, uint32_t w) {
        const uint32_t index = index_of(left, right);
        if (index == kNotListed || !is_listed(table_.pairs[index])) return;
        Pair& pair = table_.pairs[index];
        const uint64_t end = pair.words_begin + pair.num_words;
        if (pair.num_words && word_lists_[end - 1] == w) return;
        word_lists_[end] = w;
        ++pair.num_words;
    });
}

// Index of the first `left`, `right` at or after `from`, or `length`.
template <class Stored>
uint32_t find_pair(const Stored* s, uint32_t from, uint32_t length, Symbol left, Symbol right) {
    const Stored wanted[2] = {static_cast<Stored>(left), static_cast<Stored>(right)};
    for (uint32_t i = from; i + 1 < length; ++i)
        if (std::memcmp(&s[i], wanted, sizeof wanted) == 0) return i;
    return length;
}

// Replaces the pair from left to right, as in "aaa" -> "(aa) a".
template <class Stored>
void Trainer<Stored>::merge_in_word(uint32_t word_index, Symbol left, Symbol right, Symbol merged) {
    Word& word = words_[word_index];
    Stored* s = &symbols_[word.begin];
    const int64_t count = static_cast<int64_t>(word.count);
    uint32_t in = find_pair(s, 0, word.length, left, right), out = in;
    while (in < word.length) {
        if (out > 0) left_.add(s[out - 1], word_index, count);
        if (in + 2 < word.length) right_.add(s[in + 2], word_index, count);
        s[out++] = static_cast<Stored>(merged);
        in += 2;
        const uint32_t next = find_pair(s, in, word.length, left, right);
        while (in < next) s[out++] = s[in++];
    }
    word.length = out;
}

template <class Stored>
template <class MakeKey>
void Trainer<Stored>::add_new_pairs(Side& side, MakeKey&& make_key) {
    for (Symbol symbol : side.touched) {
        Neighbour& neighbour = side.neighbours[symbol];
        if (neighbour.count < static_cast<int64_t>(threshold_)) continue;
        const uint64_t key = make_key(symbol);
        const uint32_t index = table_.find_or_add(key);
        neighbour.next = word_lists_.size();
        table_.pairs[index] = {key, neighbour.count, neighbour.next, neighbour.num_words};
        queue_.push({neighbour.count, key, index});
        word_lists_.resize(word_lists_.size() + neighbour.num_words);
    }
    for (const auto& [symbol, word] : side.events) {
        Neighbour& neighbour = side.neighbours[symbol];
        if (neighbour.count >= static_cast<int64_t>(threshold_)) word_lists_[neighbour.next++] = word;
    }
}

template <class Stored>
void Trainer<Stored>::merge(const Pair& pair, Symbol merged) {
    constexpr uint32_t kPrefetchAhead = 16;
    const Symbol left = left_of(pair.key), right = right_of(pair.key);
    for (uint32_t i = 0; i < pair.num_words; ++i) {
        const uint32_t* word = &word_lists_[pair.words_begin + i];
        if (i + 2 * kPrefetchAhead < pair.num_words) {
            __builtin_prefetch(&words_[word[2 * kPrefetchAhead]]);
            __builtin_prefetch(&symbols_[words_[word[kPrefetchAhead]].begin]);
        }
        merge_in_word(*word, left, right, merged);
    }

    const auto decrease = [&](uint64_t key, int64_t count) {
        if (const uint32_t index = table_.index_of(key); index != kNotListed) table_.pairs[index].count -= count;
    };
    for (Symbol next : right_.touched) decrease(pair_key(right, next), right_.neighbours[next].count);
    add_new_pairs(right_, [&](Symbol next) { return pair_key(merged, next); });
    // In "abab" the second occurrence ends the pair (merged, a) that the first began: hence after the line above.
    for (Symbol previous : left_.touched) decrease(pair_key(previous, left), left_.neighbours[previous].count);
    add_new_pairs(left_, [&](Symbol previous) { return pair_key(previous, merged); });
    right_.clear();
    left_.clear();
}

template <class Stored>
Symbol Trainer<Stored>::id_of(Symbol left, Symbol right) {
    if (options_.known_tokens.empty()) return next_id_++;
    const std::string text = spelling_[left] + spelling_[right];
    if (const auto known = options_.known_tokens.find(text); known != options_.known_tokens.end()) {
        spelling_[known->second] = text;
        return known->second;
    }
    spelling_[next_id_] = text;
    return next_id_++;
}

template <class Stored>
std::vector<Merge> Trainer<Stored>::run() {
    next_id_ = options_.first_new_id;
    if (!options_.known_tokens.empty()) {
        spelling_.resize(options_.vocab_size);
        for (size_t byte = 0; byte < 256; ++byte) spelling_[options_.byte_ids[byte]] = static_cast<char>(byte);
    }
    std::vector<Merge> merges;
    auto next_report = std::chrono::steady_clock::now();
    if (next_id_ < options_.vocab_size) list_pairs(0);
    while (next_id_ < options_.vocab_size) {
        if (const auto now = std::chrono::steady_clock::now(); now >= next_report) {
            progress_(next_id_);
            next_report = now + kProgressInterval;
        }
        if (queue_.empty() || queue_.top().count < static_cast<int64_t>(threshold_)) {
            const uint64_t lowest = std::max<uint64_t>(1, options_.min_frequency);
            if (threshold_ <= lowest) break;
            list_pairs(std::max(lowest, threshold_ / kThresholdStep));
            continue;
        }
        Candidate top = queue_.top();
        queue_.pop();
        const Pair pair = table_.pairs[top.pair];
        if (pair.count != top.count) {
            top.count = pair.count;
            if (top.count >= static_cast<int64_t>(threshold_)) queue_.push(top);
            continue;
        }
        const Symbol merged = id_of(left_of(pair.key), right_of(pair.key));
        merges.push_back({left_of(pair.key), right_of(pair.key), merged});
        merge(pair, merged);
    }
    return merges;
}

template <class Stored>
std::vector<Merge> train(WordCounter& counter, const TrainOptions& options, const TrainProgress& progress) {
    Trainer<Stored> trainer(options, progress);
    trainer.load_words(counter);
    return trainer.run();
}

}  // namespace

std::vector<Merge> train_merges(WordCounter& counter, const TrainOptions& options, const TrainProgress& progress) {
    return options.vocab_size <= size_t{UINT16_MAX} + 1 ? train<uint16_t>(counter, options, progress)
                                                        : train<uint32_t>(counter, options, progress);
}

}  // namespace fastlm::tokenizer
