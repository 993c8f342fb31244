// Python bindings of the CUDA core. Takes raw device pointers and a stream handle; linked to no torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <stdexcept>
#include <string>

#include "addresses.hpp"
#include "cuda/decode_attention.hpp"
#include "cuda/sampling.hpp"
#include "philox.hpp"

namespace {

using fastlm::Address;
using fastlm::optional_pointer;
using fastlm::pointer;
using fastlm::require;

fastlm::cuda::DType dtype_of(const std::string& name) {
    if (name == "float32") return fastlm::cuda::DType::float32;
    if (name == "bfloat16") return fastlm::cuda::DType::bfloat16;
    if (name == "float16") return fastlm::cuda::DType::float16;
    throw std::invalid_argument("dtype must be float32, bfloat16 or float16, not " + name);
}

void check(cudaError_t status) {
    if (status == cudaSuccess) return;
    const pybind11::object error = pybind11::module_::import("fastlm.errors").attr("BackendError");
    pybind11::set_error(error, (std::string("CUDA: ") + cudaGetErrorString(status)).c_str());
    throw pybind11::error_already_set();
}

// Makes a device the current one while it lives.
class OnDevice {
public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_));
        if (device != before_) check(cudaSetDevice(device));
    }
    ~OnDevice() {
        int now = before_;
        if (cudaGetDevice(&now) == cudaSuccess && now != before_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
};

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
    check(fastlm::cuda::sample(call, type, reinterpret_cast<cudaStream_t>(stream)));
}

// What tells the graph that a stream is being captured into from every other; 0 where it is not.
unsigned long long capture_id(Address stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    check(cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(stream), &status, &id));
    return status == cudaStreamCaptureStatusActive ? id : 0;
}

int to_int(int64_t x, int64_t least, const char* name) {
    if (x < least || x > std::numeric_limits<int32_t>::max()) throw std::invalid_argument(std::string(name) + " does not fit");
    return static_cast<int>(x);
}

// Shapes and strides as torch gives them, those of the caches without head_dim; `workspace` and `counters` by their sizes.
void decode_attention(const std::string& dtype, int device, Address stream, Address q, std::array<int64_t, 4> shape,
                      std::array<int64_t, 4> strides, Address k, Address v, std::array<int64_t, 4> cache_shape,
                      std::array<int64_t, 4> k_strides, std::array<int64_t, 4> v_strides, Address table,
                      int64_t table_width, int64_t table_stride, Address lengths, double scale, int64_t window,
                      double softcap, Address sinks, bool wide_sinks, Address out, Address workspace,
                      int64_t workspace_size, Address counters, int64_t num_counters) {
    const auto type = dtype_of(dtype);
    const int64_t size = type == fastlm::cuda::DType::float32 ? 4 : 2;
    fastlm::cuda::DecodeAttention call{};
    call.batch = to_int(shape[0], 1, "batch"), call.query_len = to_int(shape[1], 1, "query_len");
    call.heads = to_int(shape[2], 1, "heads"), call.head_dim = to_int(shape[3], 8, "head_dim");
    call.blocks = to_int(cache_shape[0], 0, "blocks"), call.block_size = to_int(cache_shape[1], 1, "block_size");
    call.kv_heads = to_int(cache_shape[2], 1, "kv_heads"), call.table_width = to_int(table_width, 0, "max_blocks");
    call.window = to_int(window, 0, "window");
    require(call.query_len <= fastlm::cuda::kMaxQueryLen, "query_len must be 1 to 8");
    require(call.heads % call.kv_heads == 0, "heads must be a multiple of kv_heads");
    require(call.head_dim % 8 == 0 && call.head_dim <= fastlm::cuda::kMaxHeadDim && cache_shape[3] == call.head_dim,
            "head_dim must be 8 to 256 in steps of 8");
    require(table_width <= (1 << 30) / call.block_size && window <= 1 << 30, "a row of block_table holds too many tokens");
    require(shape[0] * shape[1] * shape[2] <= std::numeric_limits<int32_t>::max(), "q has too many rows");
    require(strides[3] == 1 && k_strides[3] == 1 && v_strides[3] == 1, "the last dimension must be contiguous");
    for (int i = 0; i < 3; ++i) {
        require(k_strides[i] * size % 16 == 0 && v_strides[i] * size % 16 == 0, "strides must be multiples of 16 bytes");
    }
    call.q = pointer<const uint16_t>(q, "q"), call.out = pointer<uint16_t>(out, "out");
    call.k = optional_pointer<const uint16_t>(k, "k_cache"), call.v = optional_pointer<const uint16_t>(v, "v_cache");
    require(k % 16 == 0 && v % 16 == 0, "the caches must start at a multiple of 16 bytes");
    require(call.blocks == 0 || (call.k && call.v), "the caches have no storage");
    call.table = optional_pointer<const int32_t>(table, "block_table");
    require(table_width == 0 || call.table, "block_table has no storage");
    call.lengths = pointer<const int32_t>(lengths, "context_lens");
    call.sinks = optional_pointer<const uint16_t>(sinks, "sinks"), call.wide_sinks = wide_sinks;
    call.q_batch_stride = strides[0], call.q_stride = strides[1], call.q_head_stride = strides[2];
    call.k_block_stride = k_strides[0], call.k_slot_stride = k_strides[1], call.k_head_stride = k_strides[2];
    call.v_block_stride = v_strides[0], call.v_slot_stride = v_strides[1], call.v_head_stride = v_strides[2];
    call.table_stride = table_stride;
    call.scale = static_cast<float>(scale), call.softcap = static_cast<float>(softcap);
    require(workspace_size >= fastlm::cuda::workspace_floats(call), "the workspace is too small");
    require(num_counters >= fastlm::cuda::counters_of(call), "there are too few counters");
    call.partials = optional_pointer<float>(workspace, "workspace");
    require(workspace % 16 == 0, "the workspace must start at a multiple of 16 bytes");
    call.counters = optional_pointer<uint32_t>(counters, "counters");
    const OnDevice on(device);
    check(fastlm::cuda::decode_attention(call, type, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastlm's CUDA core.";
    m.attr("runtime_version") = CUDART_VERSION;
    m.attr("archs") = pybind11::cast(fastlm::cuda::built_archs());
    m.def("sample", &sample, "Draws one token of each row of logits: temperature, top-k, top-p, min-p.");
    m.def("decode_attention", &decode_attention, "Attends to a paged cache in one launch.");
    m.def("capture_id", &capture_id, "Of the graph that a stream is captured into, or 0.");
    m.def("uniform", [](int64_t seed, int64_t position) {
        return fastlm::uniform(static_cast<uint64_t>(seed), static_cast<uint64_t>(position));
    }, "The number in [0, 1) that `sample` draws by.");
}
