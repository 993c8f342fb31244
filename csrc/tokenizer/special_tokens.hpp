// Finds special tokens in text: the leftmost, and of those that begin at one place the longest.
//
// Special tokens look alike ("<|...|>"), so text is searched for what all of them begin with, which the C library does
// at memory speed, and only there are they looked up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
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
            ids_.emplace(token, id);
            sizes_.push_back(token.size());
            if (&token == &tokens_.front().first) prefix_ = token;
            const auto differ = std::mismatch(prefix_.begin(), prefix_.end(), token.begin(), token.end()).first;
            prefix_ = prefix_.substr(0, static_cast<size_t>(differ - prefix_.begin()));
            can_begin_[static_cast<uint8_t>(token[0])] = true;
        }
        std::sort(sizes_.begin(), sizes_.end(), std::greater<>());
        sizes_.erase(std::unique(sizes_.begin(), sizes_.end()), sizes_.end());
    }
    SpecialTokens(const SpecialTokens&) = delete;

    std::optional<Match> find(std::string_view text, size_t from) const {
        if (tokens_.empty()) return std::nullopt;
        for (size_t i = next_candidate(text, from); i < text.size(); i = next_candidate(text, i + 1)) {
            for (const size_t size : sizes_) {
                if (size > text.size() - i) continue;
                const auto found = ids_.find(text.substr(i, size));
                if (found != ids_.end()) return Match{i, size, found->second};
            }
        }
        return std::nullopt;
    }

private:
    size_t next_candidate(std::string_view text, size_t from) const {
        if (!prefix_.empty()) return std::min(text.find(prefix_, from), text.size());
        while (from < text.size() && !can_begin_[static_cast<uint8_t>(text[from])]) ++from;
        return from;
    }

    std::vector<std::pair<std::string, uint32_t>> tokens_;  // owns the keys of ids_
    std::unordered_map<std::string_view, uint32_t> ids_;
    std::vector<size_t> sizes_;  // distinct, longest first
    std::string_view prefix_;    // of all tokens
    bool can_begin_[256] = {};
};

}  // namespace fastlm::tokenizer
