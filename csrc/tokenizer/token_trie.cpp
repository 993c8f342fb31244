#include "tokenizer/token_trie.hpp"

#include <algorithm>
#include <array>

namespace fastlm::tokenizer {

namespace {

// Tokens that share their first `depth` bytes, and the node of those.
struct Range {
    uint32_t node;
    uint32_t begin;
    uint32_t end;
    uint32_t depth;
};

// Places that no node has, in order.
class FreePlaces {
public:
    bool is_free(uint32_t place) const { return place >= next_.size() || next_[place] != kTaken; }
    uint32_t first() {
        while (first_ < next_.size() && next_[first_] == kTaken) ++first_;
        return first_;
    }
    uint32_t after(uint32_t place) {
        do ++place;
        while (!is_free(place));
        return place;
    }
    void take(uint32_t place) {
        if (place >= next_.size()) next_.resize(std::max<size_t>(place + 1, next_.size() * 2), kFree);
        next_[place] = kTaken;
    }

private:
    static constexpr uint8_t kFree = 0;
    static constexpr uint8_t kTaken = 1;

    std::vector<uint8_t> next_;
    uint32_t first_ = 0;
};

}  // namespace

void TokenTrie::build(std::vector<std::pair<std::string_view, uint32_t>>& tokens) {
    std::sort(tokens.begin(), tokens.end());
    // A place that a node with several children could not use is not tried again for one: else the search is quadratic.
    constexpr int kMostTries = 64;
    FreePlaces free;
    free.take(0);
    uint32_t tried_up_to = 1;
    nodes_.assign(257, Node{});
    std::vector<Range> pending{{0, 0, static_cast<uint32_t>(tokens.size()), 0}};
    std::vector<std::pair<uint8_t, Range>> children;
    for (size_t next = 0; next < pending.size(); ++next) {
        Range range = pending[next];
        if (range.begin < range.end && tokens[range.begin].first.size() == range.depth) {
            nodes_[range.node].token = tokens[range.begin++].second;
        }
        children.clear();
        for (uint32_t i = range.begin; i < range.end;) {
            const auto byte = static_cast<uint8_t>(tokens[i].first[range.depth]);
            const uint32_t begin = i;
            while (i < range.end && static_cast<uint8_t>(tokens[i].first[range.depth]) == byte) ++i;
            children.push_back({byte, {0, begin, i, range.depth + 1}});
        }
        if (children.empty()) continue;
        const uint8_t first_byte = children.front().first;
        uint32_t place = std::max<uint32_t>(free.first(), children.size() == 1 ? 0 : tried_up_to);
        if (!free.is_free(place)) place = free.after(place);
        for (int tries = 0;; ++tries, place = free.after(place)) {
            if (place < first_byte) continue;
            const uint32_t base = place - first_byte;
            if (std::all_of(children.begin(), children.end(), [&](const auto& c) { return free.is_free(base + c.first); })) {
                break;
            }
            if (tries == kMostTries) tried_up_to = place;
        }
        const uint32_t base = place - first_byte;
        if (nodes_.size() < base + 512) nodes_.resize(std::max<size_t>(base + 512, nodes_.size() * 3 / 2));
        nodes_[range.node].base = base;
        for (auto& [byte, child] : children) {
            child.node = base + byte;
            nodes_[child.node].parent = range.node;
            free.take(child.node);
            pending.push_back(child);
        }
    }
}

}  // namespace fastlm::tokenizer
