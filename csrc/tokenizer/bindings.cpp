// Python bindings of the tokenizer: conversions, the policy on special tokens, and threads over a batch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizer/bpe_encode.hpp"
#include "tokenizer/pretokenize.hpp"
#include "tokenizer/special_tokens.hpp"
#include "tokenizer/threads.hpp"

namespace py = pybind11;

namespace fastlm {

void bind_tokenizer_train(py::module_& m);

namespace tokenizer {
namespace {

// Below this many bytes, encoding takes less time than handing the GIL to another thread and back.
constexpr size_t kReleaseGilBytes = 512;

[[noreturn]] void raise_tokenizer_error(const std::string& message) {
    const py::object type = py::module_::import("fastlm.errors").attr("TokenizerError");
    PyErr_SetString(type.ptr(), message.c_str());
    throw py::error_already_set();
}

[[noreturn]] void raise_disallowed(std::string_view token) {
    const std::string quoted = "'" + std::string(token) + "'";
    raise_tokenizer_error("the text holds the special token " + quoted +
                          ", which is not allowed here. To encode it as that token, pass allowed_special={" + quoted +
                          "}; to encode it as ordinary text, pass disallowed_special=()");
}

[[noreturn]] void raise_unknown(const std::string& id, size_t position) {
    raise_tokenizer_error("id " + id + " at position " + std::to_string(position) + " is not in the vocabulary");
}

// Valid while `text` lives. Raises UnicodeEncodeError on lone surrogates.
std::string_view utf8(py::handle text) {
    if (!PyUnicode_Check(text.ptr())) {
        throw py::type_error("text must be a str, not " + std::string(Py_TYPE(text.ptr())->tp_name));
    }
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (!data) throw py::error_already_set();
    return {data, static_cast<size_t>(size)};
}

// None for an int outside 0 … UINT32_MAX - 1. Raises TypeError for what is no int.
std::optional<uint32_t> small_int(py::handle value) {
    const long id = PyLong_AsLong(value.ptr());
    if (id == -1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) throw py::error_already_set();
        PyErr_Clear();
    }
    if (id < 0 || static_cast<unsigned long>(id) >= UINT32_MAX) return std::nullopt;
    return static_cast<uint32_t>(id);
}

uint32_t id_of_token(py::handle token, py::handle value) {
    const auto id = small_int(value);
    if (id && *id <= kMaxId) return *id;
    raise_tokenizer_error("the token " + std::string(py::repr(token)).substr(0, 80) + " has the id " +
                          std::string(py::str(value)) + ", which is not in 0 … " + std::to_string(kMaxId));
}

class Encoder {
public:
    Encoder(const py::dict& tokens, const std::optional<std::vector<std::pair<uint32_t, uint32_t>>>& merges,
            const std::string& pattern, const py::dict& special_tokens)
        : pattern_(pattern.empty() ? std::nullopt : std::optional(pattern_from_name(pattern))) {
        std::vector<std::pair<std::string, uint32_t>> list;
        list.reserve(tokens.size());
        for (const auto& [token, id] : tokens) {
            if (!PyBytes_Check(token.ptr())) throw py::type_error("mergeable_ranks must map bytes to int");
            list.emplace_back(std::string(py::reinterpret_borrow<py::bytes>(token)), id_of_token(token, id));
        }
        {
            const py::gil_scoped_release release;
            bpe_ = std::make_unique<BpeEncoder>(list, merges);
        }
        for (const auto& [text, value] : special_tokens) {
            const std::string token(utf8(text));
            const uint32_t id = id_of_token(text, value);
            if (token.empty()) raise_tokenizer_error("a special token is empty");
            if (bpe_->vocabulary().has(id)) {
                raise_tokenizer_error("special token '" + token + "' has the id " + std::to_string(id) +
                                      " of an ordinary token");
            }
            special_bytes_.emplace(id, token);  // of two with one id (o200k_harmony), the first is what it decodes to
        }
        // Lists of ids are filled with these objects: taking a reference is cheaper than making an int.
        ints_.reserve(bpe_->vocabulary().num_ids());
        for (size_t id = 0; id < bpe_->vocabulary().num_ids(); ++id) ints_.emplace_back(py::int_(id));
    }

    py::list encode(py::handle text, const SpecialTokens& allowed, const SpecialTokens& disallowed) const {
        return to_list(ids_of(utf8(text), allowed, disallowed));
    }

    py::array_t<uint32_t> encode_to_numpy(py::handle text, const SpecialTokens& allowed,
                                          const SpecialTokens& disallowed) const {
        const IdBuffer ids = ids_of(utf8(text), allowed, disallowed);
        return py::array_t<uint32_t>(static_cast<py::ssize_t>(ids.size()), ids.data());
    }

    py::list encode_piece(const py::bytes& piece) const {
        const std::string_view bytes = piece;
        IdBuffer ids;
        {
            const py::gil_scoped_release release;
            bpe_->encode_piece(bytes, ids);
        }
        return to_list(ids);
    }

    py::list encode_batch(const py::list& texts, const SpecialTokens& allowed, const SpecialTokens& disallowed,
                          size_t num_threads) const {
        std::vector<py::object> kept;  // so that the texts live although the list may change
        std::vector<std::string_view> views;
        for (const py::handle text : texts) {
            kept.push_back(py::reinterpret_borrow<py::object>(text));
            views.push_back(utf8(text));
        }
        std::vector<IdBuffer> results(views.size());
        std::vector<std::string_view> refused(views.size());
        {
            const py::gil_scoped_release release;
            for_each_on_threads(views.size(), num_threads, [&](size_t i) {
                refused[i] = append_ids(views[i], allowed, disallowed, results[i]);
            });
        }
        py::list lists(views.size());
        for (size_t i = 0; i < views.size(); ++i) {
            if (!refused[i].empty()) raise_disallowed(refused[i]);
            lists[i] = to_list(results[i]);
        }
        return lists;
    }

    py::bytes decode(const py::object& ids) const {
        const auto sequence = py::reinterpret_steal<py::object>(PySequence_Fast(ids.ptr(), "ids must be a sequence of ints"));
        if (!sequence) throw py::error_already_set();
        std::string out;
        for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence.ptr()); ++i) {
            // Kept, because __index__ of an item may change the list that it is in.
            const auto value = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(sequence.ptr(), i));
            const auto id = small_int(value);
            if (!id) raise_unknown(py::str(value), static_cast<size_t>(i));
            out += bytes_of(*id, static_cast<size_t>(i));
        }
        return py::bytes(out);
    }

    // For each id, the index of the character that its first byte belongs to, when the ids are decoded together.
    py::list offsets(const std::vector<uint32_t>& ids) const {
        py::list result(ids.size());
        int64_t characters = 0;
        for (size_t i = 0; i < ids.size(); ++i) {
            const std::string_view token = bytes_of(ids[i], i);
            const auto is_inside = [](char c) { return (c & 0xc0) == 0x80; };
            result[i] = py::int_(std::max<int64_t>(0, characters - is_inside(token[0])));
            characters += std::count_if(token.begin(), token.end(), [&](char c) { return !is_inside(c); });
        }
        return result;
    }

private:
    std::string_view bytes_of(uint32_t id, size_t position) const {
        if (bpe_->vocabulary().has(id)) return bpe_->vocabulary().bytes(id);
        const auto found = special_bytes_.find(id);
        if (found == special_bytes_.end()) raise_unknown(std::to_string(id), position);
        return found->second;
    }

    IdBuffer ids_of(std::string_view text, const SpecialTokens& allowed, const SpecialTokens& disallowed) const {
        IdBuffer ids;
        std::string_view refused;
        if (text.size() < kReleaseGilBytes) {
            refused = append_ids(text, allowed, disallowed, ids);
        } else {
            const py::gil_scoped_release release;
            refused = append_ids(text, allowed, disallowed, ids);
        }
        if (!refused.empty()) raise_disallowed(refused);
        return ids;
    }

    // Returns the disallowed token that the text holds, empty if none. Needs no GIL.
    std::string_view append_ids(std::string_view text, const SpecialTokens& allowed, const SpecialTokens& disallowed,
                                IdBuffer& ids) const {
        if (const auto match = disallowed.find(text, 0)) return text.substr(match->begin, match->size);
        ids.reserve(text.size() / 4 + 8);
        size_t begin = 0;
        while (const auto match = allowed.find(text, begin)) {
            bpe_->encode(*pattern_, text.substr(begin, match->begin - begin), ids);
            ids.push(match->id);
            begin = match->begin + match->size;
        }
        bpe_->encode(*pattern_, text.substr(begin), ids);
        return {};
    }

    // A list of the int objects that are kept. Where they are and they themselves are fetched ahead: after other work, all
    // of that is in memory and in no cache.
    py::list to_list(const IdBuffer& ids) const {
        constexpr size_t object_ahead = 48;
        constexpr size_t pointer_ahead = 96;
        const size_t count = ids.size();
        py::list list(count);
        PyObject** items = PySequence_Fast_ITEMS(list.ptr());
        const auto put = [&](size_t i) {
            const uint32_t id = ids.data()[i];
            items[i] = id < ints_.size() ? ints_[id].inc_ref().ptr() : PyLong_FromUnsignedLong(id);
            if (!items[i]) throw py::error_already_set();
        };
        size_t i = 0;
        for (; i + pointer_ahead < count; ++i) {
            // An id beyond the table belongs to a special token; prefetching from a wrong address does no harm.
            __builtin_prefetch(ints_.data() + ids.data()[i + pointer_ahead]);
            if (const uint32_t id = ids.data()[i + object_ahead]; id < ints_.size()) {
                __builtin_prefetch(ints_[id].ptr(), 1);
            }
            put(i);
        }
        for (; i < count; ++i) put(i);
        return list;
    }

    std::optional<Pattern> pattern_;
    std::unique_ptr<BpeEncoder> bpe_;
    std::unordered_map<uint32_t, std::string> special_bytes_;
    std::vector<py::int_> ints_;
};

void refuse(const SpecialTokens& disallowed, py::handle text) {
    const std::string_view view = utf8(text);
    if (const auto match = disallowed.find(view, 0)) raise_disallowed(view.substr(match->begin, match->size));
}

// The text between special tokens as str, and the tokens as ids, in order.
py::list split_at(const SpecialTokens& allowed, py::handle text) {
    const std::string_view view = utf8(text);
    py::list parts;
    size_t begin = 0;
    for (auto match = allowed.find(view, 0); match; match = allowed.find(view, begin)) {
        parts.append(py::str(view.data() + begin, match->begin - begin));
        parts.append(match->id);
        begin = match->begin + match->size;
    }
    parts.append(py::str(view.data() + begin, view.size() - begin));
    return parts;
}

py::list pretokenize(const std::string& pattern, const py::bytes& text, const std::string& scanner) {
    const std::string_view bytes = text;
    py::list pieces;
    split(pattern_from_name(pattern), scanner_from_name(scanner), bytes.data(), bytes.size(),
          [&](const char* begin, size_t size) { pieces.append(py::bytes(begin, size)); });
    return pieces;
}

}  // namespace
}  // namespace tokenizer

void bind_tokenizer(py::module_& m) {
    using namespace tokenizer;
    using py::arg;
    m.def("pretokenize", &pretokenize, arg("pattern"), arg("text"), arg("scanner") = "",
          "Pre-tokens of UTF-8 `text` by a pattern's name. `scanner` is avx512, avx2, portable or scalar, for tests; "
          "without one, it is the fastest of this processor.");

    py::class_<SpecialTokens>(m, "SpecialTokens", "A set of strings to find in text, each with its id.")
        .def(py::init<const std::vector<std::pair<std::string, uint32_t>>&>(), arg("tokens"))
        .def("refuse", &refuse, arg("text"), "Raises TokenizerError when `text` holds one of them.")
        .def("split", &split_at, arg("text"), "The text between them as str, and they as ids, in order.");

    py::class_<Encoder>(m, "BpeEncoder", "Byte-pair encoding with a fixed vocabulary.")
        .def(py::init<const py::dict&, const std::optional<std::vector<std::pair<uint32_t, uint32_t>>>&,
                      const std::string&, const py::dict&>(),
             arg("tokens"), arg("merges"), arg("pattern"), arg("special_tokens"))
        .def("encode", &Encoder::encode, arg("text"), arg("allowed"), arg("disallowed"))
        .def("encode_to_numpy", &Encoder::encode_to_numpy, arg("text"), arg("allowed"), arg("disallowed"))
        .def("encode_batch", &Encoder::encode_batch, arg("texts"), arg("allowed"), arg("disallowed"),
             arg("num_threads"))
        .def("encode_piece", &Encoder::encode_piece, arg("piece"))
        .def("decode", &Encoder::decode, arg("ids"))
        .def("offsets", &Encoder::offsets, arg("ids"));

    bind_tokenizer_train(m);
}

}  // namespace fastlm
