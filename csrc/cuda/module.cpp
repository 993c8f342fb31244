// Python bindings of the CUDA core. Takes raw device pointers and a stream handle; linked to no torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/sampling.hpp"

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address, const char* name) {
    if (address == 0) throw std::invalid_argument(std::string(name) + " has no storage");
    if (address % alignof(T)) throw std::invalid_argument(std::string(name) + " is not aligned to its element size");
    return reinterpret_cast<T*>(address);
}

fastlm::cuda::DType dtype_of(const std::string& name) {
    if (name == "float32") return fastlm::cuda::DType::float32;
    if (name == "bfloat16") return fastlm::cuda::DType::bfloat16;
    if (name == "float16") return fastlm::cuda::DType::float16;
    throw std::invalid_argument("dtype must be float32, bfloat16 or float16, not " + name);
}

void sample(const std::string& dtype, Address logits, int64_t rows, int64_t vocab_size, int64_t stride,
            Address temperature, Address seed, Address position, Address ids, Address valid, Address logprobs,
            Address processed_logprobs, Address stream) {
    if (rows < 0 || rows > std::numeric_limits<int32_t>::max() || vocab_size <= 0 || stride < 0) {
        throw std::invalid_argument("logits must be (rows, vocab_size) with vocab_size > 0 and fewer than 2^31 rows");
    }
    const auto type = dtype_of(dtype);
    if (rows == 0) return;
    fastlm::cuda::Sampling call{};
    call.logits = pointer<const uint16_t>(logits, "logits");
    call.rows = rows, call.vocab_size = vocab_size, call.stride = stride;
    call.temperature = pointer<const float>(temperature, "temperature");
    call.seed = pointer<const int64_t>(seed, "seed"), call.position = pointer<const int64_t>(position, "position");
    call.ids = pointer<int64_t>(ids, "ids"), call.valid = pointer<bool>(valid, "valid");
    if (logprobs) {
        call.logprobs = pointer<float>(logprobs, "logprobs");
        call.processed_logprobs = pointer<float>(processed_logprobs, "processed_logprobs");
    }
    const cudaError_t status = fastlm::cuda::sample(call, type, reinterpret_cast<cudaStream_t>(stream));
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastlm's CUDA core.";
    m.attr("runtime_version") = CUDART_VERSION;
    m.def("sample", &sample, "Draws one token of each row of logits, by temperature alone.");
}
