// Rows of x are rounded to 8 bits in groups of 32, in chunks that stay in the second-level cache. Then each thread takes
// tiles of 32 output features: a panel of 512 inputs is read from memory once, unpacked into the first-level cache
// (quantized_tile.hpp) and multiplied with every row of the chunk (quantized_dot.hpp). With few rows, reading the weights
// limits: the rows after those being unpacked are fetched ahead. With many, the 8-bit dot products do.
#include "cpu/quantized_linear.hpp"

#include <stdexcept>

#include "cpu/features.hpp"
#include "cpu/parallel.hpp"
#include "cpu/quantized_activations.hpp"
#include "cpu/quantized_dot.hpp"

namespace fastlm::cpu {
namespace {

constexpr int64_t kChunkRows = 192;     // rows of x at a time: 192 · 512 bytes of a panel, with their sums 120 KB
constexpr int64_t kFetchAhead = 4096;   // bytes, at least, from the weights being unpacked to those being fetched
constexpr int64_t kRowsInParallel = 16;  // fewer are quantized by one thread: waking another takes longer

template <class Format, class Isa>
void dot(const Tile& tile, int groups, const Activations& x, int64_t rows, Sums sums) {
    switch (rows) {
        case 1: return Isa::template dot<Format, 1>(tile, groups, x, sums);
        case 2: return Isa::template dot<Format, 2>(tile, groups, x, sums);
        case 3: return Isa::template dot<Format, 3>(tile, groups, x, sums);
        case 4: return Isa::template dot<Format, 4>(tile, groups, x, sums);
        case 5: return Isa::template dot<Format, 5>(tile, groups, x, sums);
        default: return Isa::template dot<Format, 6>(tile, groups, x, sums);
    }
}

// The last, incomplete tile: its rows of a panel, and rows of zeros to make 32.
template <class Format>
struct PaddedRows {
    static constexpr int kStride = kPanel / Format::kBlock * Format::kBlockBytes;
    uint8_t bytes[kTileRows][kStride];

    PaddedRows(const uint8_t* weight, int64_t stride, int rows, int blocks) {
        std::memset(bytes, 0, sizeof bytes);
        for (int row = 0; row < rows; ++row) std::memcpy(bytes[row], weight + row * stride, blocks * Format::kBlockBytes);
    }
};

// Output features [32 begin, 32 end) of the rows in `x`, which start at row `first` of the call.
template <class Format, class Isa, class T>
void multiply(const QuantizedLinear<T>& call, const QuantizedRows<T>& x, int64_t first, int64_t begin, int64_t end) {
    Tile tile;
    alignas(64) float sums[kChunkRows][kTileRows];
    const int64_t tile_bytes = kTileRows * call.weight_stride;
    const int64_t fetch_distance = (kFetchAhead + tile_bytes - 1) / tile_bytes * tile_bytes;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t feature = i * kTileRows;
        const int features = static_cast<int>(std::min<int64_t>(kTileRows, call.out_features - feature));
        const uint8_t* weight = call.weight + feature * call.weight_stride;
        uintptr_t ahead = reinterpret_cast<uintptr_t>(weight) + fetch_distance;
        std::fill_n(&sums[0][0], x.batches.rows * kTileRows, 0.0f);
        int64_t k = 0;
        if constexpr (Isa::kMultipliesRow) {
            if (x.batches.rows == 1 && features == kTileRows) {
                const int64_t blocks = call.in_features / Format::kBlock;
                Isa::template multiply_row<Format>(weight, call.weight_stride, blocks, ahead, x.at(0, 0), sums[0]);
                k = call.in_features;
            }
        }
        for (; k < call.in_features; k += kPanel) {
            const int inputs = static_cast<int>(std::min<int64_t>(kPanel, call.in_features - k));
            const int blocks = inputs / Format::kBlock;
            if (features == kTileRows) {
                Isa::template unpack<Format>(weight, call.weight_stride, blocks, ahead, tile);
            } else {
                const PaddedRows<Format> rows(weight, call.weight_stride, features, blocks);
                Isa::template unpack<Format>(rows.bytes[0], rows.kStride, blocks, ahead, tile);
            }
            weight += blocks * Format::kBlockBytes;
            ahead += kTileRows * blocks * Format::kBlockBytes;
            for (int64_t batch = 0; batch < x.batches.count; ++batch) {
                dot<Format, Isa>(tile, inputs / Format::kGroup, x.at(batch, k), x.batches.size(batch),
                                 sums + x.batches.begin(batch));
            }
        }
        for (int64_t row = 0; row < x.batches.rows; ++row) {
            T* y = call.y + (first + row) * call.out_features + feature;
            for (int lane = 0; lane < features; lane += kLanes) {
                Floats result = load(&sums[row][lane]);
                if (call.bias) result += load_up_to(call.bias + feature + lane, features - lane);
                store_up_to(y + lane, features - lane, result);
            }
        }
    }
}

template <class Format, class Isa, class T>
void run(const QuantizedLinear<T>& call, int num_threads) {
    const int64_t chunk = std::min(call.rows, kChunkRows), groups = chunk * call.in_features / Format::kGroup;
    thread_local std::vector<int8_t> q;
    thread_local std::vector<float> scale, sum;
    thread_local std::vector<int32_t> correction;
    q.resize(chunk * call.in_features), correction.resize(groups);
    scale.resize(chunk * call.in_features / kActivationGroup), sum.resize(scale.size());
    for (int64_t first = 0; first < call.rows; first += chunk) {
        const QuantizedRows<T> x{call.x + first * call.x_stride,
                                 call.x_stride,
                                 call.in_features,
                                 RowBatches(std::min(chunk, call.rows - first)),
                                 Format::kGroup,
                                 Format::kOffset,
                                 q.data(),
                                 scale.data(),
                                 sum.data(),
                                 correction.data()};
        run_parallel<QuantizeRows>(x, x.batches.count, 1, x.batches.rows < kRowsInParallel ? 1 : num_threads);
        const int64_t tiles = (call.out_features + kTileRows - 1) / kTileRows;
        const int64_t grain = std::max<int64_t>(1, tiles / (4 * std::max(num_threads, 1)));
        parallel_for(0, tiles, grain, num_threads,
                     [&](int64_t begin, int64_t end) { multiply<Format, Isa>(call, x, first, begin, end); });
    }
}

template <class Format, class T>
void run_best_instructions(const QuantizedLinear<T>& call, int num_threads) {
#if defined(__x86_64__)
    if (features().avx512_vnni) return run<Format, Avx512Vnni>(call, num_threads);
    if (features().avx2) return run<Format, Avx2>(call, num_threads);
#endif
    run<Format, Portable>(call, num_threads);
}

// Calls f with the struct of the format that `quantization` names.
template <class F>
auto with_format(const std::string& quantization, F&& f) {
    if (quantization == "q8_0") return f(Q8_0{});
    if (quantization == "q5_0") return f(Q5_0{});
    if (quantization == "q4_0") return f(Q4_0{});
    if (quantization == "q4_k") return f(Q4_K{});
    if (quantization == "q5_k") return f(Q5_K{});
    if (quantization == "q6_k") return f(Q6_K{});
    throw std::invalid_argument("there is no quantization named " + quantization);
}

}  // namespace

BlockFormat block_format(const std::string& quantization) {
    return with_format(quantization, []<class Format>(Format) { return BlockFormat{Format::kBlock, Format::kBlockBytes}; });
}

template <class T>
void quantized_linear(const QuantizedLinear<T>& call, const std::string& quantization, int num_threads) {
    with_format(quantization, [&]<class Format>(Format) { run_best_instructions<Format>(call, num_threads); });
}

template void quantized_linear(const QuantizedLinear<float>&, const std::string&, int);
template void quantized_linear(const QuantizedLinear<BFloat16>&, const std::string&, int);

}  // namespace fastlm::cpu
