// Merging by the rules themselves: the adjacent pair of lowest priority first, the leftmost among equals, until no pair
// has a merge. It serves any rules; backtracker.hpp is faster where it applies.
//
// A short piece is merged in a flat array, where finding the lowest pair is a scan. A long one in a linked list with
// one queue of positions for each priority, so the cost is O(n log n) at worst and O(n) on repetitive text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <queue>
#include <string_view>
#include <utility>
#include <vector>

#include "tokenizer/id_buffer.hpp"
#include "tokenizer/merge_rules.hpp"

namespace fastlm::tokenizer {

// The arrays of long pieces, kept from one to the next. Of no use after an exception.
class MergeScratch {
public:
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

    std::vector<Node> nodes;
    std::vector<uint32_t> pairs;  // priority of a node and its next
    std::vector<Queue> queues;
    std::vector<uint32_t> free_queues;
    std::vector<uint32_t> queue_of_priority;
    std::priority_queue<uint32_t, std::vector<uint32_t>, std::greater<>> priorities;

    void push(uint32_t position, uint32_t priority) {
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

    // A piece of megabytes is rare, so the room for it is not kept.
    void shrink() {
        if (nodes.capacity() > (1 << 16)) {
            nodes = {};
            pairs = {};
            queues = {};
            free_queues = {};
        }
    }
};

// Appends the ids of `piece`. Returns the last pair of ids that was merged. Throws std::length_error from 4 GiB.
std::pair<uint32_t, uint32_t> merge_piece(const MergeRules& rules, std::string_view piece, MergeScratch& scratch,
                                          IdBuffer& ids);

}  // namespace fastlm::tokenizer
