// Binding of the quantized linear layer. Tensors come as addresses, shapes and strides, checked here before any is read.
#include <pybind11/pybind11.h>

#include <string>

#include "addresses.hpp"
#include "cpu/quantized_linear.hpp"

namespace py = pybind11;

namespace fastlm {
namespace {

template <class T>
void quantized_linear(const std::string& quantization, Address x, int64_t rows, int64_t in_features, int64_t x_stride,
                      Address weight, int64_t out_features, int64_t weight_stride, Address bias, Address y,
                      int num_threads) {
    const cpu::BlockFormat format = cpu::block_format(quantization);
    require(rows >= 0 && in_features >= 0 && out_features >= 0, "shapes must not be negative");
    require(in_features % format.block_size == 0, "in_features must be a multiple of the format's block size");
    require(weight_stride >= in_features / format.block_size * format.block_bytes, "rows of weight must not overlap");
    if (rows == 0 || out_features == 0) return;
    cpu::QuantizedLinear<T> call{};
    call.x = in_features ? pointer<const T>(x, "x") : nullptr;
    call.rows = rows, call.in_features = in_features, call.x_stride = x_stride;
    call.weight = in_features ? pointer<const uint8_t>(weight, "weight") : nullptr;
    call.out_features = out_features, call.weight_stride = weight_stride;
    if (bias) call.bias = pointer<const float>(bias, "bias");
    call.y = pointer<T>(y, "y");
    py::gil_scoped_release release;
    cpu::quantized_linear(call, quantization, num_threads);
}

}  // namespace

void bind_cpu_quantized(py::module_& m) {
    m.def("quantized_linear_float32", &quantized_linear<float>, "Linear layer of fp32 rows over blocks of weights.");
    m.def("quantized_linear_bfloat16", &quantized_linear<cpu::BFloat16>,
          "Linear layer of bf16 rows over blocks of weights.");
}

}  // namespace fastlm
