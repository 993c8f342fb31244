#include "tokenizer/merge_runs.hpp"

#include <algorithm>
#include <array>

#include "tokenizer/hash.hpp"

namespace fastlm::tokenizer {

namespace {

constexpr size_t kMostByteRuns = 4;
constexpr size_t kMostRuns = 32;  // of tokens, while merging

struct Run {
    uint32_t id;
    size_t count;
};

class Runs {
public:
    void add(uint32_t id, size_t count) {
        if (count == 0) return;
        if (size_ && runs_[size_ - 1].id == id) {
            runs_[size_ - 1].count += count;
        } else if (size_ < kMostRuns) {
            runs_[size_++] = {id, count};
        } else {
            is_full_ = true;
        }
    }
    bool is_full() const { return is_full_; }
    size_t size() const { return size_; }
    const Run& operator[](size_t i) const { return runs_[i]; }

private:
    std::array<Run, kMostRuns> runs_;
    size_t size_ = 0;
    bool is_full_ = false;
};

const char* run_end(const char* p, const char* end) {
    const uint64_t eight = 0x0101010101010101u * static_cast<uint8_t>(*p);
    const char first = *p;
    while (end - p >= 8 && load8(p) == eight) p += 8;
    while (p < end && *p == first) ++p;
    return p;
}

struct Best {
    uint32_t priority = MergeRules::kNone;
    uint32_t left = 0;
    uint32_t right = 0;
};

Best lowest_pair(const MergeRules& rules, const Runs& runs) {
    Best best;
    const auto consider = [&](uint32_t left, uint32_t right) {
        const uint32_t priority = rules.find(left, right);
        if (priority < best.priority) best = {priority, left, right};
    };
    for (size_t i = 0; i < runs.size(); ++i) {
        if (runs[i].count > 1) consider(runs[i].id, runs[i].id);
        if (i + 1 < runs.size()) consider(runs[i].id, runs[i + 1].id);
    }
    return best;
}

}  // namespace

bool merge_runs(const MergeRules& rules, std::string_view piece, IdBuffer& ids) {
    Runs runs;
    const char* end = piece.data() + piece.size();
    size_t byte_runs = 0;
    for (const char* p = piece.data(); p < end;) {
        if (++byte_runs > kMostByteRuns) return false;
        const char* next = run_end(p, end);
        runs.add(rules.byte_id(static_cast<uint8_t>(*p)), static_cast<size_t>(next - p));
        p = next;
    }
    for (Best best; (best = lowest_pair(rules, runs)).priority != MergeRules::kNone;) {
        const uint32_t merged = rules.result(best.priority);
        Runs next;
        size_t used = 0;  // of the run at i, by a pair with the one before it
        for (size_t i = 0; i < runs.size(); ++i) {
            const Run run{runs[i].id, runs[i].count - used};
            used = 0;
            if (best.left == best.right && run.id == best.left) {
                next.add(merged, run.count / 2);
                next.add(run.id, run.count % 2);
            } else if (run.count && run.id == best.left && i + 1 < runs.size() && runs[i + 1].id == best.right) {
                next.add(run.id, run.count - 1);
                next.add(merged, 1);
                used = 1;
            } else {
                next.add(run.id, run.count);
            }
        }
        if (next.is_full()) return false;
        runs = next;
    }
    for (size_t i = 0; i < runs.size(); ++i) {
        ids.reserve(runs[i].count);
        std::fill_n(ids.end(), runs[i].count, runs[i].id);
        ids.advance(runs[i].count);
    }
    return true;
}

}  // namespace fastlm::tokenizer
