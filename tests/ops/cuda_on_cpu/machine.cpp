// A GPU of one multiprocessor with one block on it. Each thread is a fiber that runs until it waits for its warp or its
// block; which goes on next is drawn. So a thread that reads what another has yet to write, for want of a barrier, will
// read NaN or what lay there before, sooner or later.
#include "cuda/device.hpp"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

extern "C" char __start_cuda_shared[] __attribute__((weak)), __stop_cuda_shared[] __attribute__((weak));

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 128 * 1024, kPage = 4096, kMostShared = 227 * 1024;

struct Copy {
    void* to;
    const void* from;
    bool wanted;
};

struct Fiber {
    unsigned id = 0;
    bool started = false, done = false;
    unsigned exchanges = 0;
    std::vector<Copy> open;                 // the copies since the last group
    std::deque<std::vector<Copy>> copies;   // the groups that have not arrived
    ucontext_t start{};
    jmp_buf state{};
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

struct Warp {
    alignas(16) std::array<std::array<char, 32 * kLaneBytes>, 2> handed{};
    std::vector<Fiber*> waiting;
    unsigned round = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<Fiber*> ready, at_barrier;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* running = nullptr;
std::mt19937 chance;
unsigned char* shared = nullptr;  // ends where memory ends, so that who reads past it stops the process

void body() {
    (*running)();
    current->done = true;
    for (const auto& group : current->copies) {
        if (!group.empty()) fail("a thread ended before its copies had arrived");
    }
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) void give_way() {
    if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
}

void resume(Fiber* fiber) {
    current = fiber;
    threadIdx = dim3(fiber->id);
    if (_setjmp(scheduler) != 0) return;
    if (fiber->started) _longjmp(fiber->state, 1);
    fiber->started = true;
    getcontext(&fiber->start);
    fiber->start.uc_stack = {.ss_sp = fiber->stack.get(), .ss_flags = 0, .ss_size = kStackBytes};
    makecontext(&fiber->start, body, 0);
    setcontext(&fiber->start);
}

void run_block(size_t shared_bytes) {
    std::memset(__start_cuda_shared, 0xFF, __stop_cuda_shared - __start_cuda_shared);
    static unsigned char* end = [] {
        void* memory = mmap(nullptr, kMostShared + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) fail("no memory");
        mprotect(static_cast<char*>(memory) + kMostShared, kPage, PROT_NONE);
        return static_cast<unsigned char*>(memory) + kMostShared;
    }();
    if (shared_bytes > kMostShared) fail("a block has no such amount of shared memory");
    shared = end - (shared_bytes + 15) / 16 * 16;
    std::memset(shared, 0xFF, end - shared);
    ready.clear();
    for (unsigned i = 0; i < blockDim.x; ++i) {
        if (i == fibers.size()) fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *fibers[i];
        fiber.id = i, fiber.started = fiber.done = false, fiber.exchanges = 0;
        fiber.open.clear(), fiber.copies.clear();
        ready.push_back(&fiber);
    }
    warps.resize(blockDim.x / 32);
    for (Warp& warp : warps) warp.round = 0, warp.waiting.clear();
    unsigned done = 0;
    while (!ready.empty()) {
        std::swap(ready[chance() % ready.size()], ready.back());
        Fiber* fiber = ready.back();
        ready.pop_back();
        resume(fiber);
        done += fiber->done;
    }
    if (done != blockDim.x) fail("threads wait for others that have ended, or wait elsewhere");
}

}  // namespace

void fail(const char* what) {
    std::fprintf(stderr, "CUDA on the CPU: %s\n", what);
    std::abort();
}

void wait_for_block() {
    at_barrier.push_back(current);
    if (at_barrier.size() == blockDim.x) {
        ready.insert(ready.end(), at_barrier.begin(), at_barrier.end());
        at_barrier.clear();
    }
    give_way();
}

const void* exchange(const void* mine, size_t bytes) {
    if (bytes > kLaneBytes) fail("a lane hands over too much");
    Fiber* self = current;
    Warp& warp = warps[self->id / 32];
    if (self->exchanges++ != warp.round) fail("lanes of a warp have lost each other");
    auto& handed = warp.handed[warp.round % 2];
    if (bytes) std::memcpy(handed.data() + self->id % 32 * kLaneBytes, mine, bytes);
    warp.waiting.push_back(self);
    if (warp.waiting.size() == 32) {
        ++warp.round;
        ready.insert(ready.end(), warp.waiting.begin(), warp.waiting.end());
        warp.waiting.clear();
    }
    give_way();
    return handed.data();
}

unsigned char* dynamic_shared() { return shared; }

void copy_async(void* to, const void* from, bool wanted) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("a copy is not aligned");
    std::memset(to, 0xFF, 16);
    current->open.push_back({to, from, wanted});
}

void end_copies() {
    current->copies.push_back(std::move(current->open));
    current->open.clear();
}

void wait_for_copies(int running) {
    while (current->copies.size() > static_cast<size_t>(running)) {
        for (const Copy& copy : current->copies.front()) {
            if (copy.wanted) std::memcpy(copy.to, copy.from, 16);
            else std::memset(copy.to, 0, 16);
        }
        current->copies.pop_front();
    }
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    const char* seed = std::getenv("CUDA_ON_CPU_SEED");
    chance.seed(seed ? std::strtoul(seed, nullptr, 10) : std::random_device{}());
    if (block.x % 32) fail("a block must be whole warps");
    gridDim = grid, blockDim = block, running = &kernel;
    std::vector<unsigned> order(grid.x * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), chance);
    for (const unsigned i : order) {
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        at_barrier.clear();
        run_block(shared_bytes);
    }
}

}  // namespace cuda_on_cpu
