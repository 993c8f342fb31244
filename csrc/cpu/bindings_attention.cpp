// Bindings of attention over whole sequences. Tensors come as addresses, shapes and strides (in elements), checked here
// before any is read.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "addresses.hpp"
#include "cpu/attention.hpp"

namespace py = pybind11;

namespace fastlm {
namespace {

using Shape = std::array<int64_t, 6>;    // batch, seq_q, seq_k, heads, kv_heads, head_dim
using Spans = std::vector<std::array<int64_t, 4>>;  // of each packed sequence: first query, end, first key, end
using Strides = std::array<int64_t, 3>;  // of batch, seq and heads

template <class F>
void with_dtype(const std::string& dtype, F&& f) {
    if (dtype == "float32") return f(static_cast<float*>(nullptr));
    if (dtype == "bfloat16") return f(static_cast<cpu::BFloat16*>(nullptr));
    throw std::invalid_argument("dtype must be float32 or bfloat16, not " + dtype);
}

cpu::AttentionShape checked(const Shape& shape, bool causal, int64_t window, float scale) {
    for (const int64_t size : shape) require(size > 0, "every size must be positive");
    const auto [batch, seq_q, seq_k, heads, kv_heads, head_dim] = shape;
    require(heads % kv_heads == 0, "heads must be a multiple of kv_heads");
    require(window >= 0, "window must not be negative");
    return {batch, seq_q, seq_k, heads, kv_heads, head_dim, causal, window, scale};
}

template <class T>
cpu::Heads<T> heads(Address address, const Strides& strides, const char* name) {
    return {pointer<T>(address, name), strides[0], strides[1], strides[2]};
}

std::vector<cpu::Sequence> checked(const Spans& spans, const cpu::AttentionShape& shape) {
    require(shape.batch == 1, "packed sequences lie in a batch of one");
    std::vector<cpu::Sequence> sequences;
    sequences.reserve(spans.size());
    for (const auto& [begin_q, end_q, begin_k, end_k] : spans) {
        require(0 <= begin_q && begin_q <= end_q && end_q <= shape.seq_q, "a sequence's queries leave the tensor");
        require(0 <= begin_k && begin_k <= end_k && end_k <= shape.seq_k, "a sequence's keys leave the tensor");
        sequences.push_back({begin_q, end_q - begin_q, begin_k, end_k - begin_k});
    }
    return sequences;
}

void forward(const std::string& dtype, const Shape& shape, bool causal, int64_t window, float scale, Address q,
             const Strides& q_strides, Address k, const Strides& k_strides, Address v, const Strides& v_strides,
             Address out, const Strides& out_strides, Address lse, int num_threads, const std::optional<Spans>& packed) {
    const cpu::AttentionShape sizes = checked(shape, causal, window, scale);
    const auto sequences = packed ? checked(*packed, sizes) : std::vector<cpu::Sequence>();
    with_dtype(dtype, [&]<class T>(T*) {
        const cpu::AttentionForward<T> call{sizes,
                                            heads<const T>(q, q_strides, "q"),
                                            heads<const T>(k, k_strides, "k"),
                                            heads<const T>(v, v_strides, "v"),
                                            heads<T>(out, out_strides, "out"),
                                            pointer<float>(lse, "lse"),
                                            sizes.heads * sizes.seq_q,
                                            sizes.seq_q};
        py::gil_scoped_release release;
        packed ? cpu::attention_forward(call, sequences, num_threads) : cpu::attention_forward(call, num_threads);
    });
}

void backward(const std::string& dtype, const Shape& shape, bool causal, int64_t window, float scale, Address q,
              const Strides& q_strides, Address k, const Strides& k_strides, Address v, const Strides& v_strides,
              Address out, const Strides& out_strides, Address grad_out, const Strides& grad_out_strides, Address lse,
              Address grad_lse, Address grad_q, const Strides& grad_q_strides, Address grad_k,
              const Strides& grad_k_strides, Address grad_v, const Strides& grad_v_strides, int num_threads,
              const std::optional<Spans>& packed) {
    const cpu::AttentionShape sizes = checked(shape, causal, window, scale);
    const auto sequences = packed ? checked(*packed, sizes) : std::vector<cpu::Sequence>();
    with_dtype(dtype, [&]<class T>(T*) {
        const cpu::AttentionBackward<T> call{sizes,
                                             heads<const T>(q, q_strides, "q"),
                                             heads<const T>(k, k_strides, "k"),
                                             heads<const T>(v, v_strides, "v"),
                                             heads<const T>(out, out_strides, "out"),
                                             heads<const T>(grad_out, grad_out_strides, "grad_out"),
                                             pointer<const float>(lse, "lse"),
                                             optional_pointer<const float>(grad_lse, "grad_lse"),
                                             sizes.heads * sizes.seq_q,
                                             sizes.seq_q,
                                             heads<T>(grad_q, grad_q_strides, "grad_q"),
                                             heads<T>(grad_k, grad_k_strides, "grad_k"),
                                             heads<T>(grad_v, grad_v_strides, "grad_v")};
        py::gil_scoped_release release;
        packed ? cpu::attention_backward(call, sequences, num_threads) : cpu::attention_backward(call, num_threads);
    });
}

}  // namespace

void bind_cpu_attention(py::module_& m) {
    m.def("attention_forward", &forward, "Attention over whole sequences, and its log-sum-exp.");
    m.def("attention_backward", &backward, "Gradients of attention over whole sequences.");
}

}  // namespace fastlm
