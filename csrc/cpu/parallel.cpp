// Where the process has an OpenMP runtime, which torch brings, loops run on its threads: they go on spinning for
// milliseconds after each of torch's operations, and threads of our own would share the cores with them. Elsewhere, and
// in a child after fork(), which that runtime does not survive, there is a pool.
//
// A caller of the pool publishes its loop and raises `generation_`. Workers spin on that for a few microseconds after each
// loop, so that kernels that follow each other closely need no system call, and then sleep, so that they do not take a
// core from another library's threads. Parts are handed out by a counter. One caller at a time has the workers; a second
// does its loop alone, which costs less than waiting when all cores are busy anyway.
#include "cpu/parallel.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace fastlm::cpu {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kSpins = 300;  // pauses, of about 15 ns each: some 5 µs

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A loop whose parts several threads take in turn.
class Loop {
   public:
    Loop(int64_t begin, int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context)
        : next_(begin), end_(end), grain_(grain), body_(body), context_(context) {}

    void take_parts() {
        for (;;) {
            const int64_t from = next_.fetch_add(grain_, std::memory_order_relaxed);
            if (from >= end_) return;
            try {
                body_(context_, from, std::min(from + grain_, end_));
            } catch (...) {
                next_.store(end_, std::memory_order_relaxed);
                std::lock_guard lock(failed_);
                if (!error_) error_ = std::current_exception();
            }
        }
    }

    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

   private:
    std::atomic<int64_t> next_;
    int64_t end_, grain_;
    void (*body_)(void*, int64_t, int64_t);
    void* context_;
    std::mutex failed_;
    std::exception_ptr error_;
};

class Pool {
   public:
    void run(Loop& loop, int num_threads) {
        if (busy_.exchange(true, std::memory_order_acquire)) return loop.take_parts();
        const int helpers = std::min(num_threads, kMaxThreads) - 1;
        start_workers(helpers);
        helpers_.store(helpers, std::memory_order_relaxed);
        loop_ = &loop;
        guests_.store(kOpen, std::memory_order_release);
        generation_.fetch_add(1);
        if (sleepers_.load() > 0) {
            { std::lock_guard lock(sleep_); }  // no worker is between its last look and its sleep
            wake_.notify_all();
        }
        loop.take_parts();
        guests_.fetch_and(~kOpen);
        for (int spins = 0; guests_.load(std::memory_order_acquire) != 0; ++spins) {
            spins < kSpins ? pause() : std::this_thread::yield();
        }
        busy_.store(false, std::memory_order_release);
    }

   private:
    static constexpr uint32_t kOpen = 1u << 31;

    std::atomic<bool> busy_{false};
    int workers_ = 0;  // this and the loop belong to the caller that has made busy_ true

    std::atomic<int> helpers_{0};  // how many workers may be inside at once
    Loop* loop_ = nullptr;
    std::atomic<uint32_t> guests_{0};  // workers inside the loop, and kOpen while more may enter

    std::atomic<uint64_t> generation_{0};
    std::atomic<int> sleepers_{0};
    std::mutex sleep_;
    std::condition_variable wake_;

    void start_workers(int wanted) {
        if (workers_ >= wanted) return;
        // Signals are for the program's own threads.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (; workers_ < wanted; ++workers_) std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {  // the system gives no more threads: fewer do it too
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    bool enter() {
        uint32_t guests = guests_.load(std::memory_order_acquire);
        while (guests & kOpen) {
            if (static_cast<int>(guests & ~kOpen) >= helpers_.load(std::memory_order_relaxed)) return false;
            if (guests_.compare_exchange_weak(guests, guests + 1, std::memory_order_acq_rel)) return true;
        }
        return false;
    }

    void work() {
        uint64_t seen = 0;
        for (;;) {
            for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins) pause();
            if (generation_.load(std::memory_order_acquire) == seen) {
                std::unique_lock lock(sleep_);
                sleepers_.fetch_add(1);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
                sleepers_.fetch_sub(1);
            }
            seen = generation_.load(std::memory_order_acquire);
            if (enter()) {
                loop_->take_parts();
                guests_.fetch_sub(1, std::memory_order_release);
            }
        }
    }
};

// What `#pragma omp parallel` compiles to: fn(data) on num_threads threads. LLVM's and Intel's runtimes have it too.
using OpenMp = void (*)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);

std::atomic<bool> is_forked{false};

// Never destroyed, since its threads run until the process ends. A child of fork() has none of them and makes another.
std::atomic<Pool*> pool{nullptr};

// From the beginning: torch may have started the runtime's threads before any loop of ours.
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] {
    pool.store(nullptr, std::memory_order_relaxed);
    use_own_threads();
});

Pool& get_pool() {
    Pool* current = pool.load(std::memory_order_acquire);
    if (current) return *current;
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(current, made, std::memory_order_acq_rel)) return *made;
    delete made;
    return *current;
}

}  // namespace

void use_own_threads() { is_forked.store(true, std::memory_order_relaxed); }

void parallel_parts(int64_t begin, int64_t end, int64_t grain, int num_threads,
                    void (*body)(void* context, int64_t from, int64_t to), void* context) {
    if (begin >= end) return;
    if (num_threads <= 1 || end - begin <= grain) return body(context, begin, end);
    static const auto open_mp = reinterpret_cast<OpenMp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    Loop loop(begin, end, grain, body, context);
    if (open_mp && !is_forked.load(std::memory_order_relaxed)) {
        // As many threads as torch asks for, even where there are fewer parts: the runtime ends those that a smaller team
        // leaves out, and starts them anew for the next.
        open_mp([](void* data) { static_cast<Loop*>(data)->take_parts(); }, &loop, static_cast<unsigned>(num_threads), 0);
    } else {
        const int64_t parts = (end - begin + grain - 1) / grain;
        get_pool().run(loop, static_cast<int>(std::min<int64_t>(num_threads, parts)));
    }
    loop.rethrow();
}

}  // namespace fastlm::cpu
