#include <pybind11/pybind11.h>

namespace fastlm {
void bind_tokenizer(pybind11::module_& m) { (void)m; }
}  // namespace fastlm
