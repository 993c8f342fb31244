#include <pybind11/pybind11.h>

#include "cpu/features.hpp"
#include "cpu/parallel.hpp"

namespace py = pybind11;

namespace fastlm {

void bind_cpu_attention(py::module_& m);
void bind_cpu_decode_attention(py::module_& m);
void bind_cpu_decoder(py::module_& m);
void bind_cpu_fused(py::module_& m);
void bind_cpu_quantized(py::module_& m);
void bind_cpu_sampling(py::module_& m);

void bind_cpu(py::module_& m) {
    m.def(
        "cpu_features",
        [] {
            const cpu::Features& f = cpu::features();
            py::dict d;
            d["avx2"] = f.avx2;
            d["avx512"] = f.avx512;
            d["avx512_vnni"] = f.avx512_vnni;
            d["avx512_bf16"] = f.avx512_bf16;
            d["neon"] = f.neon;
            return d;
        },
        "Instruction sets that the kernels may use on this processor.");
    m.def("use_own_threads", &cpu::use_own_threads,
          "No more loops on the OpenMP runtime's threads: for a process that was forked before this was loaded.");
    bind_cpu_attention(m);
    bind_cpu_decode_attention(m);
    bind_cpu_decoder(m);
    bind_cpu_fused(m);
    bind_cpu_quantized(m);
    bind_cpu_sampling(m);
}

}  // namespace fastlm
