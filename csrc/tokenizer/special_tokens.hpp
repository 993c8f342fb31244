// Finds special tokens in text: the leftmost, and of those that begin at one place the longest.
//
// Special tokens look alike ("<|...|>"), so text is searched for what all of them begin with, which the C library does
// at memory speed, or else for the bytes that some begin with. From there a trie of the tokens is walked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastlm::tokenizer {

class SpecialTokens {
public:
    struct Match {
        size_t begin;
        size_t size;
        uint32_t id;
    };

    explicit SpecialTokens(const std::vector<std::pair<std::string, uint32_t>>& tokens) : tokens_(tokens) {
        for (const auto& [token, id] : tokens_) {
            if (token.empty()) throw std::invalid_argument("a special token is empty");
            add(token, id);
            if (&token == &tokens_.front().first) prefix_ = token;
            const auto differ = std::mismatch(prefix_.begin(), prefix_.end(), token.begin(), token.end()).first;
            prefix_ = prefix_.substr(0, static_cast<size_t>(differ - prefix_.begin()));
            can_begin_[static_cast<uint8_t>(token[0])] = true;
        }
    }
    SpecialTokens(const SpecialTokens&) = delete;

    std::optional<Match> find(std::string_view text, size_t from) const {
        if (tokens_.empty()) return std::nullopt;
        for (size_t i = next_candidate(text, from); i < text.size(); i = next_candidate(text, i + 1)) {
            const Node* node = &nodes_[0];
            const Node* found = nullptr;
            size_t end = 0;
            for (size_t at = i; at < text.size(); ++at) {
                const uint32_t next = child(*node, static_cast<uint8_t>(text[at]));
                if (!next) break;
                node = &nodes_[next];
                if (!node->is_token) continue;
                found = node;
                end = at + 1;
            }
            if (found) return Match{i, end - i, found->id};
        }
        return std::nullopt;
    }

private:
    size_t next_candidate(std::string_view text, size_t from) const {
        if (!prefix_.empty()) return std::min(text.find(prefix_, from), text.size());
        while (from < text.size() && !can_begin_[static_cast<uint8_t>(text[from])]) ++from;
        return from;
    }

    // Children are few but at the root, where can_begin_ has said that there is one.
    struct Node {
        std::vector<std::pair<uint8_t, uint32_t>> children;
        uint32_t id = 0;
        bool is_token = false;
    };

    static uint32_t child(const Node& node, uint8_t byte) {
        for (const auto& [label, next] : node.children) {
            if (label == byte) return next;
        }
        return 0;
    }

    void add(std::string_view token, uint32_t id) {
        uint32_t at = 0;
        for (const char c : token) {
            uint32_t next = child(nodes_[at], static_cast<uint8_t>(c));
            if (!next) {
                next = static_cast<uint32_t>(nodes_.size());
                nodes_[at].children.emplace_back(static_cast<uint8_t>(c), next);
                nodes_.emplace_back();
            }
            at = next;
        }
        if (nodes_[at].is_token) return;  // of two spelled alike the first counts
        nodes_[at].is_token = true;
        nodes_[at].id = id;
    }

    std::vector<std::pair<std::string, uint32_t>> tokens_;  // owns what prefix_ views
    std::vector<Node> nodes_{1};
    std::string_view prefix_;    // of all tokens
    bool can_begin_[256] = {};
};

}  // namespace fastlm::tokenizer
