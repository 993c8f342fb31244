// Temporary: replaced by the thread pool.
#pragma once
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>
namespace fastlm::cpu {
template <class F>
void parallel_for(int64_t n, int num_threads, F&& f) {
    const int64_t parts = std::min<int64_t>(std::max(num_threads, 1), n);
    if (parts <= 1) { if (n) f(int64_t{0}, n); return; }
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < parts; ++i) threads.emplace_back([&f, n, parts, i] { f(n * i / parts, n * (i + 1) / parts); });
    f(int64_t{0}, n / parts);
    for (auto& t : threads) t.join();
}
}
