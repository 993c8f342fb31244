// Binding of the decoder. Tensors come as addresses, which stay valid as long as the decoder is used; shapes, positions,
// slots and block tables are checked here before any is read.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "addresses.hpp"
#include "cpu/decode_attention.hpp"
#include "cpu/decoder.hpp"
#include "cpu/quantized_linear.hpp"

namespace py = pybind11;

namespace fastlm {
namespace {

using Weights = std::tuple<std::string, Address, std::array<int64_t, 3>, Address>;  // shape and stride; bias
using Pair = std::array<Address, cpu::kPools>;  // one for each pool
using Group = std::tuple<int64_t, int64_t, int64_t, int64_t, Pair, Address>;
using Table = std::tuple<Address, Address, int64_t>;  // cos, sin, positions

template <class T, class C>
class Decoder {
   public:
    Decoder(int64_t hidden_size, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t intermediate_size,
            const std::array<int64_t, cpu::kPools>& blocks, int64_t block_size, float eps, float scale, float softcap,
            bool gelu, Address norm) {
        require(hidden_size > 0 && intermediate_size > 0 && head_dim > 0, "sizes must be positive");
        require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "heads must be a multiple of kv_heads");
        require(blocks[0] > 0 && blocks[1] >= 0 && block_size > 0, "the cache must have blocks");
        decoder_.shape = {hidden_size, heads, kv_heads, head_dim, intermediate_size, blocks, block_size, eps, scale,
                          softcap, gelu};
        decoder_.norm = pointer<const float>(norm, "norm");
    }

    // norms: input, q, k, after attention, before the MLP, after it; 0 where there is none.
    void add_layer(const std::array<Address, 6>& norms, const std::array<Weights, 7>& weights, int64_t window,
                   int64_t table, Address keys, Address values, bool windowed) {
        const cpu::DecoderShape& shape = decoder_.shape;
        const int64_t hidden = shape.hidden_size, inner = shape.intermediate_size;
        const int64_t q = shape.heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
        require(window >= 0 && table >= -1, "window and table must not be negative");
        require(!windowed || (window > 0 && shape.blocks[1] > 0), "a windowed layer must have a window, and blocks");
        require((norms[1] == 0) == (norms[2] == 0), "queries and keys must both have a norm, or neither");
        require(table == -1 || shape.head_dim % 2 == 0, "head_dim must be even to be rotated");
        cpu::DecoderLayer<C> layer{};
        const float** to[] = {&layer.input_norm,     &layer.q_norm,   &layer.k_norm,
                              &layer.attention_norm, &layer.mlp_norm, &layer.output_norm};
        for (int i = 0; i < 6; ++i) *to[i] = optional_pointer<const float>(norms[i], "norm");
        layer.q = projection(weights[0], q, hidden), layer.k = projection(weights[1], kv, hidden);
        layer.v = projection(weights[2], kv, hidden), layer.o = projection(weights[3], hidden, q);
        layer.gate = projection(weights[4], inner, hidden), layer.up = projection(weights[5], inner, hidden);
        layer.down = projection(weights[6], hidden, inner);
        layer.window = window, layer.table = table, layer.pool = windowed;
        layer.keys = pointer<C>(keys, "keys"), layer.values = pointer<C>(values, "values");
        decoder_.layers.push_back(layer);
    }

    // slots and block tables: of both pools; those of a pool without blocks are not looked at.
    void run(int64_t rows, Address hidden, Address positions, const Pair& slots, const std::vector<Group>& groups,
             const std::vector<Table>& tables, Address out, int num_threads) const {
        const cpu::DecoderShape& shape = decoder_.shape;
        const int pools = shape.blocks[1] > 0 ? 2 : 1;
        require(rows > 0, "a step must have rows");
        const auto position = copied<int64_t>(positions, rows, "positions");
        std::array<std::vector<int64_t>, cpu::kPools> slot;
        std::vector<std::vector<int32_t>> numbers;
        cpu::DecoderStep<T> step{rows, pointer<const T>(hidden, "hidden"), position.data(), {}, {}, {},
                                 pointer<T>(out, "out")};
        int64_t length = INT64_MAX, covered = 0;
        for (const auto& [cos, sin, its_length] : tables) {
            step.tables.push_back({pointer<const float>(cos, "cos"), pointer<const float>(sin, "sin")});
            length = std::min(length, its_length);
        }
        for (const cpu::DecoderLayer<C>& layer : decoder_.layers) {
            require(layer.table < static_cast<int64_t>(tables.size()), "a layer's rotary table is missing");
        }
        for (int64_t row = 0; row < rows; ++row) {
            require(position[row] >= 0 && position[row] < length, "a position lies outside the rotary tables");
        }
        for (int pool = 0; pool < pools; ++pool) {
            slot[pool] = copied<int64_t>(slots[pool], rows, "slots");
            step.slots[pool] = slot[pool].data();
            for (const int64_t its_slot : slot[pool]) {
                require(its_slot >= 0 && its_slot < shape.blocks[pool] * shape.block_size,
                        "a slot lies outside the cache");
            }
        }
        for (const auto& [first_row, size, query_len, max_blocks, its_tables, lengths] : groups) {
            require(first_row == covered && size > 0 && query_len > 0 && size <= rows && query_len <= rows,
                    "groups must follow each other");
            require(max_blocks >= 0 && max_blocks <= shape.blocks[0], "block_table is wider than the cache has blocks");
            covered += size * query_len;
            require(covered <= rows, "groups must have as many rows as the step");
            numbers.push_back(copied<int32_t>(lengths, size, "context_lens"));
            cpu::DecoderGroup group{first_row, size, query_len, max_blocks, {}, numbers.back().data()};
            for (int pool = 0; pool < pools; ++pool) {
                numbers.push_back(copied<int32_t>(its_tables[pool], size * max_blocks, "block_table"));
                group.block_tables[pool] = numbers.back().data();
                cpu::check_block_table({size, query_len, shape.heads, shape.kv_heads, shape.head_dim,
                                        shape.blocks[pool], shape.block_size, max_blocks},
                                       group.block_tables[pool], group.context_lens, 0);
            }
            step.groups.push_back(group);
        }
        require(covered == rows, "groups must have as many rows as the step");
        py::gil_scoped_release release;
        decoder_.run(step, num_threads);
    }

   private:
    cpu::Decoder<T, C> decoder_;

    static cpu::Projection projection(const Weights& weights, int64_t out_features, int64_t in_features) {
        const auto& [quantization, address, shape, bias] = weights;
        require(shape[0] == out_features && shape[1] == in_features, "a projection does not fit the decoder's sizes");
        cpu::Projection made{quantization, nullptr, out_features, in_features, shape[2], nullptr};
        made.bias = optional_pointer<const float>(bias, "bias");
        int64_t row_bytes = in_features * static_cast<int64_t>(sizeof(T));
        if (quantization.empty()) {
            made.weight = pointer<const T>(address, "weight");
            require(shape[2] % sizeof(T) == 0, "rows of weight must be aligned to their elements");
        } else {
            const cpu::BlockFormat format = cpu::block_format(quantization);
            require(in_features % format.block_size == 0, "in_features must be a multiple of the format's block size");
            row_bytes = in_features / format.block_size * format.block_bytes;
            made.weight = pointer<const uint8_t>(address, "weight");
        }
        require(shape[2] >= row_bytes, "rows of weight must not overlap");
        return made;
    }
};

template <class T, class C>
void bind(py::module_& m, const char* name) {
    py::class_<Decoder<T, C>>(m, name, "All layers of a transformer over the few new tokens of a decoding step.")
        .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, const std::array<int64_t, cpu::kPools>&, int64_t, float,
                      float, float, bool, Address>(),
             py::kw_only(), py::arg("hidden_size"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
             py::arg("intermediate_size"), py::arg("blocks"), py::arg("block_size"), py::arg("eps"), py::arg("scale"),
             py::arg("softcap"), py::arg("gelu"), py::arg("norm"))
        .def("add_layer", &Decoder<T, C>::add_layer)
        .def("run", &Decoder<T, C>::run);
}

}  // namespace

void bind_cpu_decoder(py::module_& m) {
    bind<float, float>(m, "DecoderFloat32");
    bind<float, cpu::Float16>(m, "DecoderFloat32CacheFloat16");
    bind<cpu::BFloat16, cpu::BFloat16>(m, "DecoderBFloat16");
}

}  // namespace fastlm
