// Nothing is sorted but a few candidates. The first pass finds the maxima of blocks of 256 logits and of 16 lanes of
// each; every filter is a threshold on the logits, and later passes look only at blocks whose maximum reaches it.
//
//   top_k   The k-th largest maximum is a lower bound of the k-th largest logit: those not below it are collected, and
//           the k-th largest of them is the threshold.
//   top_p   With the sum Z of all weights, one pass of exponentials, a token of weight w stays only if
//           V · w > (1 - top_p) · Z, for at most V tokens are not above it. Few tokens are above that bound when the
//           distribution is peaked. When many are, a histogram of weights says in which of its 1024 bins the threshold
//           lies. What is left is searched by halves, each by nth_element.
//   min_p   The least logit whose weight is not below min_p, by bisection over the floats.
//   typical As sampling_typical.hpp tells: alone among the filters, it sets a bound above too.
//   draw    Sums of weights by block lead to a block, and a walk through its weights to the token.
//
// Memory traffic: the row once for the maxima, and once for Z or the draw where no top_k bounds it (a row of 152,064
// fp32 logits takes 600 KB, which the second-level cache holds). Weights are fp32, summed in fp64, by block and then in
// the order of blocks, so a row's bits depend on the row alone. Penalties copy the blocks that hold a token of the
// prompt or the output; nothing else of the row is touched.
#include "cpu/sampling.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/ordered_floats.hpp"
#include "cpu/parallel.hpp"
#include "cpu/sampling_passes.hpp"
#include "cpu/sampling_typical.hpp"
#include "philox.hpp"

namespace fastlm::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kPart = 131072;  // logits that a thread takes at a time: some 25 µs, thrice what waking it costs

bool in_range(const float* setting, int64_t row, float low, float high = std::numeric_limits<float>::max()) {
    return !setting || (setting[row] >= low && setting[row] <= high);
}

template <class T>
bool settings_valid(const Sampling<T>& call, int64_t row) {
    const float least_float = std::numeric_limits<float>::lowest();
    return in_range(call.temperature, row, 0.0f) && in_range(call.top_p, row, 0.0f) &&
           in_range(call.min_p, row, 0.0f, 1.0f) && in_range(call.typical_p, row, 0.0f) &&
           (!call.top_k || call.top_k[row] >= 0) &&
           in_range(call.repetition_penalty, row, std::numeric_limits<float>::denorm_min()) &&
           in_range(call.presence_penalty, row, least_float) && in_range(call.frequency_penalty, row, least_float);
}

// Samples rows one after another, keeping its memory from row to row.
template <class T>
class Sampler {
   public:
    explicit Sampler(const Sampling<T>& call) : call_(call) {}

    void run(int64_t row) {
        bool valid = settings_valid(call_, row);
        if (valid) {
            read_row(call_.logits + row * call_.stride, call_.vocab_size, row_, storage_);
            summed_ = false;
            double log_normalizer = 0.0;  // of softmax(logits), its maximum taken off
            const float raw_max = row_maximum();
            if (std::isfinite(raw_max) && (call_.logprobs || call_.num_logprobs)) {
                log_normalizer = std::log(sum({raw_max, 1.0f}, -kInfinity));
                top_logprobs(row, raw_max, log_normalizer);
            }
            penalize(row);
            scale_ = {row_maximum(), call_.temperature[row]};
            valid = std::isfinite(scale_.max);
            if (valid) draw(row, raw_max, log_normalizer);
        }
        call_.valid[row] = valid;
        if (!valid) mark_invalid(row);
    }

   private:
    const Sampling<T>& call_;
    Row row_;
    Scale scale_{};
    std::vector<float> storage_, values_, patches_;
    std::vector<uint32_t> counts_;  // beside patches_, 0 between rows
    std::vector<int32_t> patch_of_block_, ids_;
    Histogram histogram_;
    TypicalSearch typical_;
    std::vector<double> sums_;
    bool summed_ = false;  // whether sums_ are those of the next two
    Scale summed_scale_{};
    float summed_lowest_ = 0.0f;
    double total_ = 0.0;

    float row_maximum() const { return *std::max_element(row_.block_maxima.begin(), row_.block_maxima.end()); }

    void mark_invalid(int64_t row) {
        call_.ids[row] = 0;
        if (call_.logprobs) call_.logprobs[row] = call_.processed_logprobs[row] = kNaN;
        std::fill_n(call_.top_ids + row * call_.num_logprobs, call_.num_logprobs, 0);
        std::fill_n(call_.top_logprobs + row * call_.num_logprobs, call_.num_logprobs, kNaN);
    }

    // The sum of the weights of logits not below `lowest`; leaves the blocks' own in sums_.
    double sum(const Scale& scale, float lowest) {
        if (summed_ && scale == summed_scale_ && lowest == summed_lowest_) return total_;
        sums_.resize(row_.block_count());
        sum_weights(row_, scale, lowest, sums_.data());
        total_ = 0.0;
        for (double s : sums_) total_ += s;
        summed_ = true, summed_scale_ = scale, summed_lowest_ = lowest;
        return total_;
    }

    // The same of a band.
    double sum_of_band(const Band& band) {
        sums_.resize(row_.block_count());
        sum_band_weights(row_, scale_, band, sums_.data());
        summed_ = false;
        double total = 0.0;
        for (double s : sums_) total += s;
        return total;
    }

    // A lower bound of the k-th largest logit, or -inf.
    float bound_of_largest(int64_t k) {
        const std::vector<float>* maxima = &row_.block_maxima;
        if (k > static_cast<int64_t>(maxima->size())) maxima = &row_.lane_maxima;
        if (k > static_cast<int64_t>(maxima->size())) return -kInfinity;
        values_ = *maxima;
        return kth_largest_value(k);
    }

    float kth_largest_value(int64_t k) {
        std::nth_element(values_.begin(), values_.begin() + (k - 1), values_.end(), std::greater<>());
        return values_[k - 1];
    }

    void collect_values(float lowest, float below) {
        collect(row_, lowest, below, row_.vocab_size, ids_);
        values_from_ids();
    }

    void values_from_ids() {
        values_.resize(ids_.size());
        for (size_t i = 0; i < ids_.size(); ++i) values_[i] = row_.at(ids_[i]);
    }

    void top_logprobs(int64_t row, float max, double log_normalizer) {
        const int64_t n = call_.num_logprobs;
        if (n == 0) return;
        collect(row_, bound_of_largest(n), kInfinity, row_.vocab_size, ids_);
        const auto before = [this](int32_t a, int32_t b) {
            const float x = row_.at(a), y = row_.at(b);
            return x > y || (x == y && a < b);
        };
        std::partial_sort(ids_.begin(), ids_.begin() + n, ids_.end(), before);
        for (int64_t i = 0; i < n; ++i) {
            call_.top_ids[row * n + i] = ids_[i];
            const double shifted = static_cast<double>(row_.at(ids_[i])) - max;
            call_.top_logprobs[row * n + i] = static_cast<float>(shifted - log_normalizer);
        }
    }

    // Penalties on copies of the blocks that hold a token of the history.
    void penalize(int64_t row) {
        const bool of_output = call_.presence_penalty || call_.frequency_penalty || call_.repetition_penalty;
        const int64_t output_length = of_output && call_.output_ids ? call_.output_length : 0;
        const int64_t prompt_length = call_.repetition_penalty && call_.prompt_ids ? call_.prompt_length : 0;
        if (output_length + prompt_length == 0) return;
        const int64_t* output = call_.output_ids + row * output_length;
        const int64_t* prompt = call_.prompt_ids + row * prompt_length;
        patch_of_block_.assign(row_.block_count(), -1);
        const size_t most = std::min(row_.block_count(), output_length + prompt_length) * kBlock;
        if (patches_.size() < most) patches_.resize(most), counts_.resize(most);
        int32_t patched = 0;
        const uint32_t kSeen = 1u << 31;  // the lower bits count
        const auto note = [&](int64_t id, uint32_t what) {
            if (id < 0 || id >= row_.vocab_size) return;
            int32_t& patch = patch_of_block_[id / kBlock];
            if (patch < 0) {
                patch = patched++;
                std::copy_n(row_.blocks[id / kBlock], kBlock, &patches_[patch * kBlock]);
            }
            uint32_t& count = counts_[patch * kBlock + id % kBlock];
            count = what == kSeen ? count | kSeen : count + 1;
        };
        for (int64_t i = 0; i < prompt_length; ++i) note(prompt[i], kSeen);
        for (int64_t i = 0; i < output_length; ++i) note(output[i], 1);
        for (int64_t i = 0; i < prompt_length; ++i) apply(row, prompt[i]);
        for (int64_t i = 0; i < output_length; ++i) apply(row, output[i]);
        for (int64_t b = 0; b < row_.block_count(); ++b) {
            if (patch_of_block_[b] < 0) continue;
            row_.blocks[b] = &patches_[patch_of_block_[b] * kBlock];
            measure_block(row_, b);
        }
        summed_ = false;
    }

    // The penalties of one token, the first time that it comes.
    void apply(int64_t row, int64_t id) {
        if (id < 0 || id >= row_.vocab_size) return;
        const int64_t at = patch_of_block_[id / kBlock] * kBlock + id % kBlock;
        if (counts_[at] == 0) return;
        const uint32_t count = counts_[at] & ~(1u << 31);
        float x = patches_[at];
        if (call_.repetition_penalty) {
            const float factor = call_.repetition_penalty[row];
            x = x > 0 ? x / factor : x * factor;
        }
        if (call_.frequency_penalty && count) {
            // Through fp64, so that no compiler joins product and difference, which would round once instead of twice.
            x -= static_cast<float>(static_cast<double>(call_.frequency_penalty[row]) * count);
        }
        if (call_.presence_penalty && count) x -= call_.presence_penalty[row];
        patches_[at] = x;
        counts_[at] = 0;
    }

    void draw(int64_t row, float raw_max, double log_normalizer) {
        int64_t id;
        double processed = 0.0;
        if (call_.temperature[row] == 0) {
            id = first_maximum();
        } else {
            Band kept{filter(row), kInfinity};
            const bool typical = call_.typical_p && call_.typical_p[row] < 1;
            if (typical) kept = typical_.band(row_, scale_, kept.lowest, call_.typical_p[row]);
            const double total = typical ? sum_of_band(kept) : sum(scale_, kept.lowest);
            id = inverse_cdf(kept, uniform(call_.seed[row], call_.position[row]) * total);
            processed = scale_.scaled(row_.at(id)) - std::log(total);
        }
        call_.ids[row] = id;
        if (!call_.logprobs) return;
        float raw;
        store_first(&raw, 1, load_first(call_.logits + row * call_.stride + id, 1, 0.0f));
        call_.logprobs[row] = static_cast<float>((static_cast<double>(raw) - raw_max) - log_normalizer);
        call_.processed_logprobs[row] = static_cast<float>(processed);
    }

    int64_t first_maximum() const {
        const auto& maxima = row_.block_maxima;
        const int64_t block = std::find(maxima.begin(), maxima.end(), scale_.max) - maxima.begin();
        const float* logits = row_.blocks[block];
        return block * kBlock + (std::find(logits, logits + kBlock, scale_.max) - logits);
    }

    // The lowest logit that all filters but typical_p leave.
    float filter(int64_t row) {
        float lowest = -kInfinity;
        if (call_.top_k && call_.top_k[row] > 0 && call_.top_k[row] < row_.vocab_size) {
            lowest = top_k(call_.top_k[row]);
        }
        const float min_p = call_.min_p ? call_.min_p[row] : 0.0f;
        const float least_by_min_p = min_p > 0 ? lowest_by_min_p(min_p) : -kInfinity;
        if (call_.min_p_first) lowest = std::max(lowest, least_by_min_p);
        if (call_.top_p && call_.top_p[row] < 1) lowest = std::max(lowest, lowest_by_top_p(call_.top_p[row], lowest));
        return std::max(lowest, least_by_min_p);
    }

    float top_k(int64_t k) {
        const float bound = bound_of_largest(k);
        if (bound == scale_.max) return bound;
        collect_values(bound, kInfinity);
        return kth_largest_value(k);
    }

    double weight(float x) const { return std::exp(static_cast<double>(scale_.scaled(x))); }

    float lowest_by_min_p(double min_p) const {
        return least(scale_.max, [&](float x) { return weight(x) >= min_p; });
    }

    float lowest_by_top_p(double top_p, float lowest) {
        const double total = sum(scale_, lowest), target = top_p * total;
        // 0.999 leaves room for rounding; weights under e^-87 are 0 to every pass.
        const double least_weight = 0.999 * (1.0 - top_p) * total / row_.vocab_size;
        const float last = static_cast<float>(std::max(std::log(least_weight), -87.0));
        const float bound = least(scale_.max, [&](float x) { return scale_.scaled(x) >= last; });
        lowest = std::max(lowest, bound);
        double above = 0.0;
        if (collect(row_, lowest, kInfinity, kFewCandidates, ids_)) {
            values_from_ids();
        } else {
            histogram_.reset(last);
            add_weights(row_, scale_, lowest, histogram_);
            int64_t bin = 0;
            while (bin + 1 < kBins && above + histogram_.sum(bin) < target) above += histogram_.sum(bin++);
            const auto up_to = [&](int64_t b) {
                return least(scale_.max, [&](float x) { return histogram_.bin(scale_.scaled(x)) <= b; });
            };
            const float below = bin == 0 ? kInfinity : up_to(bin - 1);
            collect_values(std::max(lowest, up_to(bin)), below);
            if (values_.empty()) return lowest;  // by rounding, the weights down to the bound fall short of the target
        }
        return lowest_inside(above, target);
    }

    // The least of values_ above which the weights, with `above` of larger logits, sum to less than `target`.
    float lowest_inside(double above, double target) {
        auto begin = values_.begin(), end = values_.end();
        float lowest = scale_.max;
        while (begin != end) {
            const auto middle = begin + (end - begin) / 2;
            std::nth_element(begin, middle, end, std::greater<>());
            const float pivot = *middle;
            const auto equal = std::partition(begin, middle, [=](float x) { return x > pivot; });
            double larger = 0.0;
            for (auto x = begin; x != equal; ++x) larger += weight(*x);
            if (above + larger >= target) {
                end = equal;
                continue;
            }
            lowest = pivot;
            const auto smaller = std::partition(middle, end, [=](float x) { return x == pivot; });
            above += larger + (smaller - equal) * weight(pivot);
            if (above >= target) break;
            begin = smaller;
        }
        return lowest;
    }

    // The first token in the order of ids at which the running sum of weights exceeds `target`.
    int64_t inverse_cdf(const Band& kept, double target) const {
        double before = 0.0;
        int64_t block = 0, last = 0;
        for (; block < row_.block_count(); ++block) {
            if (sums_[block] == 0) continue;
            last = block;
            if (before + sums_[block] > target) break;
            before += sums_[block];
        }
        if (block == row_.block_count()) before -= sums_[last];
        float weights[kBlock];
        block_weights(row_.blocks[last], scale_, kept.lowest, weights);
        if (kept.below < kInfinity) {
            for (int64_t i = 0; i < kBlock; ++i) weights[i] = row_.blocks[last][i] < kept.below ? weights[i] : 0.0f;
        }
        int64_t drawn = 0;
        for (int64_t i = 0; i < kBlock; ++i) {
            if (weights[i] == 0) continue;
            drawn = i;
            before += weights[i];
            if (before > target) break;
        }
        return last * kBlock + drawn;
    }
};

}  // namespace

template <class T>
void sample(const Sampling<T>& call, int num_threads) {
    parallel_for(0, call.rows, items_of(call.vocab_size, kPart), num_threads, [&](int64_t begin, int64_t end) {
        Sampler<T> sampler(call);
        for (int64_t row = begin; row < end; ++row) sampler.run(row);
    });
}

template void sample(const Sampling<float>&, int);
template void sample(const Sampling<BFloat16>&, int);
template void sample(const Sampling<Float16>&, int);

}  // namespace fastlm::cpu
