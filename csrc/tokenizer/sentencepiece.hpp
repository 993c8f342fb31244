// SentencePiece's byte-pair encoding: merges over whole sections of text, with no pre-tokenizer (Llama 2, Gemma).
//
// Symbols are the characters of the text, and the pair of lowest priority merges first, the leftmost among equals
// (github.com/google/sentencepiece, bpe_model.cc; Hugging Face's `tokenizers`, models/bpe/word.rs). A character without
// a piece becomes its bytes' tokens or the unknown token.
//
// Taken literally that is one merge over all the text. But a merge never crosses a place where no reachable token has
// the two characters around it side by side, so text is cut there first, which changes no id: in the vocabularies in
// use that is before nearly every space. What is left between cuts is a word, and words are Zipfian, so most end at a
// cache of recent ones as in bpe_encode.hpp. A piece without a cut of any length costs O(n log n) by a heap.
//
// Of all merges that make a token, only the last one made when the token is encoded alone can ever happen (inside a
// token, what merges in a text is what merges there when it stands alone), so the others are left out of the table:
// half of Llama 2's, more of Gemma's.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tokenizer/id_buffer.hpp"
#include "tokenizer/merge_table.hpp"
#include "tokenizer/vocabulary.hpp"

namespace fastlm::tokenizer {

class SentencePieceEncoder {
public:
    static constexpr uint32_t kNone = Vocabulary::kNone;

    struct Options {
        std::array<uint32_t, 256> byte_ids;  // token of each byte, or kNone
        uint32_t unknown = kNone;            // token of a character that has neither piece nor bytes
        bool fuse_unknown = false;           // neighbouring unknown characters make one token
        bool space_is_meta = false;          // ' ' in text means U+2581
        bool split_at_meta = false;          // no merge crosses the place before U+2581
    };

    // `merges`: pairs of ids, first first. Throws std::invalid_argument for pieces or merges that cannot be.
    SentencePieceEncoder(const std::vector<std::pair<std::string, uint32_t>>& pieces,
                         const std::vector<std::pair<uint32_t, uint32_t>>& merges, const Options& options);

    // `scores`, in the order of `pieces`: any two pieces whose concatenation is a piece merge, the highest score first.
    SentencePieceEncoder(const std::vector<std::pair<std::string, uint32_t>>& pieces, const std::vector<float>& scores,
                         const Options& options);
    ~SentencePieceEncoder();

    size_t num_ids() const { return num_ids_; }  // highest id + 1

    // (left, right, priority) of the merges that can happen, first first, equals by the id that they make.
    std::vector<std::tuple<uint32_t, uint32_t, uint32_t>> reachable_merges() const;

    // Appends the ids of one section of valid UTF-8. Thread-safe. Throws std::length_error for a piece of 4 GiB.
    void encode(std::string_view text, IdBuffer& ids) const;

private:
    struct State;
    struct Merge {
        uint32_t left;
        uint32_t right;
        uint32_t priority;
        uint32_t result;
    };

    void build(const Vocabulary& vocabulary, const std::vector<Merge>& merges);
    void fill(const std::vector<Merge>& merges);
    uint32_t symbol(uint32_t code) const;
    bool is_meta(uint32_t code) const;
    bool may_join(uint32_t left_code, uint32_t right_code) const;
    void allow_join(uint32_t left_code, uint32_t right_code);
    void encode_piece(std::string_view piece, State& state, IdBuffer& ids) const;
    void merge(std::string_view piece, State& state, IdBuffer& ids, uint64_t* last_pair) const;
    void merge_long(State& state, IdBuffer& ids, uint64_t* last_pair) const;
    void push_character(std::string_view character, uint32_t id, bool& after_unknown, IdBuffer& ids) const;
    std::unique_ptr<State> borrow() const;
    void give_back(std::unique_ptr<State> state) const;

    size_t num_ids_;
    Options options_;
    PairTable<uint64_t> merges_;                       // priority << 32 | id of what the merge makes
    std::vector<uint32_t> bmp_;                        // piece of each character up to U+FFFF, or kNone
    std::unordered_map<uint32_t, uint32_t> astral_;    // and of those above
    std::array<std::array<uint64_t, 2>, 128> ascii_joins_{};  // by first character, a bit for each second
    std::vector<uint64_t> joins_;                      // a hashed bit for each other pair; may say yes in error
    uint64_t join_mask_ = 0;

    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<State>> idle_states_;
};

}  // namespace fastlm::tokenizer
