#include "tokenizer/backtracker.hpp"

#include <utility>

#include "tokenizer/merge_piece.hpp"
#include "tokenizer/merge_runs.hpp"

namespace fastlm::tokenizer {

namespace {

constexpr size_t kRunBytes = 64;         // shorter rulers are mostly tokens, or are in the cache
constexpr size_t kTriesForEachByte = 2;  // text needs one in ten; with more, merging is faster

}  // namespace

Backtracker::Backtracker(const Vocabulary& vocabulary, const MergeRules& rules) : rules_(rules) {
    origins_.resize(vocabulary.num_ids());
    for (unsigned byte = 0; byte < 256; ++byte) {
        const uint32_t id = rules.byte_id(static_cast<uint8_t>(byte));
        if (id != Vocabulary::kNone) origins_[id].size = 1;
    }
    for (const auto& [left, right, priority] : rules.merges()) {
        Origin& origin = origins_[rules.result(priority)];
        if (origin.order) return;
        origin.left = left;
        origin.right = right;
        origin.order = priority + 1;
    }
    for (const auto& [left, right, priority] : rules.merges()) {
        if (origins_[left].order > priority || origins_[right].order > priority) return;
    }
    MergeScratch scratch;
    IdBuffer ids;
    std::vector<std::pair<std::string_view, uint32_t>> tokens;
    for (uint32_t id = 0; id < origins_.size(); ++id) {
        Origin& origin = origins_[id];
        if (origin.order) {
            ids.truncate(0);
            merge_piece(rules, vocabulary.bytes(id), scratch, ids);
            if (ids.size() == 1) origin.size = static_cast<uint32_t>(vocabulary.bytes(id).size());
        }
        if (origin.size) tokens.emplace_back(vocabulary.bytes(id), id);
    }
    trie_.build(tokens);
    for (const auto& [bytes, id] : tokens) {
        const auto* begin = reinterpret_cast<const uint8_t*>(bytes.data());
        origins_[id].prefix = trie_.longest(begin, begin + bytes.size() - 1);
    }
    applies_ = true;
}

bool Backtracker::may_follow(uint32_t left, uint32_t right, BacktrackScratch& scratch) const {
    const uint64_t pair = static_cast<uint64_t>(left) << 32 | right;
    uint64_t& known = scratch.known_pairs[mix(pair, 0x9e3779b97f4a7c15u) % BacktrackScratch::kKnownPairs];
    if (known >> 2 != pair || !known) known = pair << 2 | 2 | (may_be_adjacent(left, right) ? 1 : 0);
    return known & 1;
}

// Whether merging leaves `left` `right` as they are: whether no merge across the border comes before those that put
// away the two parts it would join. Goes back in time from the whole tokens to the single bytes beside the border.
bool Backtracker::may_be_adjacent(uint32_t left, uint32_t right) const {
    uint32_t left_end = UINT32_MAX;  // order of the merge that puts `left` away
    uint32_t right_end = UINT32_MAX;
    for (;;) {
        const Origin& a = origins_[left];
        const Origin& b = origins_[right];
        if (const uint32_t priority = rules_.find(left, right); priority != MergeRules::kNone) {
            // Of equal merges the leftmost is first, so one that puts `left` away comes before, one of `right` after.
            const uint32_t order = priority + 1;
            if (order < left_end && order <= right_end) return false;
        }
        if (a.order > b.order) {
            left_end = a.order;
            left = a.right;
        } else if (b.order) {
            right_end = b.order;
            right = b.left;
        } else {
            return true;
        }
    }
}

bool Backtracker::encode(std::string_view piece, BacktrackScratch& scratch, IdBuffer& ids) const {
    if (piece.size() >= kRunBytes && merge_runs(rules_, piece, ids)) return true;
    const auto* text = reinterpret_cast<const uint8_t*>(piece.data());
    const uint8_t* end = text + piece.size();
    std::vector<uint64_t>& hopeless = scratch.hopeless;
    hopeless.assign(piece.size() / 64 + 1, 0);
    const size_t first = ids.size();
    size_t tries_left = kTriesForEachByte * piece.size();
    size_t position = 0;
    uint32_t token = trie_.longest(text, end);
    for (;;) {
        const size_t after = position + origins_[token].size;
        const bool is_first = ids.size() == first;
        if (!(hopeless[after >> 6] >> (after & 63) & 1) && (is_first || may_follow(ids.end()[-1], token, scratch))) {
            ids.push(token);
            position = after;
            if (position == piece.size()) return true;
            token = trie_.longest(text + position, end);
            continue;
        }
        if (tries_left-- == 0) {
            ids.truncate(first);
            return false;
        }
        if (origins_[token].prefix != TokenTrie::kNone) {
            token = origins_[token].prefix;
        } else {
            hopeless[position >> 6] |= uint64_t{1} << (position & 63);
            token = ids.end()[-1];
            ids.truncate(ids.size() - 1);
            position -= origins_[token].size;
        }
    }
}

}  // namespace fastlm::tokenizer
