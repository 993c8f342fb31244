// Python bindings of the SentencePiece encoder. Sections of text come as str, ids that stand between them as int.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "tokenizer/sentencepiece.hpp"
#include "tokenizer/threads.hpp"

namespace py = pybind11;

namespace fastlm {
namespace tokenizer {
namespace {

constexpr size_t kReleaseGilBytes = 512;  // encoding less takes less time than handing the GIL over and back

// Sections and ids of one text; `size` is the number of bytes. Valid while the Python objects live.
struct Parts {
    std::vector<std::variant<std::string_view, uint32_t>> items;
    size_t size = 0;
};

Parts parts_of(const py::list& list) {
    Parts parts;
    parts.items.reserve(list.size());
    for (const py::handle item : list) {
        if (PyUnicode_Check(item.ptr())) {
            Py_ssize_t size = 0;
            const char* data = PyUnicode_AsUTF8AndSize(item.ptr(), &size);
            if (!data) throw py::error_already_set();
            parts.items.emplace_back(std::string_view(data, static_cast<size_t>(size)));
            parts.size += static_cast<size_t>(size);
        } else {
            parts.items.emplace_back(py::cast<uint32_t>(item));
        }
    }
    return parts;
}

// What building takes is several times what is kept, and malloc holds on to what is freed of it.
void give_back_memory() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

// `pieces` gives (bytes, id), one at a time: a str would keep the UTF-8 that is asked of it, beside itself.
std::vector<std::pair<std::string, uint32_t>> list_of(const py::iterable& pieces) {
    std::vector<std::pair<std::string, uint32_t>> list;
    for (const py::handle item : pieces) list.push_back(py::cast<std::pair<std::string, uint32_t>>(item));
    return list;
}

// Pieces by id and ids by piece.
class PieceTable {
public:
    explicit PieceTable(const py::iterable& pieces) : vocabulary_(list_of(pieces)) {}

    std::optional<uint32_t> find(const py::bytes& piece) const {
        const uint32_t id = vocabulary_.find(std::string_view(piece));
        return id == Vocabulary::kNone ? std::nullopt : std::optional(id);
    }

    std::optional<py::bytes> piece(int64_t id) const {
        if (id < 0 || id > kMaxId || !vocabulary_.has(static_cast<uint32_t>(id))) return std::nullopt;
        const std::string_view bytes = vocabulary_.bytes(static_cast<uint32_t>(id));
        return py::bytes(bytes.data(), bytes.size());
    }

    size_t num_ids() const { return vocabulary_.num_ids(); }

private:
    Vocabulary vocabulary_;
};

class SectionEncoder {
public:
    SectionEncoder(const py::iterable& pieces, const std::optional<std::vector<std::pair<uint32_t, uint32_t>>>& merges,
            const std::optional<std::vector<float>>& scores, const std::vector<std::optional<uint32_t>>& byte_ids,
            std::optional<uint32_t> unknown, bool fuse_unknown, bool space_is_meta, bool split_at_meta) {
        SentencePieceEncoder::Options options;
        if (byte_ids.size() != 256) throw py::value_error("byte_ids must have 256 items");
        for (size_t i = 0; i < 256; ++i) options.byte_ids[i] = byte_ids[i].value_or(SentencePieceEncoder::kNone);
        options.unknown = unknown.value_or(SentencePieceEncoder::kNone);
        options.fuse_unknown = fuse_unknown;
        options.space_is_meta = space_is_meta;
        options.split_at_meta = split_at_meta;
        const bool has_bytes = std::none_of(byte_ids.begin(), byte_ids.end(), [](const auto& id) { return !id; });
        if (!has_bytes && !unknown) throw py::value_error("there is neither an unknown token nor one for each byte");
        const std::vector<std::pair<std::string, uint32_t>> list = list_of(pieces);
        if (merges.has_value() == scores.has_value()) throw py::value_error("give either merges or scores");
        const py::gil_scoped_release release;
        if (merges) {
            encoder_ = std::make_unique<SentencePieceEncoder>(list, *merges, options);
        } else {
            encoder_ = std::make_unique<SentencePieceEncoder>(list, *scores, options);
        }
    }

    py::list encode(const py::list& list) { return to_list(ids_of(parts_of(list))); }

    py::array_t<uint32_t> encode_to_numpy(const py::list& list) const {
        const IdBuffer ids = ids_of(parts_of(list));
        return py::array_t<uint32_t>(static_cast<py::ssize_t>(ids.size()), ids.data());
    }

    py::list encode_batch(const std::vector<py::list>& lists, size_t num_threads) {
        std::vector<Parts> texts;
        for (const py::list& list : lists) texts.push_back(parts_of(list));
        std::vector<IdBuffer> results(texts.size());
        {
            const py::gil_scoped_release release;
            for_each_on_threads(texts.size(), num_threads, [&](size_t i) { append(texts[i], results[i]); });
        }
        py::list found(results.size());
        for (size_t i = 0; i < results.size(); ++i) found[i] = to_list(results[i]);
        return found;
    }

    std::vector<std::tuple<uint32_t, uint32_t, uint32_t>> merges() const { return encoder_->reachable_merges(); }

private:
    void append(const Parts& parts, IdBuffer& ids) const {
        ids.reserve(parts.size / 3 + parts.items.size() + 8);
        for (const auto& item : parts.items) {
            if (const auto* text = std::get_if<std::string_view>(&item)) {
                encoder_->encode(*text, ids);
            } else {
                ids.push(std::get<uint32_t>(item));
            }
        }
    }

    IdBuffer ids_of(const Parts& parts) const {
        IdBuffer ids;
        if (parts.size < kReleaseGilBytes) {
            append(parts, ids);
        } else {
            const py::gil_scoped_release release;
            append(parts, ids);
        }
        return ids;
    }

    // Ids repeat, and taking a reference is cheaper than making an int.
    py::list to_list(const IdBuffer& ids) {
        ints_.resize(encoder_->num_ids());
        py::list list(ids.size());
        for (size_t i = 0; i < ids.size(); ++i) {
            const uint32_t id = ids.data()[i];
            py::object value = id < ints_.size() ? ints_[id] : py::object();
            if (!value) {
                value = py::int_(id);
                if (id < ints_.size()) ints_[id] = value;
            }
            PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), value.release().ptr());
        }
        return list;
    }

    std::unique_ptr<SentencePieceEncoder> encoder_;
    std::vector<py::object> ints_;  // by id, those that were given out before
};

}  // namespace
}  // namespace tokenizer

void bind_sentencepiece(py::module_& m) {
    using tokenizer::PieceTable;
    using tokenizer::SectionEncoder;
    using py::arg;
    py::class_<PieceTable>(m, "PieceTable", "Pieces, as bytes, by id and ids by piece.")
        .def(py::init<const py::iterable&>(), arg("pieces"))
        .def("find", &PieceTable::find, arg("piece"))
        .def("piece", &PieceTable::piece, arg("id"))
        .def("num_ids", &PieceTable::num_ids);
    m.def("give_back_memory", &tokenizer::give_back_memory, "Returns what malloc holds unused to the system.");
    py::class_<SectionEncoder>(m, "SentencePieceEncoder", "SentencePiece's byte-pair encoding with a fixed vocabulary.")
        .def(py::init<const py::iterable&, const std::optional<std::vector<std::pair<uint32_t, uint32_t>>>&,
                      const std::optional<std::vector<float>>&, const std::vector<std::optional<uint32_t>>&,
                      std::optional<uint32_t>, bool, bool, bool>(),
             arg("pieces"), arg("merges"), arg("scores"), arg("byte_ids"), arg("unknown"), arg("fuse_unknown"),
             arg("space_is_meta"), arg("split_at_meta"))
        .def("encode", &SectionEncoder::encode, arg("parts"))
        .def("encode_to_numpy", &SectionEncoder::encode_to_numpy, arg("parts"))
        .def("merges", &SectionEncoder::merges, "(left, right, priority) of the merges that can happen.")
        .def("encode_batch", &SectionEncoder::encode_batch, arg("texts"), arg("num_threads"));
}

}  // namespace fastlm
