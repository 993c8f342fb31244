// Bindings of the fused training kernels. Tensors come as addresses, shapes and strides (in elements), checked here
// before any is read.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/cross_entropy.hpp"

namespace py = pybind11;

namespace fastlm {
namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address, const char* name) {
    if (address == 0) throw std::invalid_argument(std::string(name) + " has no storage");
    if (address % alignof(T)) throw std::invalid_argument(std::string(name) + " is not aligned to its element size");
    return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

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
    require(rows >= 0 && vocab_size > 0 && stride >= vocab_size, "logits must be (rows, vocab_size > 0), stride >= vocab_size");
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

}  // namespace

void bind_cpu_fused(py::module_& m) {
    m.def("cross_entropy", &cross_entropy,
          "Loss, log-probability and entropy of rows of logits and, with a scale a row, their gradient in place.");
}

}  // namespace fastlm
