// Binding of decode attention. Tensors come as addresses, shapes and strides (in elements); they, the lengths and the
// entries of the table that will be used are checked here before any is read.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "addresses.hpp"
#include "cpu/decode_attention.hpp"

namespace py = pybind11;

namespace fastlm {
namespace {

cpu::FloatType float_type(const std::string& dtype) {
    if (dtype == "float32") return cpu::FloatType::kFloat32;
    if (dtype == "bfloat16") return cpu::FloatType::kBFloat16;
    if (dtype == "float16") return cpu::FloatType::kFloat16;
    throw std::invalid_argument("q must be float32, bfloat16 or float16, not " + dtype);
}

template <class C>
void decode_attention(const std::string& q_dtype, Address q, const std::array<int64_t, 4>& q_shape,
                      const std::array<int64_t, 3>& q_strides, Address k, Address v,
                      const std::array<int64_t, 3>& cache_shape, const std::array<int64_t, 3>& k_strides,
                      const std::array<int64_t, 3>& v_strides, Address block_table, int64_t max_blocks,
                      Address context_lens, float scale, int64_t window, float softcap, Address out, int num_threads) {
    cpu::DecodeAttention<C> call{};
    cpu::DecodeShape& shape = call.shape;
    shape.batch = q_shape[0], shape.query_len = q_shape[1], shape.heads = q_shape[2], shape.head_dim = q_shape[3];
    shape.blocks = cache_shape[0], shape.block_size = cache_shape[1], shape.kv_heads = cache_shape[2];
    shape.max_blocks = max_blocks;
    require(shape.batch >= 0 && shape.query_len > 0 && shape.head_dim >= 0, "q must be (batch, query_len, heads, head_dim)");
    require(shape.blocks >= 0 && shape.block_size > 0, "caches must be (blocks, block_size, kv_heads, head_dim)");
    require(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0, "heads must be a multiple of kv_heads");
    require(max_blocks >= 0 && max_blocks <= (int64_t{1} << 31) && shape.block_size <= (int64_t{1} << 31) && window >= 0,
            "max_blocks, block_size and window must not be negative, nor huge");
    call.type = float_type(q_dtype);
    if (shape.batch == 0 || shape.heads == 0 || shape.head_dim == 0) return;
    call.strides = {q_strides[0], q_strides[1], q_strides[2], k_strides[0], k_strides[1],
                    k_strides[2], v_strides[0], v_strides[1], v_strides[2]};
    // Copies, so that what was checked is what is used, whatever another thread does to the tensors meanwhile.
    const std::vector<int32_t> lengths = copied<int32_t>(context_lens, shape.batch, "context_lens");
    const std::vector<int32_t> table = copied<int32_t>(block_table, shape.batch * max_blocks, "block_table");
    call.context_lens = lengths.data(), call.block_table = table.data();
    cpu::check_block_table(shape, call.block_table, call.context_lens, window);
    call.q = pointer<const char>(q, "q"), call.out = pointer<char>(out, "out");
    if (shape.blocks) call.k = pointer<const C>(k, "k_cache"), call.v = pointer<const C>(v, "v_cache");
    call.scale = scale, call.window = window, call.softcap = softcap;
    py::gil_scoped_release release;
    cpu::decode_attention(call, num_threads);
}

}  // namespace

void bind_cpu_decode_attention(py::module_& m) {
    m.def("decode_attention_float32", &decode_attention<float>, "Decode attention over fp32 caches.");
    m.def("decode_attention_bfloat16", &decode_attention<cpu::BFloat16>, "Decode attention over bf16 caches.");
    m.def("decode_attention_float16", &decode_attention<cpu::Float16>, "Decode attention over fp16 caches.");
}

}  // namespace fastlm
