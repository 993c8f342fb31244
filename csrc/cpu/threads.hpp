// Splits [0, n) among threads that live for one call. To be replaced by a pool that outlives it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace fastlm::cpu {

template <class F>
void in_threads(int64_t n, int num_threads, F&& f) {
    const int64_t parts = std::min<int64_t>(std::max(num_threads, 1), n);
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < parts; ++i) threads.emplace_back([&f, n, parts, i] { f(n * i / parts, n * (i + 1) / parts); });
    if (n) f(int64_t{0}, n / parts);
    for (std::thread& thread : threads) thread.join();
}

}  // namespace fastlm::cpu
