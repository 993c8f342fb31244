// Python bindings of the native core. Each area binds itself in its own bindings.cpp.
#include <pybind11/pybind11.h>

namespace fastlm {
void bind_cpu(pybind11::module_& m);
void bind_tokenizer(pybind11::module_& m);
void bind_sentencepiece(pybind11::module_& m);
}  // namespace fastlm

PYBIND11_MODULE(_native, m) {
    m.doc() = "fastlm's native core: tokenizer and CPU kernels. Takes raw pointers and never sees torch.";
    fastlm::bind_cpu(m);
    fastlm::bind_tokenizer(m);
    fastlm::bind_sentencepiece(m);
}
