// Loops over a few threads that stay alive between calls.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/vector16.hpp"

namespace fastlm::cpu {

// Calls body(context, from, to) for consecutive parts of [begin, end), each of `grain` but the last, on the calling
// thread and at most num_threads - 1 others; returns when all are done. An exception of a part is thrown again here, and
// parts not yet begun are left out. Which thread takes a part is left to chance, so a part must not care.
//
// The calling thread does all by itself when there is one part, and inside another such loop. May be called from any
// thread, and in a child after fork(), which gets threads of its own.
void parallel_parts(int64_t begin, int64_t end, int64_t grain, int num_threads,
                    void (*body)(void* context, int64_t from, int64_t to), void* context);

// Loops no longer run on the threads of the OpenMP runtime. For a process that was forked before this code was loaded.
void use_own_threads();

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, int num_threads, F&& f) {
    using Function = std::remove_reference_t<F>;
    const auto body = [](void* context, int64_t from, int64_t to) { (*static_cast<Function*>(context))(from, to); };
    parallel_parts(begin, end, grain, num_threads, body, &f);
}

// run_best over [0, end), in parts of `grain`.
template <class Kernel, class Args>
void run_parallel(const Args& args, int64_t end, int64_t grain, int num_threads) {
    parallel_for(0, end, grain, num_threads, [&](int64_t from, int64_t to) { run_best<Kernel>(args, from, to); });
}

// How many items of `size` elements make a part of about `elements`.
inline int64_t items_of(int64_t size, int64_t elements) { return size < elements ? elements / (size ? size : 1) : 1; }

}  // namespace fastlm::cpu
