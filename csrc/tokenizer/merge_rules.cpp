#include "tokenizer/merge_rules.hpp"

#include <stdexcept>
#include <string_view>

#include "tokenizer/id_buffer.hpp"
#include "tokenizer/merge_piece.hpp"

namespace fastlm::tokenizer {

MergeRules::MergeRules(const Vocabulary& vocabulary) {
    set_byte_ids(vocabulary);
    for (uint32_t id = 0; id < vocabulary.num_ids(); ++id) {
        if (!vocabulary.has(id)) continue;
        const std::string_view token = vocabulary.bytes(id);
        if (token.size() > kMaxRankedTokenBytes) {
            throw std::invalid_argument("token " + std::to_string(id) + " is longer than " +
                                        std::to_string(kMaxRankedTokenBytes) + " bytes");
        }
        for (size_t cut = 1; cut < token.size(); ++cut) {
            const uint32_t left = vocabulary.find(token.substr(0, cut));
            if (left == Vocabulary::kNone) continue;
            const uint32_t right = vocabulary.find(token.substr(cut));
            if (right != Vocabulary::kNone) merges_.push_back({left, right, id});
        }
    }
    num_priorities_ = static_cast<uint32_t>(vocabulary.num_ids());
    build_tables();

    // Of all ways to split a token, merging uses one: until a token is made, what happens inside it is what happens
    // when it is encoded alone, since the lowest pair of the text is also the lowest there. The others are never the
    // lowest pair, so leaving them out changes nothing but the size of the table.
    MergeScratch scratch;
    IdBuffer ids;
    merges_.clear();
    for (uint32_t id = 0; id < vocabulary.num_ids(); ++id) {
        if (!vocabulary.has(id) || vocabulary.bytes(id).size() == 1) continue;
        ids.truncate(0);
        const auto last = merge_piece(*this, vocabulary.bytes(id), scratch, ids);
        if (ids.size() == 1) merges_.push_back({last.first, last.second, id});
    }
    build_tables();
}

MergeRules::MergeRules(const Vocabulary& vocabulary, const std::vector<std::pair<uint32_t, uint32_t>>& pairs) {
    set_byte_ids(vocabulary);
    if (pairs.size() > kMaxId) throw std::invalid_argument("there are more than " + std::to_string(kMaxId) + " merges");
    std::string joined;
    for (const auto& [left, right] : pairs) {
        const auto number = static_cast<uint32_t>(merges_.size());
        if (!vocabulary.has(left) || !vocabulary.has(right)) {
            throw std::invalid_argument("merge " + std::to_string(number) + " is of an id without a token");
        }
        joined.assign(vocabulary.bytes(left)).append(vocabulary.bytes(right));
        results_.push_back(vocabulary.find(joined));
        if (results_.back() == Vocabulary::kNone) {
            throw std::invalid_argument("merge " + std::to_string(number) + " makes something that is no token");
        }
        merges_.push_back({left, right, number});
    }
    num_priorities_ = static_cast<uint32_t>(pairs.size());
    build_tables();
}

void MergeRules::set_byte_ids(const Vocabulary& vocabulary) {
    for (size_t byte = 0; byte < 256; ++byte) {
        const char c = static_cast<char>(byte);
        byte_ids_[byte] = vocabulary.find({&c, 1});
        // What no text holds a vocabulary may lack (StarCoder's), and what begins planes 4 … 16 too.
        const bool is_needed = byte < 0xf1 && byte != 0xc0 && byte != 0xc1;
        if (byte_ids_[byte] == Vocabulary::kNone && is_needed) {
            throw std::invalid_argument("byte " + std::to_string(byte) +
                                        " has no token; a byte-level vocabulary holds all that text is made of");
        }
    }
}

void MergeRules::build_tables() {
    table_.reset(merges_.size());
    for (const Merge& merge : merges_) table_.add(merge.left, merge.right, merge.priority);
    byte_pairs_.resize(65536);
    for (size_t i = 0; i < byte_pairs_.size(); ++i) {
        byte_pairs_[i] = table_.find(byte_ids_[i >> 8], byte_ids_[i & 255]);
    }
}

}  // namespace fastlm::tokenizer
