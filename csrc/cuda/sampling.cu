// Sampling, one block a row, by the search that fastlm/ops/sampling/triton.py describes: a pass for the maximum that
// also keeps the largest logit of each of 4096 positions, whose k-th largest is a first bound of a filter's threshold;
// passes that count and weigh the tokens above several pivots at once until one logit is left between the bounds; a
// pass that sums the kept weights of each warp's part of the row, and the draw inside the part that u falls in.
//
// What it adds to that: a warp skips a tile in which no logit reaches the lower bound. After the first pass this is
// nearly every tile, so the usual row costs four reads of it from memory or L2 and little else. Prediction, not
// measured, for an H100 (3.35 TB/s), 128 rows of 131,072 fp32 logits: 67 MB or 20 us a pass, under 0.1 ms in all.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/sampling.hpp"
#include "philox.hpp"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 8;  // neighbouring logits of one thread: 16 bytes of bf16
constexpr int kTile = kThreads * kItems;
constexpr int kPivots = 6;
constexpr int kLinearPasses = 4;  // pivots evenly spaced by value, then by key, which ends whatever the logits are
constexpr int kInfinityKey = 0x7F800000;
constexpr float kLargestFloat = 3.4028234663852886e38f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr unsigned kAll = 0xFFFFFFFFu;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

// The integer whose order is that of the floats; both zeros give 0, NaNs lie beyond the infinities.
__device__ int to_key(float x) {
    const int bits = __float_as_int(x);
    return bits < 0 ? -(bits & 0x7FFFFFFF) : bits;
}

__device__ float to_value(int key) { return __int_as_float(key < 0 ? -key | 0x80000000 : key); }

// What the threads of a block tell each other.
struct Shared {
    double masses[kWarps][kPivots];
    int counts[kWarps][kPivots + 1];
    double total_masses[kPivots];
    int total_counts[kPivots + 1];
    double values[kWarps];
};

struct Row {
    const void* logits;
    int vocab_size;
    bool aligned;  // rows start where 16 bytes do
    float max_logit, scale;
};

// The kItems logits of this thread from `first` on; -inf beyond the row.
template <class T>
__device__ void load(const Row& row, int first, float (&x)[kItems]) {
    const T* logits = static_cast<const T*>(row.logits) + first;
    if (row.aligned && first + kItems <= row.vocab_size) {
        alignas(16) T items[kItems];
        for (int i = 0; i < static_cast<int>(sizeof(items) / 16); ++i) {
            reinterpret_cast<int4*>(items)[i] = reinterpret_cast<const int4*>(logits)[i];
        }
        for (int i = 0; i < kItems; ++i) x[i] = to_float(items[i]);
    } else {
        for (int i = 0; i < kItems; ++i) x[i] = first + i < row.vocab_size ? to_float(logits[i]) : -INFINITY;
    }
}

__device__ float weigh(const Row& row, float x) { return exp2f((x - row.max_logit) * row.scale); }

__device__ double warp_sum(double value) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAll, value, distance);
    return value;
}

// The sum over all threads, in the same order whatever the values, in every thread.
__device__ double block_sum(double value, Shared& shared) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) shared.values[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0;
    for (int warp = 0; warp < kWarps; ++warp) value += shared.values[warp];
    __syncthreads();
    return value;
}

__device__ int block_max(int value, Shared& shared) {
    value = __reduce_max_sync(kAll, value);
    if (threadIdx.x % 32 == 0) shared.counts[threadIdx.x / 32][0] = value;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) value = max(value, shared.counts[warp][0]);
    __syncthreads();
    return value;
}

// The sum over the threads before this one; `total` becomes that over all.
__device__ double block_scan(double value, Shared& shared, double& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double inclusive = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const double other = __shfl_up_sync(kAll, inclusive, distance);
        if (lane >= distance) inclusive += other;
    }
    if (lane == 31) shared.values[warp] = inclusive;
    __syncthreads();
    double before = 0.0;
    total = 0.0;
    for (int w = 0; w < kWarps; ++w) {
        if (w == warp) before = total;
        total += shared.values[w];
    }
    __syncthreads();
    return before + (inclusive - value);
}

// Maximum so far and sum of exp2((x - maximum) · scale), of one thread.
struct OnlineSum {
    float highest = -kLargestFloat, total = 0.0f;

    __device__ void add(const float (&x)[kItems], float scale) {
        float highest_now = highest;
        for (float value : x) highest_now = fmaxf(highest_now, value);
        total *= exp2f((highest - highest_now) * scale);
        highest = highest_now;
        for (float value : x) total += exp2f((value - highest) * scale);
    }

    __device__ double over_block(float max_logit, float scale, Shared& shared) const {
        return block_sum(total * exp2f((highest - max_logit) * scale), shared);
    }
};

// low + (high - low) · part / parts, without the overflow of keys far apart.
__device__ int between(int low, int high, int part, int parts) {
    return static_cast<int>(low + (static_cast<int64_t>(high) - low) * part / parts);
}

// The largest key in [low, high) at which the largest logits of the tile's positions alone reach `goal`, else low.
template <bool kByMass>
__device__ int largest_bound(const int (&largest)[kItems], const Row& row, float floor, double goal, int low, int high,
                             Shared& shared) {
    float weights[kItems];
    for (int i = 0; i < kItems; ++i) {
        weights[i] = kByMass ? weigh(row, to_value(largest[i])) : 1.0f;
        if (kByMass && weights[i] < floor) weights[i] = 0.0f;
    }
    while (low + 1 < high) {
        const int middle = between(low, high, 1, 2);
        float reached = 0.0f;
        for (int i = 0; i < kItems; ++i) reached += largest[i] >= middle ? weights[i] : 0.0f;
        (block_sum(reached, shared) >= goal ? low : high) = middle;
    }
    return low;
}

// The i-th of kPivots keys in [low, high): the lowest, the next, and cuts of the rest into equal parts.
__device__ int pivot(int low, int high, int step, int i) {
    int key = low + i;
    if (i > 1) {
        const float part = static_cast<float>(i - 1) / (kPivots - 1);
        const float value = to_value(low) * (1 - part) + to_value(high - 1) * part;
        key = max(step < kLinearPasses ? to_key(value) : between(low, high, i - 1, kPivots - 1), low + 1);
    }
    return max(min(key, high - 1), low);
}

// The highest threshold in [low, high) at or above which the row still holds `goal`, of tokens or of mass. `mass`
// becomes the mass there, of the weights that are not below `floor`.
template <class T, bool kByMass>
__device__ int search(const Row& row, float floor, double goal, int low, int high, Shared& shared, double& mass) {
    int count_low = row.vocab_size, count_high = 0;
    for (int step = 0;; ++step) {
        int pivots[kPivots], counts[kPivots] = {}, least = kInfinityKey;
        float masses[kPivots] = {};
        for (int i = 0; i < kPivots; ++i) pivots[i] = pivot(low, high, step, i);
        for (int start = 0; start < row.vocab_size; start += kTile) {
            float x[kItems];
            load<T>(row, start + threadIdx.x * kItems, x);
            int highest = -kInfinityKey;
            for (float value : x) highest = max(highest, to_key(value));
            if (!__any_sync(kAll, highest >= low)) continue;
            for (float value : x) {
                const int key = to_key(value);
                if (key < low) continue;
                least = min(least, key);
                float weight = weigh(row, value);
                if (weight < floor) weight = 0.0f;
                for (int i = 0; i < kPivots; ++i) {
                    if (key >= pivots[i]) ++counts[i], masses[i] += weight;
                }
            }
        }
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        for (int i = 0; i < kPivots; ++i) {
            const int count = __reduce_add_sync(kAll, counts[i]);
            const double sum = warp_sum(masses[i]);
            if (lane == 0) shared.counts[warp][i] = count, shared.masses[warp][i] = sum;
        }
        least = __reduce_min_sync(kAll, least);
        if (lane == 0) shared.counts[warp][kPivots] = least;
        __syncthreads();
        if (threadIdx.x < kPivots) {
            int count = 0;
            double sum = 0.0;
            for (int w = 0; w < kWarps; ++w) {
                count += shared.counts[w][threadIdx.x], sum += shared.masses[w][threadIdx.x];
            }
            shared.total_counts[threadIdx.x] = count, shared.total_masses[threadIdx.x] = sum;
        } else if (threadIdx.x == kPivots) {
            for (int w = 0; w < kWarps; ++w) least = min(least, shared.counts[w][kPivots]);
            shared.total_counts[kPivots] = least;
        }
        __syncthreads();
        int new_low = low, new_high = high;
        for (int i = 0; i < kPivots; ++i) {
            const int count = shared.total_counts[i];
            const double sum = shared.total_masses[i];
            const bool enough = (kByMass ? sum : count) >= goal;
            if (i == 0 || enough) new_low = pivots[i], count_low = count, mass = sum;
            if (!enough && pivots[i] < new_high) new_high = pivots[i], count_high = count;
        }
        low = max(new_low, shared.total_counts[kPivots]);
        high = new_high;
        __syncthreads();  // before the next pass writes to what was read above
        if (low + 1 >= high || count_low - count_high <= 1 || (!kByMass && count_low <= goal)) return low;
    }
}

// The first id at which the running sum of kept weights exceeds u · their sum, which `total` becomes. Kept are the keys
// at or above `threshold` whose weights are not below `floor`.
template <class T>
__device__ int draw(const Row& row, int threshold, float floor, double u, Shared& shared, double& total) {
    const auto kept_weight = [&](float x) {
        const float weight = weigh(row, x);
        return to_key(x) >= threshold && weight >= floor ? weight : 0.0f;
    };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int kWarpTile = 32 * kItems;
    const int part = (row.vocab_size + kWarps * kWarpTile - 1) / (kWarps * kWarpTile) * kWarpTile;
    const int part_end = min(row.vocab_size, (warp + 1) * part);
    double mass = 0.0;
    for (int start = warp * part; start < part_end; start += kWarpTile) {
        float x[kItems], sum = 0.0f;
        load<T>(row, start + lane * kItems, x);
        for (float value : x) sum += kept_weight(value);
        mass += sum;
    }
    mass = warp_sum(mass);
    if (lane == 0) shared.values[warp] = mass;
    __syncthreads();
    total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += shared.values[w];
    const double target = u * total;
    double before = 0.0;
    int chosen = 0;
    double running_parts = 0.0;
    for (int w = 0; w < kWarps; ++w) {  // the last part with any mass, should rounding leave the target above all
        if (shared.values[w] > 0 && running_parts <= target) chosen = w, before = running_parts;
        running_parts += shared.values[w];
    }
    __syncthreads();

    const int end = min(row.vocab_size, (chosen + 1) * part);
    int drawn = -1, last = -1;
    for (int start = chosen * part; start < end; start += kTile) {
        float x[kItems];
        double weights[kItems], sum = 0.0, tile;
        const int first = start + threadIdx.x * kItems;
        load<T>(row, first, x);
        for (int i = 0; i < kItems; ++i) {
            weights[i] = first + i < end ? kept_weight(x[i]) : 0.0f;
            sum += weights[i];
            if (weights[i] > 0) last = first + i;
        }
        double running = before + block_scan(sum, shared, tile);
        int found = -1;
        for (int i = 0; i < kItems; ++i) {
            running += weights[i];
            if (found < 0 && weights[i] > 0 && running > target) found = first + i;
        }
        // The lowest of the threads' ids, none being the highest.
        drawn = -block_max(found < 0 ? -row.vocab_size : -found, shared);
        if (drawn < row.vocab_size) return drawn;
        before += tile;
    }
    return max(block_max(last, shared), 0);
}

template <class T>
__global__ void __launch_bounds__(kThreads) sample_kernel(const Sampling call, bool aligned) {
    __shared__ Shared shared;
    const int64_t row_id = blockIdx.x;
    const float temperature = call.temperature[row_id];
    Row row{static_cast<const T*>(call.logits) + row_id * call.stride, call.vocab_size, aligned, 0.0f, kLog2E};
    if (temperature > 0) row.scale = fminf(kLog2E / temperature, kLargestFloat);

    int largest[kItems], highest_key = -kInfinityKey, least = kInfinityKey, magnitude = 0;
    OnlineSum of_weights, of_raw;
    for (int& key : largest) key = -kInfinityKey;
    for (int start = 0; start < row.vocab_size; start += kTile) {
        float x[kItems];
        load<T>(row, start + threadIdx.x * kItems, x);
        for (int i = 0; i < kItems; ++i) {
            const int key = to_key(x[i]);
            largest[i] = max(largest[i], key);
            if (key > -kInfinityKey) least = min(least, key);
            magnitude = max(magnitude, __float_as_int(x[i]) & 0x7FFFFFFF);
        }
        if (call.top_p) of_weights.add(x, row.scale);
        if (call.logprobs) of_raw.add(x, kLog2E);
    }
    for (int key : largest) highest_key = max(highest_key, key);
    highest_key = block_max(highest_key, shared);
    least = -block_max(-least, shared);
    magnitude = block_max(magnitude, shared);

    const int64_t top_k = call.top_k ? call.top_k[row_id] : 0;
    const float top_p = call.top_p ? call.top_p[row_id] : 1.0f;
    const float min_p = call.min_p ? call.min_p[row_id] : 0.0f;
    const bool valid = magnitude <= kInfinityKey && highest_key < kInfinityKey && highest_key > -kInfinityKey &&
                       temperature >= 0 && temperature <= kLargestFloat && top_k >= 0 && top_p >= 0 &&
                       top_p <= kLargestFloat && min_p >= 0 && min_p <= 1;
    if (!valid) {
        if (threadIdx.x == 0) {
            call.valid[row_id] = false, call.ids[row_id] = 0;
            if (call.logprobs) call.logprobs[row_id] = call.processed_logprobs[row_id] = NAN;
        }
        return;
    }

    row.max_logit = to_value(highest_key);
    const float floor = call.min_p_first ? min_p : 0.0f;
    int threshold = least;
    double total = -1.0;  // mass of the tokens that filters have kept so far
    if (temperature == 0) {
        threshold = highest_key;
    } else {
        if (top_k > 0 && top_k < row.vocab_size) {
            const double goal = static_cast<double>(top_k);
            threshold = largest_bound<false>(largest, row, floor, goal, threshold, highest_key + 1, shared);
            threshold = search<T, false>(row, floor, goal, threshold, highest_key + 1, shared, total);
        }
        if (top_p < 1) {
            if (total < 0 && floor > 0) draw<T>(row, threshold, floor, 0.0, shared, total);
            if (total < 0) total = of_weights.over_block(row.max_logit, row.scale, shared);
            const double goal = static_cast<double>(top_p) * total;
            threshold = largest_bound<true>(largest, row, floor, goal, threshold, highest_key + 1, shared);
            threshold = search<T, true>(row, floor, goal, threshold, highest_key + 1, shared, total);
        }
    }
    // At temperature 0 the first of the largest, which alone are kept, is that at u = 0.
    const double u = temperature > 0 ? uniform(call.seed[row_id], call.position[row_id]) : 0.0;
    const int id = draw<T>(row, threshold, min_p, u, shared, total);
    double raw_total = 1.0;
    if (call.logprobs) raw_total = of_raw.over_block(row.max_logit, kLog2E, shared);
    if (threadIdx.x == 0) {
        call.valid[row_id] = true, call.ids[row_id] = id;
        if (call.logprobs) {
            const double x = static_cast<double>(to_float(static_cast<const T*>(row.logits)[id])) - row.max_logit;
            call.logprobs[row_id] = static_cast<float>(x - log(raw_total));
            call.processed_logprobs[row_id] =
                temperature > 0 ? static_cast<float>(x / temperature - log(total)) : 0.0f;
        }
    }
}

template <class T>
cudaError_t launch(const Sampling& call, cudaStream_t stream) {
    const bool aligned = reinterpret_cast<uintptr_t>(call.logits) % 16 == 0 && call.stride * sizeof(T) % 16 == 0;
    sample_kernel<T><<<static_cast<unsigned>(call.rows), kThreads, 0, stream>>>(call, aligned);
    return cudaGetLastError();
}

}  // namespace

cudaError_t sample(const Sampling& call, DType dtype, cudaStream_t stream) {
    if (dtype == DType::float32) return launch<float>(call, stream);
    if (dtype == DType::bfloat16) return launch<__nv_bfloat16>(call, stream);
    return launch<__half>(call, stream);
}

std::vector<int> built_archs() {
    std::vector<int> archs;
    for (int arch : {__CUDA_ARCH_LIST__}) archs.push_back(arch / 10);
    return archs;
}

}  // namespace fastlm::cuda
