#include "tokenizer/merge_piece.hpp"

#include <algorithm>
#include <bit>
#include <stdexcept>

namespace fastlm::tokenizer {

namespace {

using Pair = std::pair<uint32_t, uint32_t>;

constexpr size_t kShortPiece = 64;  // bytes; a scan of so few pairs is faster than keeping queues

Pair merge_short(const MergeRules& rules, std::string_view piece, IdBuffer& ids) {
    Pair last{};
    const auto* bytes = reinterpret_cast<const uint8_t*>(piece.data());
    const size_t size = piece.size();
    // Priority << 8 | position of each pair that has a merge, so that the least is the one to do first. A part that
    // was merged into the one before it is no longer alive.
    constexpr uint32_t none = UINT32_MAX;
    alignas(64) uint32_t pairs[kShortPiece];
    uint32_t id[kShortPiece];
    const auto packed = [](uint32_t priority, size_t position) {
        return priority == MergeRules::kNone ? none : priority << 8 | static_cast<uint32_t>(position);
    };
    for (size_t i = 0; i < size; ++i) id[i] = rules.byte_id(bytes[i]);
    for (size_t i = 0; i + 1 < size; ++i) pairs[i] = packed(rules.find_bytes(bytes[i], bytes[i + 1]), i);
    const size_t padded = (size + 14) / 16 * 16;
    for (size_t i = size - 1; i < padded; ++i) pairs[i] = none;
    uint64_t alive = UINT64_MAX >> (64 - size);
    for (;;) {
        uint32_t least = none;
        for (size_t i = 0; i < padded; i += 16) {
            for (size_t k = 0; k < 16; ++k) least = std::min(least, pairs[i + k]);
        }
        if (least == none) break;
        const size_t left = least & 0xff;
        const uint64_t after_left = alive & (UINT64_MAX << left << 1);
        const size_t right = std::countr_zero(after_left);
        const uint64_t after_right = after_left & (after_left - 1);
        last = {id[left], id[right]};
        id[left] = rules.result(least >> 8);
        alive ^= uint64_t{1} << right;
        pairs[right] = none;
        pairs[left] = none;
        if (after_right) pairs[left] = packed(rules.find(id[left], id[std::countr_zero(after_right)]), left);
        if (const uint64_t before = alive & ((uint64_t{1} << left) - 1)) {
            const size_t previous = 63 - std::countl_zero(before);
            pairs[previous] = packed(rules.find(id[previous], id[left]), previous);
        }
    }
    ids.reserve(size);
    uint32_t* out = ids.end();
    for (; alive; alive &= alive - 1) *out++ = id[std::countr_zero(alive)];
    ids.set_end(out);
    return last;
}

Pair merge_long(const MergeRules& rules, std::string_view piece, MergeScratch& scratch, IdBuffer& ids) {
    Pair last{};
    if (piece.size() >= UINT32_MAX) throw std::length_error("a pre-token is longer than 4 GiB");
    const auto* bytes = reinterpret_cast<const uint8_t*>(piece.data());
    const auto count = static_cast<uint32_t>(piece.size());
    constexpr uint32_t none = UINT32_MAX;
    auto& nodes = scratch.nodes;
    auto& pairs = scratch.pairs;
    nodes.resize(count);
    pairs.resize(count);
    scratch.queue_of_priority.resize(rules.num_priorities(), MergeScratch::kNoQueue);
    for (uint32_t i = 0; i < count; ++i) {
        nodes[i] = {rules.byte_id(bytes[i]), i ? i - 1 : none, i + 1 < count ? i + 1 : none};
        pairs[i] = i + 1 < count ? rules.find_bytes(bytes[i], bytes[i + 1]) : MergeRules::kNone;
        if (pairs[i] != MergeRules::kNone) scratch.push(i, pairs[i]);
    }

    const auto refresh = [&](uint32_t position) {
        const uint32_t next = nodes[position].next;
        pairs[position] = next == none ? MergeRules::kNone : rules.find(nodes[position].id, nodes[next].id);
        if (pairs[position] != MergeRules::kNone) scratch.push(position, pairs[position]);
    };
    while (!scratch.priorities.empty()) {
        const uint32_t priority = scratch.priorities.top();
        const uint32_t index = scratch.queue_of_priority[priority];
        if (MergeScratch::Queue& queue = scratch.queues[index]; !queue.is_sorted) {
            std::sort(queue.positions.begin() + static_cast<std::ptrdiff_t>(queue.next), queue.positions.end());
            queue.is_sorted = true;
        }
        // A merge may make a pair of lower priority, which is then done first; this queue goes on afterwards.
        while (scratch.priorities.top() == priority && scratch.queues[index].is_sorted) {
            MergeScratch::Queue& queue = scratch.queues[index];
            if (queue.next == queue.positions.size()) {
                scratch.priorities.pop();
                scratch.retire(priority);
                break;
            }
            const uint32_t position = queue.positions[queue.next++];
            // The pair that was queued may have been merged away or changed since.
            if (pairs[position] != priority) continue;
            const uint32_t right = nodes[position].next;
            const uint32_t after = nodes[right].next;
            last = {nodes[position].id, nodes[right].id};
            nodes[position].id = rules.result(priority);
            nodes[position].next = after;
            if (after != none) nodes[after].previous = position;
            pairs[right] = MergeRules::kNone;
            refresh(position);
            if (nodes[position].previous != none) refresh(nodes[position].previous);
        }
    }
    ids.reserve(count);
    for (uint32_t i = 0; i != none; i = nodes[i].next) ids.push(nodes[i].id);
    return last;
}

}  // namespace

Pair merge_piece(const MergeRules& rules, std::string_view piece, MergeScratch& scratch, IdBuffer& ids) {
    return piece.size() <= kShortPiece ? merge_short(rules, piece, ids) : merge_long(rules, piece, scratch, ids);
}

}  // namespace fastlm::tokenizer
