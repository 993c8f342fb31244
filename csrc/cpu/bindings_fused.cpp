// Bindings of the fused training kernels. Tensors come as addresses, shapes and strides (in elements), checked here
// before any is read.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "addresses.hpp"
#include "cpu/cross_entropy.hpp"
#include "cpu/rms_norm.hpp"
#include "cpu/rotary.hpp"
#include "cpu/swiglu.hpp"

namespace py = pybind11;

namespace fastlm {
namespace {

// Calls f with a null pointer of the element type that `dtype` names.
template <class F>
void with_dtype(const std::string& dtype, F&& f) {
    if (dtype == "float32") return f(static_cast<float*>(nullptr));
    if (dtype == "bfloat16") return f(static_cast<cpu::BFloat16*>(nullptr));
    throw std::invalid_argument("dtype must be float32 or bfloat16, not " + dtype);
}

void cross_entropy(const std::string& dtype, Address logits, int64_t rows, int64_t vocab_size, int64_t stride,
                   Address targets, Address scale, Address losses, Address logprobs, Address entropy,
                   int64_t ignore_index, float label_smoothing, float z_loss, float softcap, int num_threads) {
    require(rows >= 0 && vocab_size > 0 && stride >= vocab_size,
            "logits must be (rows, vocab_size), vocab_size > 0, stride >= vocab_size");
    if (rows == 0) return;
    with_dtype(dtype, [&]<class T>(T*) {
        const cpu::CrossEntropy<T> call{
            pointer<T>(logits, "logits"), rows, vocab_size, stride, pointer<const int64_t>(targets, "targets"),
            scale ? pointer<const float>(scale, "scale") : nullptr, pointer<float>(losses, "losses"),
            pointer<float>(logprobs, "logprobs"), pointer<float>(entropy, "entropy"), ignore_index, label_smoothing,
            z_loss, softcap};
        py::gil_scoped_release release;
        cpu::cross_entropy(call, num_threads);
    });
}

void swiglu_forward(const std::string& dtype, Address gate, Address up, Address y, int64_t rows, int64_t columns,
                    int64_t gate_stride, int64_t up_stride, bool gelu, int num_threads) {
    require(rows >= 0 && columns >= 0, "rows and columns must not be negative");
    if (rows == 0 || columns == 0) return;
    with_dtype(dtype, [&]<class T>(T*) {
        cpu::SwiGLU<T> call{};
        call.gate = pointer<const T>(gate, "gate"), call.up = pointer<const T>(up, "up"), call.y = pointer<T>(y, "y");
        call.rows = rows, call.columns = columns, call.gate_stride = gate_stride, call.up_stride = up_stride;
        call.gelu = gelu;
        py::gil_scoped_release release;
        cpu::swiglu_forward(call, num_threads);
    });
}

void swiglu_backward(const std::string& dtype, Address grad_y, Address gate, Address up, Address grad_gate,
                     Address grad_up, int64_t rows, int64_t columns, int64_t grad_y_stride, int64_t gate_stride,
                     int64_t up_stride, bool gelu, int num_threads) {
    require(rows >= 0 && columns >= 0, "rows and columns must not be negative");
    if (rows == 0 || columns == 0) return;
    with_dtype(dtype, [&]<class T>(T*) {
        cpu::SwiGLU<T> call{};
        call.gate = pointer<const T>(gate, "gate"), call.up = pointer<const T>(up, "up");
        call.grad_y = pointer<const T>(grad_y, "grad_y");
        call.grad_gate = pointer<T>(grad_gate, "grad_gate"), call.grad_up = pointer<T>(grad_up, "grad_up");
        call.rows = rows, call.columns = columns, call.grad_y_stride = grad_y_stride;
        call.gate_stride = gate_stride, call.up_stride = up_stride, call.gelu = gelu;
        py::gil_scoped_release release;
        cpu::swiglu_backward(call, num_threads);
    });
}

void rms_norm_forward(const std::string& dtype, Address x, Address residual, Address weight, Address y, Address h,
                      Address rstd, int64_t rows, int64_t hidden_size, int64_t x_stride, int64_t residual_stride,
                      float eps, int num_threads) {
    require(rows >= 0 && hidden_size >= 0, "rows and hidden_size must not be negative");
    if (rows == 0 || hidden_size == 0) return;
    with_dtype(dtype, [&]<class T>(T*) {
        cpu::RMSNormForward<T> call{};
        call.x = pointer<const T>(x, "x"), call.weight = pointer<const float>(weight, "weight");
        call.y = pointer<T>(y, "y"), call.rstd = pointer<float>(rstd, "rstd");
        if (residual) call.residual = pointer<const T>(residual, "residual"), call.h = pointer<T>(h, "h");
        call.rows = rows, call.hidden_size = hidden_size, call.eps = eps;
        call.x_stride = x_stride, call.residual_stride = residual_stride;
        py::gil_scoped_release release;
        cpu::rms_norm_forward(call, num_threads);
    });
}

void rms_norm_backward(const std::string& dtype, Address grad_y, Address grad_h, Address h, Address weight,
                       Address rstd, Address grad_x, Address partial, int64_t partials, int64_t rows,
                       int64_t hidden_size, int64_t grad_y_stride, int64_t grad_h_stride, int64_t h_stride,
                       int num_threads) {
    require(rows >= 0 && hidden_size >= 0, "rows and hidden_size must not be negative");
    require(partials == cpu::rms_norm_partials(rows), "partial must have rms_norm_partials(rows) rows");
    if (rows == 0 || hidden_size == 0) return;
    with_dtype(dtype, [&]<class T>(T*) {
        cpu::RMSNormBackward<T> call{};
        call.grad_y = pointer<const T>(grad_y, "grad_y"), call.h = pointer<const T>(h, "h");
        if (grad_h) call.grad_h = pointer<const T>(grad_h, "grad_h");
        call.weight = pointer<const float>(weight, "weight"), call.rstd = pointer<const float>(rstd, "rstd");
        call.grad_x = pointer<T>(grad_x, "grad_x"), call.partial = pointer<float>(partial, "partial");
        call.rows = rows, call.hidden_size = hidden_size, call.grad_y_stride = grad_y_stride;
        call.grad_h_stride = grad_h_stride, call.h_stride = h_stride;
        py::gil_scoped_release release;
        cpu::rms_norm_backward(call, num_threads);
    });
}

using Shape = std::array<int64_t, 4>;    // batch, seq, heads, head_dim
using Strides = std::array<int64_t, 3>;  // of batch, seq and heads

void rotary(const std::string& dtype, Address x, Address y, const Shape& shape, const Strides& strides, Address cos,
            Address sin, int64_t max_positions, int64_t half, Address positions,
            const std::array<int64_t, 2>& positions_strides, bool interleaved, bool inverse, int num_threads) {
    const auto [batch, seq, heads, head_dim] = shape;
    require(batch >= 0 && seq >= 0 && heads >= 0 && half >= 0 && 2 * half <= head_dim, "x does not fit the tables");
    if (batch * seq * heads * head_dim == 0) return;
    if (positions) {
        const int64_t* at = pointer<const int64_t>(positions, "positions");
        for (int64_t b = 0; b < (positions_strides[0] ? batch : 1); ++b) {
            for (int64_t s = 0; s < seq; ++s) {
                const int64_t position = at[b * positions_strides[0] + s * positions_strides[1]];
                require(position >= 0 && position < max_positions, "a position lies outside the tables");
            }
        }
    } else {
        require(seq <= max_positions, "the sequence is longer than the tables");
    }
    with_dtype(dtype, [&]<class T>(T*) {
        cpu::Rotary<T> call{};
        call.x = pointer<const T>(x, "x"), call.y = pointer<T>(y, "y");
        call.batch = batch, call.seq = seq, call.heads = heads, call.head_dim = head_dim;
        call.batch_stride = strides[0], call.seq_stride = strides[1], call.head_stride = strides[2];
        if (half) call.cos = pointer<const float>(cos, "cos"), call.sin = pointer<const float>(sin, "sin");
        call.half = half, call.sign = inverse ? -1.0f : 1.0f, call.interleaved = interleaved;
        if (positions) call.positions = pointer<const int64_t>(positions, "positions");
        call.positions_batch_stride = positions_strides[0], call.positions_seq_stride = positions_strides[1];
        py::gil_scoped_release release;
        cpu::rotary(call, num_threads);
    });
}

}  // namespace

void bind_cpu_fused(py::module_& m) {
    m.def("cross_entropy", &cross_entropy,
          "Loss, log-probability and entropy of rows of logits and, with a scale a row, their gradient in place.");
    m.def("swiglu_forward", &swiglu_forward, "act(gate) * up over rows of contiguous elements.");
    m.def("swiglu_backward", &swiglu_backward, "Gradients of act(gate) * up.");
    m.def("rms_norm_forward", &rms_norm_forward, "RMSNorm of x, or of x + residual, and 1 / root mean square.");
    m.def("rms_norm_backward", &rms_norm_backward, "Gradient in x, and partial sums of that in weight.");
    m.def("rms_norm_partials", &cpu::rms_norm_partials, "How many partial sums rms_norm_backward makes.");
    m.def("rotary", &rotary, "Rotates the heads of x by position.");
}

}  // namespace fastlm
