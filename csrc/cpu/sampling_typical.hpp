// Locally typical sampling (Meister et al. 2023): which logits of a row are nearest, as surprise, to the entropy.
//
// With s = (x - max) / temperature, Z the sum of exp(s) over the logits that earlier filters left, and c the mean of s
// under exp(s) / Z, a token's surprise is log Z - s and the entropy log Z - c: what is within some distance of it is a
// band of logits. One pass of exponentials gives Z and c. Another makes a histogram of weights over |s - c|, which says
// in which of its 1024 bins the last distance lies; the logits of that bin alone are searched by halves, their distances
// taken in fp64 as the definition takes them. Where few logits are left, all are looked at so, in fp64 throughout.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/sampling_passes.hpp"

namespace fastlm::cpu {

constexpr int64_t kFewCandidates = 1024;  // a search by halves among these takes less time than a histogram

// Finds bands, keeping its memory from row to row.
class TypicalSearch {
   public:
    // The band of the nearest of the logits not below `lowest`, which hold `typical_p` < 1 of the weight of these, with
    // all that are as far as the last of them.
    Band band(const Row& row, const Scale& scale, float lowest, double typical_p);

   private:
    struct Candidate {
        double distance, weight;
    };

    std::vector<double> sums_, moments_;
    std::vector<int32_t> ids_;
    std::vector<Candidate> candidates_;
    Histogram histogram_;

    double furthest(double before, double goal);
};

}  // namespace fastlm::cpu
