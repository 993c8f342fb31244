// Python bindings of the CUDA core. Takes raw device pointers and a stream handle; linked to no torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "addresses.hpp"
#include "cuda/sampling.hpp"
#include "philox.hpp"

namespace {

using fastlm::Address;
using fastlm::optional_pointer;
using fastlm::pointer;

fastlm::cuda::DType dtype_of(const std::string& name) {
    if (name == "float32") return fastlm::cuda::DType::float32;
    if (name == "bfloat16") return fastlm::cuda::DType::bfloat16;
    if (name == "float16") return fastlm::cuda::DType::float16;
    throw std::invalid_argument("dtype must be float32, bfloat16 or float16, not " + name);
}

void sample(const std::string& dtype, Address logits, int64_t rows, int64_t vocab_size, int64_t stride,
            Address temperature, Address top_k, Address top_p, Address min_p, bool min_p_first, Address seed,
            Address position, Address ids, Address valid, Address logprobs, Address processed_logprobs,
            Address stream) {
    if (rows < 0 || rows > std::numeric_limits<int32_t>::max() || vocab_size <= 0 || vocab_size > (1 << 30) ||
        stride < 0) {
        throw std::invalid_argument("logits must be (rows, vocab_size) with 0 < vocab_size <= 2^30 and rows < 2^31");
    }
    const auto type = dtype_of(dtype);
    if (rows == 0) return;
    fastlm::cuda::Sampling call{};
    call.logits = type == fastlm::cuda::DType::float32 ? static_cast<const void*>(pointer<const float>(logits, "logits"))
                                                       : pointer<const uint16_t>(logits, "logits");
    call.rows = rows, call.stride = stride, call.vocab_size = static_cast<int32_t>(vocab_size);
    call.temperature = pointer<const float>(temperature, "temperature");
    call.top_k = optional_pointer<const int64_t>(top_k, "top_k");
    call.top_p = optional_pointer<const float>(top_p, "top_p"), call.min_p = optional_pointer<const float>(min_p, "min_p");
    call.min_p_first = min_p_first;
    call.seed = pointer<const int64_t>(seed, "seed"), call.position = pointer<const int64_t>(position, "position");
    call.ids = pointer<int64_t>(ids, "ids"), call.valid = pointer<bool>(valid, "valid");
    if (logprobs) {
        call.logprobs = pointer<float>(logprobs, "logprobs");
        call.processed_logprobs = pointer<float>(processed_logprobs, "processed_logprobs");
    }
    const cudaError_t status = fastlm::cuda::sample(call, type, reinterpret_cast<cudaStream_t>(stream));
    if (status != cudaSuccess) {
        const pybind11::object error = pybind11::module_::import("fastlm.errors").attr("BackendError");
        pybind11::set_error(error, (std::string("CUDA: ") + cudaGetErrorString(status)).c_str());
        throw pybind11::error_already_set();
    }
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastlm's CUDA core.";
    m.attr("runtime_version") = CUDART_VERSION;
    m.attr("archs") = pybind11::cast(fastlm::cuda::built_archs());
    m.def("sample", &sample, "Draws one token of each row of logits: temperature, top-k, top-p, min-p.");
    m.def("uniform", [](int64_t seed, int64_t position) {
        return fastlm::uniform(static_cast<uint64_t>(seed), static_cast<uint64_t>(position));
    }, "The number in [0, 1) that `sample` draws by.");
}
