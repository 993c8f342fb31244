#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "tokenizer/bpe_train.hpp"
#include "tokenizer/recover_merges.hpp"
#include "tokenizer/word_counter.hpp"

namespace py = pybind11;

namespace fastlm {
namespace {

using namespace tokenizer;

std::optional<std::pair<size_t, size_t>> add_texts(WordCounter& counter, const std::vector<py::bytes>& texts,
                                                   bool by_line) {
    const std::vector<std::string_view> views(texts.begin(), texts.end());
    std::optional<InvalidUtf8> invalid;
    {
        py::gil_scoped_release release;
        invalid = counter.add(views, by_line);
    }
    if (!invalid) return std::nullopt;
    return std::pair{invalid->text, invalid->offset};
}

py::list train(WordCounter& counter, uint32_t vocab_size, uint64_t min_frequency,
               const std::array<uint32_t, 256>& byte_ids, uint32_t first_new_id,
               const std::unordered_map<std::string, uint32_t>& known_tokens, const py::object& progress) {
    const auto check = [&](uint32_t id) {
        if (id >= first_new_id) throw py::value_error("first_new_id must be above the ids of bytes and known tokens");
    };
    for (uint32_t id : byte_ids) check(id);
    for (const auto& [text, id] : known_tokens) check(id);
    const TrainOptions options{byte_ids, known_tokens, first_new_id, std::max(vocab_size, first_new_id), min_frequency};
    const TrainProgress report = [&](uint32_t ids_in_use) {
        py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (!progress.is_none()) progress(ids_in_use);
    };
    std::vector<Merge> merges;
    {
        py::gil_scoped_release release;
        merges = train_merges(counter, options, report);
    }
    py::list result(merges.size());
    for (size_t i = 0; i < merges.size(); ++i)
        result[i] = py::make_tuple(merges[i].left, merges[i].right, merges[i].token);
    return result;
}

}  // namespace

void bind_tokenizer_train(py::module_& m) {
    py::class_<WordCounter>(m, "WordCounter", "Counts pre-tokens, then trains BPE merges on the counts.")
        .def(py::init([](const std::string& pattern, unsigned num_threads, size_t most_bytes) {
                 return std::make_unique<WordCounter>(pattern_from_name(pattern), num_threads, most_bytes);
             }),
             py::arg("pattern"), py::arg("num_threads"), py::arg("most_bytes") = 0,
             "`most_bytes` limits the memory of the counts: the rarest words make room. 0 sets no limit.")
        .def("add", &add_texts, py::arg("texts"), py::arg("by_line") = false,
             "Counts complete UTF-8 texts. Returns None, or (index of the text, byte offset) of the first invalid one, "
             "and then counts none of them.")
        .def("train", &train, py::arg("vocab_size"), py::arg("min_frequency"), py::arg("byte_ids"),
             py::arg("first_new_id"), py::arg("known_tokens"), py::arg("progress"),
             "Returns [(left id, right id, id of the merged token)] and empties the counter. `progress` may be None; "
             "it gets the number of ids in use about ten times a second, and training ends with what it raises.")
        .def_property_readonly("total_bytes", &WordCounter::total_bytes)
        .def_property_readonly("total_words", &WordCounter::total_words)
        .def_property_readonly("forgotten_words", &WordCounter::forgotten_words)
        .def_property_readonly("distinct_words", &WordCounter::distinct_words);
    m.def(
        "last_safe_cut", [](std::string_view text) { return last_safe_cut(text); }, py::arg("text"),
        py::call_guard<py::gil_scoped_release>(),
        "Length of the longest proper prefix of `text` that may be counted apart from the rest; 0 when there is none.");
    m.def(
        "recover_merges",
        [](const std::vector<std::string>& tokens) {
            py::gil_scoped_release release;
            return recover_merges(tokens);
        },
        py::arg("tokens"),
        "For each token in order of rank: the ranks of the pair that BPE merges last to make it, or None.");
}

}  // namespace fastlm
