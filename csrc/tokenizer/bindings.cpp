#include <pybind11/pybind11.h>

namespace fastlm {

void bind_tokenizer_train(pybind11::module_& m);

void bind_tokenizer(pybind11::module_& m) { bind_tokenizer_train(m); }

}  // namespace fastlm
