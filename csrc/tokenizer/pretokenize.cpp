#include "tokenizer/pretokenize.hpp"

#include <stdexcept>
#include <string>

namespace fastlm::tokenizer {

Pattern pattern_from_name(std::string_view name) {
    if (name == "gpt2") return Pattern::gpt2;
    if (name == "cl100k") return Pattern::cl100k;
    if (name == "o200k") return Pattern::o200k;
    if (name == "llama3") return Pattern::llama3;
    if (name == "qwen2") return Pattern::qwen2;
    throw std::invalid_argument("no pattern named '" + std::string(name) +
                                "'; there are gpt2, cl100k, o200k, llama3, qwen2");
}

}  // namespace fastlm::tokenizer
