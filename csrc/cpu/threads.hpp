// Splits loops among threads that live for one call. To be replaced by a pool that outlives it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

// Calls f(from, to) for consecutive parts of [begin, end), multiples of `grain` but the last.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, int num_threads, F&& f) {
    const int64_t grains = (end - begin + grain - 1) / grain;
    const int64_t parts = std::min<int64_t>(std::max(num_threads, 1), grains);
    const auto at = [=](int64_t i) { return std::min(end, begin + grains * i / parts * grain); };
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < parts; ++i) threads.emplace_back([&f, at, i] { f(at(i), at(i + 1)); });
    if (parts) f(begin, at(1));
    for (std::thread& thread : threads) thread.join();
}

template <class Kernel, class Args>
void run_parallel(const Args& args, int64_t end, int64_t grain, int num_threads) {
    parallel_for(0, end, grain, num_threads, [&](int64_t from, int64_t to) { run_best<Kernel>(args, from, to); });
}

}  // namespace fastlm::cpu
