#include "cpu/sampling_typical.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/ordered_floats.hpp"

namespace fastlm::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The weight to be kept; for a typical_p of 0, that of any one token.
double goal_of(double typical_p, double total) {
    return std::max(typical_p * total, std::numeric_limits<double>::min());
}

template <class Iterator>
double weight_of(Iterator begin, Iterator end) {
    return std::accumulate(begin, end, 0.0, [](double sum, auto& c) { return sum + c.weight; });
}

// In the definition's arithmetic, so that logits it cannot tell apart are as far from the entropy here.
struct Surprise {
    Scale scale;
    double log_total, entropy;

    Surprise(const Scale& scale, double total, double center)
        : scale(scale), log_total(std::log(total)), entropy(log_total - center) {}

    double above_entropy(float x) const { return (log_total - scale.scaled(x)) - entropy; }

    Band band(float lowest, double distance) const {
        const auto above_the_band = [&](float x) { return -above_entropy(x) > distance; };
        return {
            std::max(lowest, least(scale.max, [&](float x) { return above_entropy(x) <= distance; })),
            above_the_band(scale.max) ? least(scale.max, above_the_band) : kInfinity,
        };
    }
};

// The logits in the bins of nearness up to `bin`.
Band band_of_bins(const Histogram& histogram, const Scale& scale, const Center& center, float lowest, int64_t bin) {
    const auto is_above = [&](float x) { return scale.scaled(x) >= center.value; };
    const auto is_within = [&](float x) { return histogram.bin(center.nearness(scale.scaled(x))) <= bin; };
    const auto above_the_band = [&](float x) { return is_above(x) && !is_within(x); };
    return {
        std::max(lowest, least(scale.max, [&](float x) { return is_above(x) || is_within(x); })),
        above_the_band(scale.max) ? least(scale.max, above_the_band) : kInfinity,
    };
}

}  // namespace

Band TypicalSearch::band(const Row& row, const Scale& scale, float lowest, double typical_p) {
    candidates_.clear();
    const auto add_candidates = [&](const Surprise& surprise) {
        for (int32_t id : ids_) {
            const float x = row.at(id);
            const double weight = std::exp(static_cast<double>(scale.scaled(x)));
            candidates_.push_back({std::fabs(surprise.above_entropy(x)), weight});
        }
    };
    double total = 0.0, moment = 0.0;
    if (collect(row, lowest, kInfinity, kFewCandidates, ids_)) {
        for (int32_t id : ids_) {
            const double scaled = scale.scaled(row.at(id)), weight = std::exp(scaled);
            if (weight == 0) continue;
            total += weight;
            moment += weight * scaled;
        }
        const Surprise surprise(scale, total, moment / total);
        add_candidates(surprise);
        return surprise.band(lowest, furthest(0.0, goal_of(typical_p, total)));
    }

    sums_.resize(row.block_count()), moments_.resize(row.block_count());
    sum_moments(row, scale, lowest, sums_.data(), moments_.data());
    total = std::accumulate(sums_.begin(), sums_.end(), 0.0);
    moment = std::accumulate(moments_.begin(), moments_.end(), 0.0);
    const double mean = moment / total, goal = goal_of(typical_p, total);
    const Surprise surprise(scale, total, mean);
    const float value = static_cast<float>(mean);
    const Center center{value, static_cast<float>(mean - value)};
    // Logits lower than the mean by more than the largest is higher come last, the smaller the later. When a weight is
    // under a V-th of what typical_p leaves out, those not above it cannot be needed. 0.999 leaves room for rounding.
    const double least_weight = 0.999 * (1.0 - typical_p) * total / row.vocab_size;
    const double end = std::max(-mean, mean - std::max(std::log(least_weight), -87.0));
    histogram_.reset(static_cast<float>(-end));
    add_weights_by_nearness(row, scale, center, lowest, histogram_);
    double before = 0.0;
    int64_t bin = 0;
    while (bin + 1 < kBins && before + histogram_.sum(bin) < goal) before += histogram_.sum(bin++);
    Band inner{kInfinity, kInfinity}, outer = band_of_bins(histogram_, scale, center, lowest, bin);
    if (bin > 0) inner = band_of_bins(histogram_, scale, center, lowest, bin - 1);
    collect(row, outer.lowest, std::min(inner.lowest, outer.below), row.vocab_size, ids_);
    add_candidates(surprise);
    if (inner.below < kInfinity) {
        collect(row, std::max(lowest, inner.below), outer.below, row.vocab_size, ids_);
        add_candidates(surprise);
    }
    return surprise.band(lowest, furthest(before, goal));
}

// The greatest distance of a candidate whose nearer ones, with `before` of nearer logits, weigh less than `goal`.
double TypicalSearch::furthest(double before, double goal) {
    auto begin = candidates_.begin(), end = candidates_.end();
    double result = kInfinity;
    while (begin != end) {
        const auto middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end, [](auto& a, auto& b) { return a.distance < b.distance; });
        const double pivot = middle->distance;
        const auto equal = std::partition(begin, middle, [=](auto& c) { return c.distance < pivot; });
        const double nearer = weight_of(begin, equal);
        if (before + nearer >= goal) {
            end = equal;
            continue;
        }
        result = pivot;
        const auto further = std::partition(middle, end, [=](auto& c) { return c.distance == pivot; });
        before += nearer + weight_of(equal, further);
        if (before >= goal) break;
        begin = further;
    }
    return result;
}

}  // namespace fastlm::cpu
