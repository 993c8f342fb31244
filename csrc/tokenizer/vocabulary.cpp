#include "tokenizer/vocabulary.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "tokenizer/hash.hpp"

namespace fastlm::tokenizer {

Vocabulary::Vocabulary(const std::vector<std::pair<std::string, uint32_t>>& tokens) {
    if (tokens.empty()) throw std::invalid_argument("the vocabulary is empty");
    size_t total = 0;
    uint32_t highest = 0;
    for (const auto& [token, id] : tokens) {
        if (token.empty()) throw std::invalid_argument("token " + std::to_string(id) + " is empty");
        if (id > kMaxId) {
            throw std::invalid_argument("id " + std::to_string(id) + " is above the limit of " + std::to_string(kMaxId));
        }
        total += token.size();
        highest = std::max(highest, id);
    }
    if (total >= UINT32_MAX) throw std::invalid_argument("the vocabulary is larger than 4 GiB");
    arena_.reserve(total);
    spans_.resize(highest + 1);
    slots_.assign(std::bit_ceil(tokens.size() * 2), Slot{0, kNone});
    mask_ = slots_.size() - 1;
    for (const auto& [token, id] : tokens) {
        if (has(id)) throw std::invalid_argument("two tokens have the id " + std::to_string(id));
        const uint64_t hash = hash_bytes(token.data(), token.size());
        size_t i = hash & mask_;
        for (; slots_[i].id != kNone; i = (i + 1) & mask_) {
            if (bytes(slots_[i].id) == token) {
                throw std::invalid_argument("the tokens with ids " + std::to_string(slots_[i].id) + " and " +
                                            std::to_string(id) + " are the same bytes");
            }
        }
        slots_[i] = {static_cast<uint32_t>(hash >> 32), id};
        spans_[id] = {static_cast<uint32_t>(arena_.size()), static_cast<uint32_t>(token.size())};
        arena_ += token;
    }
}

uint32_t Vocabulary::find(std::string_view token) const {
    const uint64_t hash = hash_bytes(token.data(), token.size());
    const uint32_t tag = static_cast<uint32_t>(hash >> 32);
    for (size_t i = hash & mask_; slots_[i].id != kNone; i = (i + 1) & mask_) {
        if (slots_[i].tag == tag && bytes(slots_[i].id) == token) return slots_[i].id;
    }
    return kNone;
}

}  // namespace fastlm::tokenizer
