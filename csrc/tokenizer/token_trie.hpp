// Finds the longest token that text begins with: a trie in a double array (Aoe 1989), so that each byte costs one
// load. A node's child by byte c is at base + c, and says which node it belongs to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace fastlm::tokenizer {

class TokenTrie {
public:
    static constexpr uint32_t kNone = UINT32_MAX;

    // Tokens and their ids. Sorts `tokens`, whose bytes must differ.
    void build(std::vector<std::pair<std::string_view, uint32_t>>& tokens);

    // The id of the longest token that begins at `p`, or kNone.
    uint32_t longest(const uint8_t* p, const uint8_t* end) const {
        uint32_t found = kNone;
        uint32_t node = 0;
        for (; p < end; ++p) {
            const uint32_t child = nodes_[node].base + *p;
            if (nodes_[child].parent != node) break;
            node = child;
            if (nodes_[node].token != kNone) found = nodes_[node].token;
        }
        return found;
    }

private:
    struct Node {
        uint32_t base = 0;
        uint32_t parent = kNone;
        uint32_t token = kNone;
    };

    std::vector<Node> nodes_;  // 256 more than are used, so that base + c is always inside
};

}  // namespace fastlm::tokenizer
