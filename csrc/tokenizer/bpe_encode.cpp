#include "tokenizer/bpe_encode.hpp"

#include <stdexcept>
#include <string>

#include "tokenizer/long_piece_cache.hpp"
#include "tokenizer/merge_piece.hpp"

namespace fastlm::tokenizer {

struct EncodeState {
    PieceCache cache;
    LongPieceCache long_cache;
    MergeScratch merging;
    BacktrackScratch backtracking;
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
        state_->merging.shrink();
        state_->backtracking.shrink();
        completed_ = true;
    }

private:
    const BpeEncoder& encoder_;
    std::unique_ptr<EncodeState> state_;
    bool completed_ = false;
};

BpeEncoder::BpeEncoder(const std::vector<std::pair<std::string, uint32_t>>& tokens,
                       const std::optional<std::vector<std::pair<uint32_t, uint32_t>>>& merges)
    : vocabulary_(tokens),
      whole_tokens_first_(!merges),
      rules_(merges ? MergeRules(vocabulary_, *merges) : MergeRules(vocabulary_)),
      backtracker_(vocabulary_, rules_) {
    for (unsigned byte = 0; byte < 256; ++byte) {
        lacks_byte_[byte] = rules_.byte_id(static_cast<uint8_t>(byte)) == Vocabulary::kNone;
        lacks_bytes_ |= lacks_byte_[byte];
    }
}

BpeEncoder::~BpeEncoder() = default;

namespace {

// Pre-tokens that were found together, and where the cache may hold each.
struct Batch {
    size_t count;
    const uint8_t* ends[kEndsCapacity];
    PieceCache::Key keys[kMostEnds];
    PieceCache::Entry* homes[kMostEnds];
};

// Out of line, so that the loop over short pieces keeps its registers.
[[gnu::noinline]] PieceCache::Key long_key(const LongPieceCache& cache, std::string_view piece) {
    if (piece.size() > LongPieceCache::kMaxBytes) return PieceCache::long_key(0);
    const PieceCache::Key key = PieceCache::long_key(hash_bytes(piece.data(), piece.size()));
    cache.prefetch(key.words[0]);
    return key;
}

// Makes the keys of a batch that begins at `begin`, and fetches their homes. `end` is that of the text.
void fetch_homes(const EncodeState& state, const uint8_t* begin, const uint8_t* end, Batch& batch) {
    const PieceCache::Table table = state.cache.table();
    const size_t count = batch.count;
    for (size_t i = 0; i < count; ++i) {
        const uint8_t* piece_end = batch.ends[i];
        const auto size = static_cast<size_t>(piece_end - begin);
        PieceCache::Key key;
        if (size <= PieceCache::kMaxBytes) [[likely]] {
            key = PieceCache::key_of(begin, size, end);
        } else {
            key = long_key(state.long_cache, {reinterpret_cast<const char*>(begin), size});
        }
        batch.keys[i] = key;
        batch.homes[i] = table.home(key);
        __builtin_prefetch(batch.homes[i]);
        begin = piece_end;
    }
}

// Writes the ids of the pre-tokens from `i` on to `out`, up to the first that is not at home, whose number it returns.
size_t copy_ids(const Batch& batch, size_t i, uint32_t*& out) {
    uint32_t* next = out;
    const size_t count = batch.count;
    for (; i < count; ++i) {
        const PieceCache::Entry& home = *batch.homes[i];
        if (!home.holds(batch.keys[i])) [[unlikely]] break;
        next += PieceCache::copy_ids(home, next);
    }
    out = next;
    return i;
}

}  // namespace

void BpeEncoder::encode(Pattern pattern, std::string_view text, IdBuffer& ids) const {
    static const Scanner scanner = scanner_from_name("");
    StateLease lease(*this);
    EncodeState& state = *lease;
    const ScanEnds scan = scan_ends(pattern, scanner);
    const auto* p = reinterpret_cast<const uint8_t*>(text.data());
    const uint8_t* end = p + text.size();
    Batch batch;
    while (p < end) {
        batch.count = scan(p, end, batch.ends);
        fetch_homes(state, p, end, batch);
        for (size_t i = 0;;) {
            ids.reserve((batch.count - i) * PieceCache::kMaxIds);
            uint32_t* out = ids.end();
            i = copy_ids(batch, i, out);
            ids.set_end(out);
            if (i == batch.count) break;
            const uint8_t* begin = i ? batch.ends[i - 1] : p;
            const auto size = static_cast<size_t>(batch.ends[i] - begin);
            encode_missed({reinterpret_cast<const char*>(begin), size}, batch.keys[i], *batch.homes[i], state, ids);
            ++i;
        }
        p = batch.ends[batch.count - 1];
        state.cache.grow_if_full();
    }
    lease.complete();
}

// Of a piece that `home` does not hold.
void BpeEncoder::encode_missed(std::string_view piece, const PieceCache::Key& key, PieceCache::Entry& home,
                               EncodeState& state, IdBuffer& ids) const {
    if (const auto* found = PieceCache::find_beside(home, key)) return ids.append(found->ids, found->num_ids());
    const bool is_short = piece.size() <= PieceCache::kMaxBytes;
    const bool is_kept = piece.size() <= LongPieceCache::kMaxBytes;
    const uint64_t hash = is_short ? hash_bytes(piece.data(), piece.size()) : key.words[0];
    const size_t before = ids.size();
    const bool is_known = is_kept && state.long_cache.find(piece, hash, ids);
    if (!is_known) encode_uncached(piece, state, ids);
    const uint32_t* its_ids = ids.data() + before;
    const size_t count = ids.size() - before;
    if (is_short && count <= PieceCache::kMaxIds && state.cache.insert(home, key, its_ids, count)) return;
    if (is_kept && !is_known) state.long_cache.insert(piece, hash, its_ids, count);
}

void BpeEncoder::encode_piece(std::string_view piece, IdBuffer& ids) const {
    if (piece.empty()) return;
    StateLease lease(*this);
    encode_uncached(piece, *lease, ids);
    lease.complete();
}

void BpeEncoder::encode_uncached(std::string_view piece, EncodeState& state, IdBuffer& ids) const {
    if (lacks_bytes_) {
        for (const char c : piece) {
            const auto byte = static_cast<uint8_t>(c);
            if (lacks_byte_[byte]) throw std::invalid_argument("byte " + std::to_string(byte) + " has no token");
        }
    }
    if (piece.size() == 1) return ids.push(rules_.byte_id(static_cast<uint8_t>(piece[0])));
    if (whole_tokens_first_) {
        const uint32_t id = vocabulary_.find(piece);
        if (id != Vocabulary::kNone) return ids.push(id);
    }
    if (backtracker_.applies() && backtracker_.encode(piece, state.backtracking, ids)) return;
    merge_piece(rules_, piece, state.merging, ids);
}

}  // namespace fastlm::tokenizer
