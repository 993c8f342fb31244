// The passes over a row of logits that sampling is made of. A row is a list of blocks of 256 fp32 logits, the last one
// padded with -inf. What a pass leaves for a block depends on that block alone, so any number of threads may share the
// blocks and the bits stay the same. A pass that looks for logits not below `lowest` skips the blocks without one.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

constexpr int64_t kBlock = 256;  // elements: 1 KB, small beside the first-level cache, large beside a pass's fixed costs
constexpr int64_t kBins = 1024;  // of a histogram; four of them fill 32 KB

struct Row {
    int64_t vocab_size = 0;
    std::vector<const float*> blocks;
    std::vector<float> block_maxima;  // +inf for a block that holds NaN or +inf
    std::vector<float> lane_maxima;   // 16 a block: the i-th is that of elements i, i + 16, i + 32, ...

    int64_t block_count() const { return static_cast<int64_t>(blocks.size()); }
    float at(int64_t id) const { return blocks[id / kBlock][id % kBlock]; }
};

// What turns a logit x into its weight exp((x - max) / temperature).
struct Scale {
    float max, temperature;

    float scaled(float x) const { return (x - max) / temperature; }
    bool operator==(const Scale&) const = default;
};

// Logits x with lowest <= x < below.
struct Band {
    float lowest, below;
};

// The mean of scaled logits, in two floats, and how near to it one of them is: 0 at most, the nearer the larger.
struct Center {
    float value, rest;

    float nearness(float scaled) const { return -std::fabs((scaled - value) - rest); }
};

// Makes `row` of `vocab_size` logits. fp32 logits are not copied, save the last block; `storage` holds what is.
template <class T>
void read_row(const T* logits, int64_t vocab_size, Row& row, std::vector<float>& storage);

// Sets the maxima of one block.
void measure_block(Row& row, int64_t block);

// The sum of the weights of each block's logits not below `lowest`.
void sum_weights(const Row& row, const Scale& scale, float lowest, double* sums);

// The same of a band's logits.
void sum_band_weights(const Row& row, const Scale& scale, const Band& band, double* sums);

// Beside sum_weights' sums, those of weight · (x - max) / temperature.
void sum_moments(const Row& row, const Scale& scale, float lowest, double* sums, double* moments);

// The weights of one block, 0 for logits below `lowest`.
void block_weights(const float* block, const Scale& scale, float lowest, float* weights);

// Adds weights to histograms over (x - max) / temperature, from 0 down to `last`, which is negative; lower ones count
// into the last bin. The sum of the four histograms is the histogram; neighbours go to different ones, so that equal
// logits do not wait for each other.
struct Histogram {
    float bins_per_unit;
    std::vector<double> sums;  // (4, kBins)

    void reset(float last);
    int64_t bin(float scaled) const;
    double sum(int64_t bin) const;
};
void add_weights(const Row& row, const Scale& scale, float lowest, Histogram& histogram);

// The same over nearness to `center`.
void add_weights_by_nearness(const Row& row, const Scale& scale, const Center& center, float lowest,
                             Histogram& histogram);

// Sets `ids` to those of logits in [lowest, below), in no order; false when it stopped at more than `limit`.
bool collect(const Row& row, float lowest, float below, int64_t limit, std::vector<int32_t>& ids);

}  // namespace fastlm::cpu
