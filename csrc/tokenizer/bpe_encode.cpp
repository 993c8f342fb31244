#include "tokenizer/bpe_encode.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <queue>
#include <stdexcept>

namespace fastlm::tokenizer {

namespace {

constexpr size_t kShortPiece = 128;       // bytes; a scan of so few pairs is faster than keeping queues
constexpr size_t kCacheEntries = 1 << 16;  // 4 MiB at most for each thread that encodes

uint64_t load8(const char* p) {
    uint64_t value;
    std::memcpy(&value, p, 8);
    return value;
}

uint64_t load4(const char* p) {
    uint32_t value;
    std::memcpy(&value, p, 4);
    return value;
}

uint64_t mix(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Up to 16 bytes as two words. With the length they determine the bytes: the two loads overlap and cover them all.
struct TwoWords {
    uint64_t first;
    uint64_t last;
};

TwoWords two_words(const char* p, size_t size) {
    if (size >= 8) return {load8(p), load8(p + size - 8)};
    if (size >= 4) return {load4(p), load4(p + size - 4)};
    const auto byte = [p](size_t i) { return static_cast<uint64_t>(static_cast<uint8_t>(p[i])); };
    return {byte(0) | byte(size / 2) << 8 | byte(size - 1) << 16, 0};
}

uint64_t hash_words(uint64_t a, uint64_t b, size_t size) {
    return mix(a ^ 0xa0761d6478bd642fu, b ^ 0xe7037ed1a0b428dbu ^ size);
}

// `size` is at least 1.
uint64_t hash_bytes(const char* p, size_t size) {
    const TwoWords ends = two_words(p, size);
    uint64_t hash = hash_words(ends.first, ends.last, size);
    for (size_t i = 8; i + 8 < size; i += 8) hash = mix(hash ^ load8(p + i), 0x8ebc6af09c88c6e3u);
    return hash;
}

}  // namespace

void IdBuffer::grow(size_t more) {
    const size_t capacity = std::max(size_ + more, capacity_ * 2);
    std::unique_ptr<uint32_t[]> data(new uint32_t[capacity]);
    if (size_) std::memcpy(data.get(), data_.get(), size_ * sizeof(uint32_t));
    data_ = std::move(data);
    capacity_ = capacity;
}

Vocabulary::Vocabulary(const std::vector<std::pair<std::string, uint32_t>>& tokens) {
    if (tokens.empty()) throw std::invalid_argument("the vocabulary is empty");
    size_t total = 0;
    uint32_t highest = 0;
    for (const auto& [token, id] : tokens) {
        if (token.empty()) throw std::invalid_argument("token " + std::to_string(id) + " is empty");
        if (id > kMaxId) {
            throw std::invalid_argument("id " + std::to_string(id) + " is above the limit of " + std::to_string(kMaxId));
        }
        total += token.size();
        highest = std::max(highest, id);
    }
    if (total >= UINT32_MAX) throw std::invalid_argument("the vocabulary is larger than 4 GiB");
    arena_.reserve(total);
    spans_.resize(highest + 1);
    slots_.assign(std::bit_ceil(tokens.size() * 2), Slot{0, kNone});
    mask_ = slots_.size() - 1;
    for (const auto& [token, id] : tokens) {
        if (has(id)) throw std::invalid_argument("two tokens have the id " + std::to_string(id));
        const uint64_t hash = hash_bytes(token.data(), token.size());
        size_t i = hash & mask_;
        for (; slots_[i].id != kNone; i = (i + 1) & mask_) {
            if (bytes(slots_[i].id) == token) {
                throw std::invalid_argument("the tokens with ids " + std::to_string(slots_[i].id) + " and " +
                                            std::to_string(id) + " are the same bytes");
            }
        }
        slots_[i] = {static_cast<uint32_t>(hash >> 32), id};
        spans_[id] = {static_cast<uint32_t>(arena_.size()), static_cast<uint32_t>(token.size())};
        arena_ += token;
    }
}

uint32_t Vocabulary::find(std::string_view token) const {
    const uint64_t hash = hash_bytes(token.data(), token.size());
    const uint32_t tag = static_cast<uint32_t>(hash >> 32);
    for (size_t i = hash & mask_; slots_[i].id != kNone; i = (i + 1) & mask_) {
        if (slots_[i].tag == tag && bytes(slots_[i].id) == token) return slots_[i].id;
    }
    return kNone;
}

void MergeTable::build(const std::vector<std::pair<uint64_t, Merge>>& merges) {
    const size_t size = std::bit_ceil(std::max<size_t>(merges.size() * 2, 16));
    slots_.assign(size, Slot{});
    mask_ = size - 1;
    shift_ = 64 - std::countr_zero(size);
    const size_t num_bits = std::bit_ceil(std::max<size_t>(merges.size() * 8, 64));
    bitmap_.assign(num_bits / 64, 0);
    bit_mask_ = num_bits - 1;
    for (const auto& [key, merge] : merges) {
        const uint64_t hash = hash_of(key);
        bitmap_[(hash & bit_mask_) >> 6] |= uint64_t{1} << (hash & 63);
        size_t i = hash >> shift_;
        while (slots_[i].key != kEmpty && slots_[i].key != key) i = (i + 1) & mask_;
        if (slots_[i].key == key) throw std::invalid_argument("a merge is there twice");
        slots_[i] = {key, merge};
    }
}

struct EncodeState {
    // A pre-token of at most 32 bytes and its ids. The four words are loads at 0, 8, size-16, size-8 (one of at most
    // 16 bytes has the first and last alone), which with the size determine the bytes.
    struct alignas(64) CacheEntry {
        static constexpr size_t kMaxBytes = 32;
        static constexpr size_t kMaxIds = 7;
        uint64_t words[4];
        uint8_t size;
        uint8_t num_ids;
        uint32_t ids[kMaxIds];
    };

    // Positions whose pair has one priority, worked off from the left.
    struct Queue {
        uint32_t priority = 0;
        size_t next = 0;
        bool is_sorted = true;
        std::vector<uint32_t> positions;
    };
    struct Node {
        uint32_t id;
        uint32_t previous;
        uint32_t next;
    };
    static constexpr uint32_t kNoQueue = UINT32_MAX;

    EncodeState() {
        void* start = cache_memory.get();
        size_t space = (kCacheEntries + 1) * sizeof(CacheEntry);
        if (!start) throw std::bad_alloc();
        cache = static_cast<CacheEntry*>(std::align(alignof(CacheEntry), kCacheEntries * sizeof(CacheEntry), start, space));
    }

    // Zeroed by the system, page by page as they are used: an empty entry has size 0, as no pre-token has.
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<void, Free> cache_memory{std::calloc(kCacheEntries + 1, sizeof(CacheEntry))};
    CacheEntry* cache = nullptr;  // aligned, inside cache_memory
    std::vector<Node> nodes;
    std::vector<MergeTable::Merge> pairs;  // of a node and its next
    std::vector<Queue> queues;
    std::vector<uint32_t> free_queues;
    std::vector<uint32_t> queue_of_priority;
    std::priority_queue<uint32_t, std::vector<uint32_t>, std::greater<>> priorities;

    void push(uint32_t position, MergeTable::Merge merge) {
        const uint32_t priority = MergeTable::priority(merge);
        uint32_t& index = queue_of_priority[priority];
        if (index == kNoQueue) {
            if (free_queues.empty()) {
                free_queues.push_back(static_cast<uint32_t>(queues.size()));
                queues.emplace_back();
            }
            index = free_queues.back();
            free_queues.pop_back();
            queues[index].priority = priority;
            priorities.push(priority);
        }
        Queue& queue = queues[index];
        if (queue.positions.size() > queue.next && queue.positions.back() > position) queue.is_sorted = false;
        queue.positions.push_back(position);
    }

    void retire(uint32_t priority) {
        Queue& queue = queues[queue_of_priority[priority]];
        queue.positions.clear();
        queue.next = 0;
        queue.is_sorted = true;
        free_queues.push_back(queue_of_priority[priority]);
        queue_of_priority[priority] = kNoQueue;
    }
};

// Borrows an idle state, or makes one, for the time of one call.
class BpeEncoder::StateLease {
public:
    explicit StateLease(const BpeEncoder& encoder) : encoder_(encoder) {
        {
            const std::lock_guard lock(encoder_.mutex_);
            if (!encoder_.idle_states_.empty()) {
                state_ = std::move(encoder_.idle_states_.back());
                encoder_.idle_states_.pop_back();
            }
        }
        if (!state_) state_ = std::make_unique<EncodeState>();
    }
    ~StateLease() {
        if (!completed_) return;  // an exception may have left queues behind
        const std::lock_guard lock(encoder_.mutex_);
        encoder_.idle_states_.push_back(std::move(state_));
    }
    EncodeState& operator*() { return *state_; }
    void complete() {
        // Room for long pieces is not kept: a piece of megabytes is rare.
        if (state_->nodes.capacity() > (1 << 16)) {
            state_->nodes = {};
            state_->pairs = {};
            state_->queues = {};
            state_->free_queues = {};
        }
        completed_ = true;
    }

private:
    const BpeEncoder& encoder_;
    std::unique_ptr<EncodeState> state_;
    bool completed_ = false;
};

BpeEncoder::BpeEncoder(const std::vector<std::pair<std::string, uint32_t>>& tokens,
                       const std::optional<std::vector<std::pair<uint32_t, uint32_t>>>& merges)
    : vocabulary_(tokens), whole_tokens_first_(!merges) {
    for (size_t byte = 0; byte < 256; ++byte) {
        const char c = static_cast<char>(byte);
        byte_ids_[byte] = vocabulary_.find({&c, 1});
        if (byte_ids_[byte] == Vocabulary::kNone) {
            throw std::invalid_argument("byte " + std::to_string(byte) +
                                        " has no token; a byte-level vocabulary holds all 256");
        }
    }
    if (merges) {
        use_merges(*merges);
    } else {
        use_ranks(tokens);
    }
}

BpeEncoder::~BpeEncoder() = default;

void BpeEncoder::use_ranks(const std::vector<std::pair<std::string, uint32_t>>& tokens) {
    std::vector<std::pair<uint64_t, MergeTable::Merge>> pairs;
    pairs.reserve(tokens.size() * 3);
    for (const auto& [token, id] : tokens) {
        if (token.size() > kMaxRankedTokenBytes) {
            throw std::invalid_argument("token " + std::to_string(id) + " is longer than " +
                                        std::to_string(kMaxRankedTokenBytes) + " bytes");
        }
        const std::string_view whole = token;
        for (size_t cut = 1; cut < whole.size(); ++cut) {
            const uint32_t left = vocabulary_.find(whole.substr(0, cut));
            if (left == Vocabulary::kNone) continue;
            const uint32_t right = vocabulary_.find(whole.substr(cut));
            if (right == Vocabulary::kNone) continue;
            pairs.emplace_back(MergeTable::key(left, right), MergeTable::pack(id, id));
        }
    }
    num_priorities_ = static_cast<uint32_t>(vocabulary_.num_ids());
    build_merges(pairs);

    // Of all ways to split a token, merging uses one: until a token is made, what happens inside it is what happens
    // when it is encoded alone, since the lowest pair of the text is also the lowest there. The others are never the
    // lowest pair, so leaving them out changes nothing but the size of the table.
    EncodeState state;
    IdBuffer ids;
    pairs.clear();
    for (const auto& [token, id] : tokens) {
        if (token.size() == 1) continue;
        const size_t before = ids.size();
        uint64_t last_pair = 0;
        if (token.size() <= kShortPiece) {
            merge_short(token, ids, &last_pair);
        } else {
            merge_long(token, state, ids, &last_pair);
        }
        if (ids.size() - before == 1) pairs.emplace_back(last_pair, MergeTable::pack(id, id));
        ids.truncate(before);
    }
    build_merges(pairs);
}

void BpeEncoder::build_merges(const std::vector<std::pair<uint64_t, MergeTable::Merge>>& merges) {
    merges_.build(merges);
    byte_pairs_.resize(65536);
    for (size_t i = 0; i < byte_pairs_.size(); ++i) {
        byte_pairs_[i] = merges_.find(byte_ids_[i >> 8], byte_ids_[i & 255]);
    }
}

void BpeEncoder::use_merges(const std::vector<std::pair<uint32_t, uint32_t>>& merges) {
    if (merges.size() > kMaxId) throw std::invalid_argument("there are more than " + std::to_string(kMaxId) + " merges");
    std::vector<std::pair<uint64_t, MergeTable::Merge>> pairs;
    pairs.reserve(merges.size());
    std::string joined;
    for (const auto& [left, right] : merges) {
        const auto number = static_cast<uint32_t>(pairs.size());
        if (!vocabulary_.has(left) || !vocabulary_.has(right)) {
            throw std::invalid_argument("merge " + std::to_string(number) + " is of an id without a token");
        }
        joined.assign(vocabulary_.bytes(left)).append(vocabulary_.bytes(right));
        const uint32_t result = vocabulary_.find(joined);
        if (result == Vocabulary::kNone) {
            throw std::invalid_argument("merge " + std::to_string(number) + " makes something that is no token");
        }
        pairs.emplace_back(MergeTable::key(left, right), MergeTable::pack(number, result));
    }
    build_merges(pairs);
    num_priorities_ = static_cast<uint32_t>(merges.size());
}

void BpeEncoder::encode(Pattern pattern, std::string_view text, IdBuffer& ids) const {
    StateLease state(*this);
    split(pattern, scanner_from_name(""), text.data(), text.size(),
          [&](const char* begin, size_t size) { encode_cached({begin, size}, *state, ids); });
    state.complete();
}

void BpeEncoder::encode_piece(std::string_view piece, IdBuffer& ids) const {
    if (piece.empty()) return;
    StateLease state(*this);
    encode_uncached(piece, *state, ids);
    state.complete();
}

void BpeEncoder::encode_cached(std::string_view piece, EncodeState& state, IdBuffer& ids) const {
    using Entry = EncodeState::CacheEntry;
    const char* p = piece.data();
    const size_t size = piece.size();
    if (size > Entry::kMaxBytes) return encode_uncached(piece, state, ids);

    const TwoWords ends = two_words(p, size);
    uint64_t hash = hash_words(ends.first, ends.last, size);
    uint64_t second = 0, third = 0;
    if (size > 16) {
        second = load8(p + 8);
        third = load8(p + size - 16);
        hash ^= hash_words(second, third, size);
    }
    Entry& entry = state.cache[hash & (kCacheEntries - 1)];
    ids.reserve(std::max(size, Entry::kMaxIds));
    if (entry.size == size && entry.words[0] == ends.first && entry.words[1] == ends.last && entry.words[2] == second &&
        entry.words[3] == third) {
        std::memcpy(ids.end(), entry.ids, sizeof(entry.ids));
        ids.advance(entry.num_ids);
        return;
    }
    const size_t before = ids.size();
    encode_uncached(piece, state, ids);
    const size_t count = ids.size() - before;
    if (count > Entry::kMaxIds) return;
    entry = Entry{{ends.first, ends.last, second, third}, static_cast<uint8_t>(size), static_cast<uint8_t>(count), {}};
    std::memcpy(entry.ids, ids.data() + before, count * sizeof(uint32_t));
}

void BpeEncoder::encode_uncached(std::string_view piece, EncodeState& state, IdBuffer& ids) const {
    if (piece.size() == 1) return ids.push(byte_ids_[static_cast<uint8_t>(piece[0])]);
    if (whole_tokens_first_) {
        const uint32_t id = vocabulary_.find(piece);
        if (id != Vocabulary::kNone) return ids.push(id);
    }
    if (piece.size() <= kShortPiece) {
        merge_short(piece, ids, nullptr);
    } else {
        merge_long(piece, state, ids, nullptr);
    }
}

void BpeEncoder::merge_short(std::string_view piece, IdBuffer& ids, uint64_t* last_pair) const {
    const auto* bytes = reinterpret_cast<const uint8_t*>(piece.data());
    size_t count = piece.size();
    ids.reserve(count);
    uint32_t* id = ids.end();
    MergeTable::Merge pairs[kShortPiece];  // of id[i] and id[i + 1]
    for (size_t i = 0; i < count; ++i) id[i] = byte_ids_[bytes[i]];
    for (size_t i = 0; i + 1 < count; ++i) pairs[i] = byte_pairs_[bytes[i] << 8 | bytes[i + 1]];

    while (count > 1) {
        const size_t num_pairs = count - 1;
        size_t best = 0;
        for (size_t i = 1; i < num_pairs; ++i) best = pairs[i] < pairs[best] ? i : best;
        if (pairs[best] == MergeTable::kNone) break;
        if (last_pair) *last_pair = MergeTable::key(id[best], id[best + 1]);
        id[best] = MergeTable::result(pairs[best]);
        std::memmove(id + best + 1, id + best + 2, (count - best - 2) * sizeof(*id));
        --count;
        if (best + 1 < count) {
            std::memmove(pairs + best + 1, pairs + best + 2, (count - best - 2) * sizeof(*pairs));
            pairs[best] = merges_.find(id[best], id[best + 1]);
        }
        if (best > 0) pairs[best - 1] = merges_.find(id[best - 1], id[best]);
    }
    ids.advance(count);
}

void BpeEncoder::merge_long(std::string_view piece, EncodeState& state, IdBuffer& ids, uint64_t* last_pair) const {
    if (piece.size() >= UINT32_MAX) throw std::length_error("a pre-token is longer than 4 GiB");
    const auto* bytes = reinterpret_cast<const uint8_t*>(piece.data());
    const auto count = static_cast<uint32_t>(piece.size());
    constexpr uint32_t none = UINT32_MAX;
    auto& nodes = state.nodes;
    auto& pairs = state.pairs;
    nodes.resize(count);
    pairs.resize(count);
    state.queue_of_priority.resize(num_priorities_, EncodeState::kNoQueue);
    for (uint32_t i = 0; i < count; ++i) {
        nodes[i] = {byte_ids_[bytes[i]], i ? i - 1 : none, i + 1 < count ? i + 1 : none};
        pairs[i] = i + 1 < count ? byte_pairs_[bytes[i] << 8 | bytes[i + 1]] : MergeTable::kNone;
        if (pairs[i] != MergeTable::kNone) state.push(i, pairs[i]);
    }

    const auto refresh = [&](uint32_t position) {
        const uint32_t next = nodes[position].next;
        pairs[position] = next == none ? MergeTable::kNone : merges_.find(nodes[position].id, nodes[next].id);
        if (pairs[position] != MergeTable::kNone) state.push(position, pairs[position]);
    };
    while (!state.priorities.empty()) {
        const uint32_t priority = state.priorities.top();
        const uint32_t index = state.queue_of_priority[priority];
        if (EncodeState::Queue& queue = state.queues[index]; !queue.is_sorted) {
            std::sort(queue.positions.begin() + static_cast<std::ptrdiff_t>(queue.next), queue.positions.end());
            queue.is_sorted = true;
        }
        // A merge may make a pair of lower priority, which is then done first; this queue goes on afterwards.
        while (state.priorities.top() == priority && state.queues[index].is_sorted) {
            EncodeState::Queue& queue = state.queues[index];
            if (queue.next == queue.positions.size()) {
                state.priorities.pop();
                state.retire(priority);
                break;
            }
            const uint32_t position = queue.positions[queue.next++];
            // The pair that was queued may have been merged away or changed since.
            if (pairs[position] == MergeTable::kNone || MergeTable::priority(pairs[position]) != priority) continue;
            const uint32_t right = nodes[position].next;
            const uint32_t after = nodes[right].next;
            if (last_pair) *last_pair = MergeTable::key(nodes[position].id, nodes[right].id);
            nodes[position].id = MergeTable::result(pairs[position]);
            nodes[position].next = after;
            if (after != none) nodes[after].previous = position;
            pairs[right] = MergeTable::kNone;
            refresh(position);
            if (nodes[position].previous != none) refresh(nodes[position].previous);
        }
    }
    ids.reserve(count);
    for (uint32_t i = 0; i != none; i = nodes[i].next) ids.push(nodes[i].id);
}

}  // namespace fastlm::tokenizer
