#include "cpu/sampling_passes.hpp"

#include <algorithm>
#include <limits>
#include <type_traits>

namespace fastlm::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNothing = -87.33f;  // exp is 0 below it

// exp of `scaled` where x is not below `lowest`, else 0. (Choosing 0 after exp, which itself chooses 0 at its low end,
// is what GCC 12 takes apart into single lanes for AVX-512.)
FASTLM_INLINE Floats weight(const Floats& x, const Floats& scaled, float lowest) {
    return exp(x >= lowest ? scaled : broadcast(2 * kNothing));
}

// The maxima of a block's lanes, of logits below `below`; others, NaN among them, count as `otherwise`.
FASTLM_INLINE Floats lane_maxima(const float* block, float below, float otherwise) {
    Floats max0 = broadcast(-kInfinity), max1 = max0;
    for (int64_t i = 0; i < kBlock; i += 2 * kLanes) {
        const Floats x0 = load(block + i), x1 = load(block + i + kLanes);
        max0 = maximum(max0, x0 < below ? x0 : broadcast(otherwise));
        max1 = maximum(max1, x1 < below ? x1 : broadcast(otherwise));
    }
    return maximum(max0, max1);
}

// Sums pairs in fp64, then pairs of the sums, and so on.
FASTLM_INLINE double sum_exactly(const Floats& v) {
    float lanes[kLanes];
    store(lanes, v);
    double half[kLanes / 2];
    for (int i = 0; i < 8; ++i) half[i] = static_cast<double>(lanes[i]) + static_cast<double>(lanes[i + 8]);
    for (int i = 0; i < 4; ++i) half[i] += half[i + 4];
    return (half[0] + half[2]) + (half[1] + half[3]);
}

template <class T>
struct Reading {
    const T* logits;
    float* converted;
    Row* row;
};

struct Read {
    template <class T>
    static FASTLM_INLINE void run(const Reading<T>& call, int64_t begin, int64_t end) {
        Row& row = *call.row;
        for (int64_t b = begin; b < end; ++b) {
            if constexpr (!std::is_same_v<T, float>) {
                const T* from = call.logits + b * kBlock;
                float* to = call.converted + b * kBlock;
                const int64_t left = row.vocab_size - b * kBlock;
                for (int64_t i = 0; i < kBlock; i += kLanes) {
                    const int64_t n = std::clamp<int64_t>(left - i, 0, kLanes);
                    store(to + i, n == kLanes ? load(from + i) : load_first(from + i, n, -kInfinity));
                }
            }
            const Floats max = lane_maxima(row.blocks[b], kInfinity, kInfinity);
            store(&row.lane_maxima[b * kLanes], max);
            row.block_maxima[b] = maximum(max);
        }
    }
};

struct Weighing {
    const Row& row;
    Scale scale;
    float lowest;
    double* sums;
};

struct Weigh {
    static FASTLM_INLINE void run(const Weighing& call, int64_t begin, int64_t end) {
        const float max = call.scale.max, temperature = call.scale.temperature, lowest = call.lowest;
        for (int64_t b = begin; b < end; ++b) {
            const float block_maximum = call.row.block_maxima[b];
            call.sums[b] = 0.0;
            if (block_maximum < lowest || (block_maximum - max) / temperature < kNothing) continue;
            const float* block = call.row.blocks[b];
            Floats sum0{}, sum1{};
            for (int64_t i = 0; i < kBlock; i += 2 * kLanes) {
                const Floats x0 = load(block + i), x1 = load(block + i + kLanes);
                sum0 += weight(x0, (x0 - max) / temperature, lowest);
                sum1 += weight(x1, (x1 - max) / temperature, lowest);
            }
            call.sums[b] = sum_exactly(sum0 + sum1);
        }
    }
};

struct BandWeighing {
    const Row& row;
    Scale scale;
    Band band;
    double* sums;
};

struct WeighBand {
    static FASTLM_INLINE void run(const BandWeighing& call, int64_t begin, int64_t end) {
        const float max = call.scale.max, temperature = call.scale.temperature;
        const float lowest = call.band.lowest, below = call.band.below;
        for (int64_t b = begin; b < end; ++b) {
            call.sums[b] = 0.0;
            if (call.row.block_maxima[b] < lowest) continue;
            const float* block = call.row.blocks[b];
            Floats sum0{}, sum1{};
            for (int64_t i = 0; i < kBlock; i += 2 * kLanes) {
                const Floats x0 = load(block + i), x1 = load(block + i + kLanes);
                const Floats in0 = x0 < below ? x0 : broadcast(-kInfinity);
                const Floats in1 = x1 < below ? x1 : broadcast(-kInfinity);
                sum0 += weight(in0, (x0 - max) / temperature, lowest);
                sum1 += weight(in1, (x1 - max) / temperature, lowest);
            }
            call.sums[b] = sum_exactly(sum0 + sum1);
        }
    }
};

struct Measuring {
    const Row& row;
    Scale scale;
    float lowest;
    double *sums, *moments;
};

struct Measure {
    static FASTLM_INLINE void run(const Measuring& call, int64_t begin, int64_t end) {
        const float max = call.scale.max, temperature = call.scale.temperature, lowest = call.lowest;
        for (int64_t b = begin; b < end; ++b) {
            const float block_maximum = call.row.block_maxima[b];
            call.sums[b] = call.moments[b] = 0.0;
            if (block_maximum < lowest || (block_maximum - max) / temperature < kNothing) continue;
            const float* block = call.row.blocks[b];
            Floats sum{}, moment{};
            for (int64_t i = 0; i < kBlock; i += kLanes) {
                const Floats x = load(block + i), scaled = (x - max) / temperature;
                const Floats weights = weight(x, scaled, lowest);
                sum += weights;
                moment += weights * maximum(scaled, broadcast(2 * kNothing));  // 0 · -inf would be NaN
            }
            call.sums[b] = sum_exactly(sum);
            call.moments[b] = sum_exactly(moment);
        }
    }
};

struct BlockWeights {
    const float* block;
    Scale scale;
    float lowest;
    float* weights;
};

struct WeighBlock {
    static FASTLM_INLINE void run(const BlockWeights& call, int64_t, int64_t) {
        for (int64_t i = 0; i < kBlock; i += kLanes) {
            const Floats x = load(call.block + i), scaled = (x - call.scale.max) / call.scale.temperature;
            store(call.weights + i, weight(x, scaled, call.lowest));
        }
    }
};

struct Binning {
    const Row& row;
    Scale scale;
    Center center;  // of bins by nearness
    float lowest;
    Histogram& histogram;
};

template <bool kByNearness>
struct Bin {
    static FASTLM_INLINE void run(const Binning& call, int64_t begin, int64_t end) {
        const float max = call.scale.max, temperature = call.scale.temperature, lowest = call.lowest;
        const float bins_per_unit = call.histogram.bins_per_unit;
        double* sums = call.histogram.sums.data();
        for (int64_t b = begin; b < end; ++b) {
            if (call.row.block_maxima[b] < lowest) continue;
            const float* block = call.row.blocks[b];
            float weights[kBlock];
            int32_t bins[kBlock];
            for (int64_t i = 0; i < kBlock; i += kLanes) {
                const Floats x = load(block + i), scaled = (x - max) / temperature;
                Floats place = scaled;
                if constexpr (kByNearness) {
                    const Floats offset = (scaled - call.center.value) - call.center.rest;
                    place = offset < 0.0f ? offset : -offset;
                }
                const Floats at = place * -bins_per_unit, last = broadcast(kBins - 1);
                store(weights + i, weight(x, scaled, lowest));
                const Ints bin = __builtin_convertvector(at < last ? at : last, Ints);
                std::memcpy(bins + i, &bin, sizeof bin);
            }
            for (int64_t i = 0; i < kBlock; i += 4) {
                for (int64_t j = 0; j < 4; ++j) sums[j * kBins + bins[i + j]] += weights[i + j];
            }
        }
    }
};

struct Collecting {
    const Row& row;
    float lowest, below;
    int64_t limit;
    std::vector<int32_t>& ids;
    bool* complete;
};

struct Collect {
    static FASTLM_INLINE void run(const Collecting& call, int64_t begin, int64_t end) {
        const float lowest = call.lowest, below = call.below;
        for (int64_t b = begin; b < end; ++b) {
            if (call.row.block_maxima[b] < lowest) continue;
            const float* block = call.row.blocks[b];
            float maxima[kLanes];
            store(maxima, below < kInfinity ? lane_maxima(block, below, -kInfinity)
                                            : load(&call.row.lane_maxima[b * kLanes]));
            const int64_t size = std::min(kBlock, call.row.vocab_size - b * kBlock);
            int32_t found[kBlock + 1];
            int64_t n = 0;
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                if (maxima[lane] < lowest) continue;
                for (int64_t i = lane; i < size; i += kLanes) {
                    found[n] = static_cast<int32_t>(b * kBlock + i);
                    n += (block[i] >= lowest) & (block[i] < below);
                }
            }
            call.ids.insert(call.ids.end(), found, found + n);
            if (static_cast<int64_t>(call.ids.size()) > call.limit) {
                *call.complete = false;
                return;
            }
        }
    }
};

}  // namespace

template <class T>
void read_row(const T* logits, int64_t vocab_size, Row& row, std::vector<float>& storage) {
    const int64_t count = (vocab_size + kBlock - 1) / kBlock, last = (count - 1) * kBlock;
    row.vocab_size = vocab_size;
    row.blocks.resize(count), row.block_maxima.resize(count), row.lane_maxima.resize(count * kLanes);
    if constexpr (std::is_same_v<T, float>) {
        storage.assign(kBlock, -kInfinity);
        std::copy(logits + last, logits + vocab_size, storage.begin());
        for (int64_t b = 0; b < count; ++b) row.blocks[b] = logits + b * kBlock;
        row.blocks[count - 1] = storage.data();
    } else {
        storage.resize(count * kBlock);
        for (int64_t b = 0; b < count; ++b) row.blocks[b] = storage.data() + b * kBlock;
    }
    run_best<Read>(Reading<T>{logits, storage.data(), &row}, 0, count);
}

template void read_row(const float*, int64_t, Row&, std::vector<float>&);
template void read_row(const BFloat16*, int64_t, Row&, std::vector<float>&);
template void read_row(const Float16*, int64_t, Row&, std::vector<float>&);

void measure_block(Row& row, int64_t block) {
    run_best<Read>(Reading<float>{nullptr, nullptr, &row}, block, block + 1);
}

void sum_weights(const Row& row, const Scale& scale, float lowest, double* sums) {
    run_best<Weigh>(Weighing{row, scale, lowest, sums}, 0, row.block_count());
}

void sum_band_weights(const Row& row, const Scale& scale, const Band& band, double* sums) {
    run_best<WeighBand>(BandWeighing{row, scale, band, sums}, 0, row.block_count());
}

void sum_moments(const Row& row, const Scale& scale, float lowest, double* sums, double* moments) {
    run_best<Measure>(Measuring{row, scale, lowest, sums, moments}, 0, row.block_count());
}

void block_weights(const float* block, const Scale& scale, float lowest, float* weights) {
    run_best<WeighBlock>(BlockWeights{block, scale, lowest, weights}, 0, 1);
}

void Histogram::reset(float last) {
    bins_per_unit = kBins / -last;
    sums.assign(4 * kBins, 0.0);
}

int64_t Histogram::bin(float scaled) const {
    return static_cast<int64_t>(std::min(scaled * -bins_per_unit, static_cast<float>(kBins - 1)));
}

double Histogram::sum(int64_t bin) const {
    return (sums[bin] + sums[kBins + bin]) + (sums[2 * kBins + bin] + sums[3 * kBins + bin]);
}

void add_weights(const Row& row, const Scale& scale, float lowest, Histogram& histogram) {
    run_best<Bin<false>>(Binning{row, scale, {}, lowest, histogram}, 0, row.block_count());
}

void add_weights_by_nearness(const Row& row, const Scale& scale, const Center& center, float lowest,
                             Histogram& histogram) {
    run_best<Bin<true>>(Binning{row, scale, center, lowest, histogram}, 0, row.block_count());
}

bool collect(const Row& row, float lowest, float below, int64_t limit, std::vector<int32_t>& ids) {
    bool complete = true;
    ids.clear();
    run_best<Collect>(Collecting{row, lowest, below, limit, ids, &complete}, 0, row.block_count());
    return complete;
}

}  // namespace fastlm::cpu
