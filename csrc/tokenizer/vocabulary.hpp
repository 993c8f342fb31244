// The tokens by id and by bytes: open addressing, linear probing, keys in one arena.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastlm::tokenizer {

constexpr uint32_t kMaxId = (1u << 24) - 1;  // sixty times the largest vocabularies in use

class Vocabulary {
public:
    static constexpr uint32_t kNone = UINT32_MAX;

    // Throws std::invalid_argument when a token or id occurs twice, is empty or out of range.
    explicit Vocabulary(const std::vector<std::pair<std::string, uint32_t>>& tokens);

    uint32_t find(std::string_view token) const;  // id or kNone
    bool has(uint32_t id) const { return id < spans_.size() && spans_[id].size; }
    std::string_view bytes(uint32_t id) const { return {arena_.data() + spans_[id].begin, spans_[id].size}; }
    size_t num_ids() const { return spans_.size(); }  // highest id + 1

private:
    struct Slot {
        uint32_t tag;
        uint32_t id;
    };
    struct Span {
        uint32_t begin = 0;
        uint32_t size = 0;
    };

    std::string arena_;
    std::vector<Span> spans_;
    std::vector<Slot> slots_;
    size_t mask_;
};

}  // namespace fastlm::tokenizer
