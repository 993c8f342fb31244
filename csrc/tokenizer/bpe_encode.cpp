#include "tokenizer/bpe_encode.hpp"

#include <cstring>
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

void BpeEncoder::encode(Pattern pattern, std::string_view text, IdBuffer& ids) const {
    static const Scanner scanner = scanner_from_name("");
    using Key = PieceCache::Key;
    StateLease lease(*this);
    EncodeState& state = *lease;
    PieceCache& cache = state.cache;
    const ScanEnds scan = scan_ends(pattern, scanner);
    const auto* p = reinterpret_cast<const uint8_t*>(text.data());
    const uint8_t* end = p + text.size();
    const uint8_t* ends[kEndsCapacity];
    Key keys[kMostEnds];
    PieceCache::Entry* homes[kMostEnds];
    while (p < end) {
        const size_t count = scan(p, end, ends);
        const uint8_t* begin = p;
        for (size_t i = 0; i < count; begin = ends[i++]) {
            const auto size = static_cast<size_t>(ends[i] - begin);
            const char* bytes = reinterpret_cast<const char*>(begin);
            if (size > PieceCache::kMaxBytes) {
                keys[i] = PieceCache::kUncached;
            } else if (static_cast<size_t>(end - begin) >= sizeof(Key)) {
                keys[i] = PieceCache::key_of(bytes, size);
            } else {
                keys[i] = PieceCache::key_of_last(bytes, size);
            }
            homes[i] = &cache.home(keys[i]);
            __builtin_prefetch(homes[i]);
        }
        ids.reserve(count * PieceCache::kMaxIds);
        uint32_t* out = ids.end();
        for (size_t i = 0; i < count; p = ends[i++]) {
            PieceCache::Entry* entry = homes[i];
            if (!(entry->key == keys[i])) [[unlikely]] {
                ids.set_end(out);
                encode_missed({reinterpret_cast<const char*>(p), static_cast<size_t>(ends[i] - p)}, keys[i], *entry, state, ids);
                ids.reserve((count - i) * PieceCache::kMaxIds);
                out = ids.end();
                continue;
            }
            std::memcpy(out, entry->ids, sizeof(entry->ids));
            out += entry->num_ids;
        }
        ids.set_end(out);
        cache.grow_if_full();
    }
    lease.complete();
}

// Of a piece that `home` does not hold.
void BpeEncoder::encode_missed(std::string_view piece, const PieceCache::Key& key, PieceCache::Entry& home,
                               EncodeState& state, IdBuffer& ids) const {
    if (const auto* found = state.cache.find_beside(home, key)) return ids.append(found->ids, found->num_ids);
    const uint64_t hash = piece.size() <= LongPieceCache::kMaxBytes ? hash_bytes(piece.data(), piece.size()) : 0;
    if (hash && state.long_cache.find(piece, hash, ids)) return;
    const size_t before = ids.size();
    encode_uncached(piece, state, ids);
    const size_t count = ids.size() - before;
    if (piece.size() <= PieceCache::kMaxBytes && count <= PieceCache::kMaxIds) {
        state.cache.insert(home, key, ids.data() + before, count);
    } else if (hash) {
        state.long_cache.insert(piece, hash, ids.data() + before, count);
    }
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
