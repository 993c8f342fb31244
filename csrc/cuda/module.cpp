// Python bindings of the CUDA core. Takes raw device pointers and a stream handle; linked to no torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastlm's CUDA core.";
    m.attr("runtime_version") = CUDART_VERSION;
}
