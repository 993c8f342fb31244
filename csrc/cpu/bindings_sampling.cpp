// Binding of sampling. Tensors come as addresses, shapes and strides (in elements), checked here before any is read.
#include <pybind11/pybind11.h>

#include <limits>
#include <string>

#include "addresses.hpp"
#include "cpu/sampling.hpp"

namespace py = pybind11;

namespace fastlm {
namespace {

// A null address is a setting, or an output, that was not given. Settings hold one number a row.
template <class T>
void sample(Address logits, int64_t rows, int64_t vocab_size, int64_t stride, Address temperature, Address top_k,
            Address top_p, Address min_p, Address typical_p, Address repetition_penalty, Address presence_penalty,
            Address frequency_penalty, Address prompt_ids, Address output_ids, int64_t prompt_length,
            int64_t output_length, Address seed, Address position, bool min_p_first, Address ids, Address valid,
            Address logprobs, Address processed_logprobs, Address top_ids, Address top_logprobs, int64_t num_logprobs,
            int num_threads) {
    require(rows >= 0 && vocab_size > 0 && stride >= 0, "logits must be (rows, vocab_size) with vocab_size > 0");
    require(vocab_size <= std::numeric_limits<int32_t>::max(), "the vocabulary must have fewer than 2^31 tokens");
    require(prompt_length >= 0 && output_length >= 0, "lengths of histories must not be negative");
    require(num_logprobs >= 0 && num_logprobs <= vocab_size, "num_logprobs must be between 0 and vocab_size");
    if (rows == 0) return;
    cpu::Sampling<T> call{};
    call.logits = pointer<const T>(logits, "logits");
    call.rows = rows, call.vocab_size = vocab_size, call.stride = stride;
    call.temperature = pointer<const float>(temperature, "temperature");
    call.top_k = optional_pointer<const int64_t>(top_k, "top_k");
    call.top_p = optional_pointer<const float>(top_p, "top_p");
    call.min_p = optional_pointer<const float>(min_p, "min_p");
    call.typical_p = optional_pointer<const float>(typical_p, "typical_p");
    call.repetition_penalty = optional_pointer<const float>(repetition_penalty, "repetition_penalty");
    call.presence_penalty = optional_pointer<const float>(presence_penalty, "presence_penalty");
    call.frequency_penalty = optional_pointer<const float>(frequency_penalty, "frequency_penalty");
    call.prompt_ids = optional_pointer<const int64_t>(prompt_ids, "prompt_ids");
    call.output_ids = optional_pointer<const int64_t>(output_ids, "output_ids");
    call.prompt_length = prompt_length, call.output_length = output_length;
    call.seed = pointer<const int64_t>(seed, "seed"), call.position = pointer<const int64_t>(position, "position");
    call.min_p_first = min_p_first, call.num_logprobs = num_logprobs;
    call.ids = pointer<int64_t>(ids, "ids"), call.valid = pointer<bool>(valid, "valid");
    if (logprobs) {
        call.logprobs = pointer<float>(logprobs, "logprobs");
        call.processed_logprobs = pointer<float>(processed_logprobs, "processed_logprobs");
    }
    if (num_logprobs) {
        call.top_ids = pointer<int64_t>(top_ids, "top_ids");
        call.top_logprobs = pointer<float>(top_logprobs, "top_logprobs");
    }
    py::gil_scoped_release release;
    cpu::sample(call, num_threads);
}

}  // namespace

void bind_cpu_sampling(py::module_& m) {
    m.def("sample_float32", &sample<float>, "Draws one token of each row of fp32 logits.");
    m.def("sample_bfloat16", &sample<cpu::BFloat16>, "Draws one token of each row of bf16 logits.");
    m.def("sample_float16", &sample<cpu::Float16>, "Draws one token of each row of fp16 logits.");
}

}  // namespace fastlm
