#include "tokenizer/sentencepiece.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>

namespace fastlm::tokenizer {

namespace {

constexpr size_t kShortPiece = 64;         // symbols; a scan of so few pairs is faster than a heap
constexpr size_t kCacheEntries = 1 << 16;  // 4 MiB at most for each thread that encodes
constexpr size_t kKeptNodes = 1 << 16;     // room for long pieces is not kept: a piece of megabytes is rare
constexpr uint32_t kMeta = 0x2581;         // "▁"
constexpr uint32_t kEnd = UINT32_MAX;

struct Char {
    uint32_t code;
    uint32_t size;
};

// `text` is valid UTF-8; whatever else it is, nothing outside it is read.
Char char_at(std::string_view text, size_t at) {
    const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(text[at + i])); };
    const uint32_t lead = byte(0);
    const size_t left = text.size() - at;
    if (lead < 0x80) return {lead, 1};
    if (lead < 0xe0 && left >= 2) return {(lead & 31) << 6 | (byte(1) & 63), 2};
    if (lead < 0xf0 && left >= 3) return {(lead & 15) << 12 | (byte(1) & 63) << 6 | (byte(2) & 63), 3};
    if (left >= 4) return {(lead & 7) << 18 | (byte(1) & 63) << 12 | (byte(2) & 63) << 6 | (byte(3) & 63), 4};
    return {lead, 1};
}

using Merged = uint64_t;  // priority << 32 | id of what a merge makes
constexpr Merged kNoMerge = PairTable<uint64_t>::kNone;

uint32_t priority_of(Merged merged) { return static_cast<uint32_t>(merged >> 32); }
uint32_t result_of(Merged merged) { return static_cast<uint32_t>(merged); }
uint64_t pair_of(uint32_t left, uint32_t right) { return static_cast<uint64_t>(left) << 32 | right; }

}  // namespace

struct SentencePieceEncoder::State {
    // A piece of at most 32 bytes, padded with zeros, and its ids. An empty entry has size 0, as no piece has.
    struct alignas(64) Entry {
        static constexpr size_t kMaxBytes = 32;
        static constexpr size_t kMaxIds = 7;
        uint64_t words[4];
        uint8_t size;
        uint8_t num_ids;
        uint32_t ids[kMaxIds];
    };
    struct Node {
        uint32_t id;
        uint32_t previous;
        uint32_t next;
    };
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };

    State() {
        void* start = memory.get();
        size_t space = (kCacheEntries + 1) * sizeof(Entry);
        if (!start) throw std::bad_alloc();
        cache = static_cast<Entry*>(std::align(alignof(Entry), kCacheEntries * sizeof(Entry), start, space));
    }

    std::unique_ptr<void, Free> memory{std::calloc(kCacheEntries + 1, sizeof(Entry))};  // zeroed page by page, as used
    Entry* cache = nullptr;
    std::vector<uint32_t> symbols;
    std::vector<Node> nodes;
    std::vector<Merged> pairs;  // of a node and its next
    std::vector<uint64_t> heap;            // priority << 32 | position
};

SentencePieceEncoder::SentencePieceEncoder(const std::vector<std::pair<std::string, uint32_t>>& pieces,
                                           const std::vector<std::pair<uint32_t, uint32_t>>& merges,
                                           const Options& options)
    : options_(options) {
    const Vocabulary vocabulary(pieces);
    if (merges.size() >= UINT32_MAX) throw std::invalid_argument("there are too many merges");
    std::vector<Merge> list;
    list.reserve(merges.size());
    std::string joined;
    for (const auto& [left, right] : merges) {
        const auto number = static_cast<uint32_t>(list.size());
        if (!vocabulary.has(left) || !vocabulary.has(right)) {
            throw std::invalid_argument("merge " + std::to_string(number) + " is of an id without a piece");
        }
        joined.assign(vocabulary.bytes(left)).append(vocabulary.bytes(right));
        const uint32_t result = vocabulary.find(joined);
        if (result == kNone) {
            throw std::invalid_argument("merge " + std::to_string(number) + " makes something that is no piece");
        }
        list.push_back({left, right, number, result});
    }
    build(vocabulary, list);
}

SentencePieceEncoder::SentencePieceEncoder(const std::vector<std::pair<std::string, uint32_t>>& pieces,
                                           const std::vector<float>& scores, const Options& options)
    : options_(options) {
    const Vocabulary vocabulary(pieces);
    if (scores.size() != pieces.size()) throw std::invalid_argument("there is not one score for each piece");
    std::vector<float> distinct(scores);
    for (const float score : scores) {
        if (score != score) throw std::invalid_argument("a score is not a number");
    }
    std::sort(distinct.begin(), distinct.end(), std::greater<>());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    std::vector<Merge> list;
    for (size_t i = 0; i < pieces.size(); ++i) {
        const auto& [piece, id] = pieces[i];
        const auto place = std::lower_bound(distinct.begin(), distinct.end(), scores[i], std::greater<>());
        const auto priority = static_cast<uint32_t>(place - distinct.begin());
        const std::string_view whole = piece;
        for (size_t cut = char_at(whole, 0).size; cut < whole.size(); cut += char_at(whole, cut).size) {
            const uint32_t left = vocabulary.find(whole.substr(0, cut));
            if (left == kNone) continue;
            const uint32_t right = vocabulary.find(whole.substr(cut));
            if (right != kNone) list.push_back({left, right, priority, id});
        }
    }
    build(vocabulary, list);
}

SentencePieceEncoder::~SentencePieceEncoder() = default;

void SentencePieceEncoder::build(const Vocabulary& vocabulary, const std::vector<Merge>& merges) {
    num_ids_ = vocabulary.num_ids();
    bmp_.assign(0x10000, kNone);
    std::vector<uint32_t> ids;
    for (uint32_t id = 0; id < num_ids_; ++id) {
        if (!vocabulary.has(id)) continue;
        const std::string_view piece = vocabulary.bytes(id);
        const Char c = char_at(piece, 0);
        if (c.size == piece.size()) (c.code < 0x10000 ? bmp_[c.code] : astral_[c.code]) = id;
    }
    if (options_.space_is_meta) bmp_[' '] = bmp_[kMeta];
    fill(merges);

    std::vector<Merge> by_result(merges);
    std::sort(by_result.begin(), by_result.end(), [](const Merge& a, const Merge& b) { return a.result < b.result; });
    State state;
    IdBuffer made;
    std::vector<Merge> used;
    size_t num_joins = 0;
    for (size_t i = 0; i < by_result.size(); ++i) {
        if (i && by_result[i].result == by_result[i - 1].result) continue;
        const uint32_t result = by_result[i].result;
        const std::string_view piece = vocabulary.bytes(result);
        bool is_reachable = true;
        for (size_t at = 0; at < piece.size() && is_reachable;) {
            const Char c = char_at(piece, at);
            is_reachable = symbol(c.code) != kNone;
            at += c.size;
        }
        if (!is_reachable) continue;
        made.truncate(0);
        uint64_t last_pair = 0;
        merge(piece, state, made, &last_pair);
        if (made.size() != 1 || made.data()[0] != result) continue;
        const auto left = static_cast<uint32_t>(last_pair >> 32);
        const auto right = static_cast<uint32_t>(last_pair);
        used.push_back({left, right, priority_of(merges_.find(left, right)), result});
        num_joins += piece.size();
    }
    fill(used);
    joins_.assign(std::bit_ceil(std::max<size_t>(num_joins, 64)) / 16 + 1, 0);
    joins_.resize(std::bit_ceil(joins_.size()));
    join_mask_ = joins_.size() * 64 - 1;
    for (const Merge& merge : used) {
        const std::string_view piece = vocabulary.bytes(merge.result);
        uint32_t previous = 0;
        for (size_t at = 0; at < piece.size();) {
            const Char c = char_at(piece, at);
            if (at) {
                allow_join(previous, c.code);
                if (options_.space_is_meta) {
                    if (previous == kMeta) allow_join(' ', c.code);
                    if (c.code == kMeta) allow_join(previous, ' ');
                    if (previous == kMeta && c.code == kMeta) allow_join(' ', ' ');
                }
            }
            previous = c.code;
            at += c.size;
        }
    }
}

std::vector<std::tuple<uint32_t, uint32_t, uint32_t>> SentencePieceEncoder::reachable_merges() const {
    std::vector<std::pair<Merged, uint64_t>> order;
    merges_.for_each([&](uint32_t left, uint32_t right, Merged merged) {
        order.emplace_back(merged, pair_of(left, right));
    });
    std::sort(order.begin(), order.end());
    std::vector<std::tuple<uint32_t, uint32_t, uint32_t>> list;
    list.reserve(order.size());
    for (const auto& [merged, pair] : order) {
        list.emplace_back(static_cast<uint32_t>(pair >> 32), static_cast<uint32_t>(pair), priority_of(merged));
    }
    return list;
}

void SentencePieceEncoder::fill(const std::vector<Merge>& merges) {
    merges_.reset(merges.size());
    for (const Merge& merge : merges) {
        merges_.add(merge.left, merge.right, static_cast<Merged>(merge.priority) << 32 | merge.result);
    }
}

inline uint32_t SentencePieceEncoder::symbol(uint32_t code) const {
    if (code < 0x10000) return bmp_[code];
    const auto found = astral_.find(code);
    return found == astral_.end() ? kNone : found->second;
}

inline bool SentencePieceEncoder::may_join(uint32_t left_code, uint32_t right_code) const {
    if ((left_code | right_code) < 128) return ascii_joins_[left_code][right_code >> 6] >> (right_code & 63) & 1;
    const uint64_t bit = mix(static_cast<uint64_t>(left_code) << 32 | right_code, 0x9e3779b97f4a7c15u) & join_mask_;
    return joins_[bit >> 6] >> (bit & 63) & 1;
}

void SentencePieceEncoder::allow_join(uint32_t left_code, uint32_t right_code) {
    if ((left_code | right_code) < 128) {
        ascii_joins_[left_code][right_code >> 6] |= uint64_t{1} << (right_code & 63);
        return;
    }
    const uint64_t bit = mix(static_cast<uint64_t>(left_code) << 32 | right_code, 0x9e3779b97f4a7c15u) & join_mask_;
    joins_[bit >> 6] |= uint64_t{1} << (bit & 63);
}

std::unique_ptr<SentencePieceEncoder::State> SentencePieceEncoder::borrow() const {
    {
        const std::lock_guard lock(mutex_);
        if (!idle_states_.empty()) {
            auto state = std::move(idle_states_.back());
            idle_states_.pop_back();
            return state;
        }
    }
    return std::make_unique<State>();
}

void SentencePieceEncoder::give_back(std::unique_ptr<State> state) const {
    if (state->nodes.capacity() > kKeptNodes) {
        state->nodes = {};
        state->pairs = {};
        state->heap = {};
    }
    if (state->symbols.capacity() > kKeptNodes) state->symbols = {};
    const std::lock_guard lock(mutex_);
    idle_states_.push_back(std::move(state));
}

bool SentencePieceEncoder::is_meta(uint32_t code) const {
    return code == kMeta || (options_.space_is_meta && code == ' ');
}

void SentencePieceEncoder::encode(std::string_view text, IdBuffer& ids) const {
    auto state = borrow();  // an exception drops it
    bool after_unknown = false;
    for (size_t begin = 0; begin < text.size();) {
        const Char first = char_at(text, begin);
        uint32_t code = first.code;
        const uint32_t id = symbol(code);
        size_t end = begin + first.size;
        if (id != kNone) {
            while (end < text.size()) {
                const Char next = char_at(text, end);
                if (!may_join(code, next.code) || symbol(next.code) == kNone) break;
                if (options_.split_at_meta && is_meta(next.code)) break;
                code = next.code;
                end += next.size;
            }
        }
        const std::string_view piece = text.substr(begin, end - begin);
        if (piece.size() == first.size) {
            push_character(piece, id, after_unknown, ids);
        } else {
            encode_piece(piece, *state, ids);
            after_unknown = false;
        }
        begin = end;
    }
    give_back(std::move(state));
}

void SentencePieceEncoder::push_character(std::string_view character, uint32_t id, bool& after_unknown,
                                          IdBuffer& ids) const {
    if (id != kNone) {
        after_unknown = false;
        return ids.push(id);
    }
    if (options_.space_is_meta && character == " ") character = "\u2581";
    const auto byte_id = [this](char c) { return options_.byte_ids[static_cast<uint8_t>(c)]; };
    if (std::all_of(character.begin(), character.end(), [&](char c) { return byte_id(c) != kNone; })) {
        for (const char c : character) ids.push(byte_id(c));
        after_unknown = false;
        return;
    }
    if (!(after_unknown && options_.fuse_unknown)) ids.push(options_.unknown);
    after_unknown = true;
}

void SentencePieceEncoder::encode_piece(std::string_view piece, State& state, IdBuffer& ids) const {
    using Entry = State::Entry;
    if (piece.size() > Entry::kMaxBytes) return merge(piece, state, ids, nullptr);
    char padded[Entry::kMaxBytes] = {};
    std::memcpy(padded, piece.data(), piece.size());
    const uint64_t words[4] = {load8(padded), load8(padded + 8), load8(padded + 16), load8(padded + 24)};
    const uint64_t hash = mix(words[0] ^ 0xa0761d6478bd642fu, words[1] ^ 0xe7037ed1a0b428dbu ^ piece.size()) ^
                          mix(words[2] ^ 0x8ebc6af09c88c6e3u, words[3] ^ 0x589965cc75374cc3u);
    Entry& entry = state.cache[hash & (kCacheEntries - 1)];
    ids.reserve(Entry::kMaxIds);
    if (entry.size == piece.size() && !std::memcmp(entry.words, words, sizeof(words))) {
        std::memcpy(ids.end(), entry.ids, sizeof(entry.ids));
        ids.advance(entry.num_ids);
        return;
    }
    const size_t before = ids.size();
    merge(piece, state, ids, nullptr);
    const size_t count = ids.size() - before;
    if (count > Entry::kMaxIds) return;
    std::memcpy(entry.words, words, sizeof(words));
    entry.size = static_cast<uint8_t>(piece.size());
    entry.num_ids = static_cast<uint8_t>(count);
    std::memcpy(entry.ids, ids.data() + before, count * sizeof(uint32_t));
}

// Every character of `piece` has a symbol.
void SentencePieceEncoder::merge(std::string_view piece, State& state, IdBuffer& ids, uint64_t* last_pair) const {
    auto& symbols = state.symbols;
    symbols.clear();
    for (size_t at = 0; at < piece.size();) {
        const Char c = char_at(piece, at);
        symbols.push_back(symbol(c.code));
        at += c.size;
    }
    size_t count = symbols.size();
    if (count > kShortPiece) return merge_long(state, ids, last_pair);

    uint32_t* id = symbols.data();
    Merged pairs[kShortPiece];  // of id[i] and id[i + 1]
    for (size_t i = 0; i + 1 < count; ++i) pairs[i] = merges_.find(id[i], id[i + 1]);
    while (count > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < count; ++i) best = priority_of(pairs[i]) < priority_of(pairs[best]) ? i : best;
        if (pairs[best] == kNoMerge) break;
        if (last_pair) *last_pair = pair_of(id[best], id[best + 1]);
        id[best] = result_of(pairs[best]);
        std::memmove(id + best + 1, id + best + 2, (count - best - 2) * sizeof(*id));
        --count;
        if (best + 1 < count) {
            std::memmove(pairs + best + 1, pairs + best + 2, (count - best - 2) * sizeof(*pairs));
            pairs[best] = merges_.find(id[best], id[best + 1]);
        }
        if (best > 0) pairs[best - 1] = merges_.find(id[best - 1], id[best]);
    }
    ids.reserve(count);
    std::memcpy(ids.end(), id, count * sizeof(*id));
    ids.advance(count);
}

// Of state.symbols. A heap entry whose pair has been merged away or changed since is skipped when it comes up.
void SentencePieceEncoder::merge_long(State& state, IdBuffer& ids, uint64_t* last_pair) const {
    if (state.symbols.size() >= kEnd) throw std::length_error("a piece is longer than 4 GiB");
    const auto count = static_cast<uint32_t>(state.symbols.size());
    auto& nodes = state.nodes;
    auto& pairs = state.pairs;
    auto& heap = state.heap;
    nodes.resize(count);
    pairs.assign(count, kNoMerge);
    heap.clear();
    const auto entry = [&](uint32_t at) { return static_cast<uint64_t>(priority_of(pairs[at])) << 32 | at; };
    for (uint32_t i = 0; i < count; ++i) {
        nodes[i] = {state.symbols[i], i ? i - 1 : kEnd, i + 1 < count ? i + 1 : kEnd};
        if (i + 1 < count) pairs[i] = merges_.find(state.symbols[i], state.symbols[i + 1]);
        if (pairs[i] != kNoMerge) heap.push_back(entry(i));
    }
    std::make_heap(heap.begin(), heap.end(), std::greater<>());
    const auto refresh = [&](uint32_t at) {
        const uint32_t next = nodes[at].next;
        pairs[at] = next == kEnd ? kNoMerge : merges_.find(nodes[at].id, nodes[next].id);
        if (pairs[at] == kNoMerge) return;
        heap.push_back(entry(at));
        std::push_heap(heap.begin(), heap.end(), std::greater<>());
    };
    while (!heap.empty()) {
        std::pop_heap(heap.begin(), heap.end(), std::greater<>());
        const uint64_t top = heap.back();
        heap.pop_back();
        const auto at = static_cast<uint32_t>(top);
        if (pairs[at] == kNoMerge || entry(at) != top) continue;
        const uint32_t right = nodes[at].next;
        const uint32_t after = nodes[right].next;
        if (last_pair) *last_pair = pair_of(nodes[at].id, nodes[right].id);
        nodes[at].id = result_of(pairs[at]);
        nodes[at].next = after;
        if (after != kEnd) nodes[after].previous = at;
        pairs[right] = kNoMerge;
        refresh(at);
        if (nodes[at].previous != kEnd) refresh(nodes[at].previous);
    }
    ids.reserve(count);
    for (uint32_t i = 0; i != kEnd; i = nodes[i].next) ids.push(nodes[i].id);
}

}  // namespace fastlm::tokenizer
