// A batch of independent texts over a few threads of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace fastlm::tokenizer {

// Calls body(0) … body(count - 1), in no order, on at most num_threads threads, the caller's among them. Rethrows an
// exception of a call when all threads have ended; calls not yet begun are then left out.
template <class Body>
void for_each_on_threads(size_t count, size_t num_threads, const Body& body) {
    std::exception_ptr failure;
    std::atomic<size_t> next = 0;
    std::atomic<bool> failed = false;
    const auto work = [&] {
        try {
            for (size_t i = next++; i < count && !failed; i = next++) body(i);
        } catch (...) {
            if (!failed.exchange(true)) failure = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    try {
        for (size_t i = 1; i < std::min(num_threads, count); ++i) threads.emplace_back(work);
    } catch (const std::system_error&) {
        // The system gives no more threads; those there are do the work.
    }
    work();
    for (std::thread& thread : threads) thread.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace fastlm::tokenizer
