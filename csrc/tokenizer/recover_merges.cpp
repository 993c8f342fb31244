#include "tokenizer/recover_merges.hpp"

#include <algorithm>
#include <string_view>
#include <unordered_map>

namespace fastlm::tokenizer {

std::vector<std::optional<std::pair<uint32_t, uint32_t>>> recover_merges(const std::vector<std::string>& tokens) {
    constexpr uint32_t kNone = UINT32_MAX;
    std::unordered_map<std::string_view, uint32_t> ranks;
    ranks.reserve(tokens.size());
    for (uint32_t rank = 0; rank < tokens.size(); ++rank) ranks.emplace(tokens[rank], rank);
    const auto rank_of = [&](std::string_view bytes) {
        const auto found = ranks.find(bytes);
        return found == ranks.end() ? kNone : found->second;
    };

    std::vector<std::optional<std::pair<uint32_t, uint32_t>>> merges(tokens.size());
    std::vector<size_t> begins;         // of the parts; the last entry is the token's end
    std::vector<uint32_t> pair_ranks;   // rank of part i joined with part i + 1
    for (uint32_t rank = 0; rank < tokens.size(); ++rank) {
        const std::string_view token = tokens[rank];
        begins.resize(token.size() + 1);
        for (size_t i = 0; i <= token.size(); ++i) begins[i] = i;
        const auto joined = [&](size_t part) {
            return rank_of(token.substr(begins[part], begins[part + 2] - begins[part]));
        };
        pair_ranks.clear();
        for (size_t part = 0; part + 2 < begins.size(); ++part) pair_ranks.push_back(joined(part));
        while (!pair_ranks.empty()) {
            const auto lowest = std::min_element(pair_ranks.begin(), pair_ranks.end());
            if (*lowest >= rank) break;
            const size_t part = lowest - pair_ranks.begin();
            begins.erase(begins.begin() + part + 1);
            pair_ranks.erase(lowest);
            if (part < pair_ranks.size()) pair_ranks[part] = joined(part);
            if (part > 0) pair_ranks[part - 1] = joined(part - 1);
        }
        if (begins.size() != 3) continue;
        const uint32_t left = rank_of(token.substr(0, begins[1]));
        const uint32_t right = rank_of(token.substr(begins[1]));
        if (left != kNone && right != kNone) merges[rank] = {left, right};
    }
    return merges;
}

}  // namespace fastlm::tokenizer
