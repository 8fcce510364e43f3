// The thread pool behind pool.h.
//
// A job is published under one word, `ticket` = generation << 32 | next index. Claiming an index is a compare-and-swap of the whole word, so
// a worker that wakes up late cannot touch a job that has ended. Between jobs the word is closed (index CLOSED) before the job's fields change.
#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() ((void)0)
#endif

namespace {
constexpr uint64_t CLOSED = 0xffffffff;
constexpr auto SPIN = std::chrono::microseconds(60);     // a worker stays awake this long for the next operator of a step
constexpr auto YIELDING = std::chrono::microseconds(200);  // then offers its core to others, then sleeps

struct Pool {
    std::atomic<uint64_t> ticket{CLOSED};
    std::atomic<void (*)(void*, long, int)> call{nullptr};
    std::atomic<void*> context{nullptr};
    std::atomic<long> count{0}, finished{0};
    std::atomic<int> threads{0}, sleepers{0};
    std::mutex busy, sleeping;
    std::condition_variable wake;
    int workers = 0;

    void work(int worker) {
        for (;;) {
            uint64_t seen = ticket.load(std::memory_order_acquire);
            long index = (long)(seen & CLOSED);
            if (index == (long)CLOSED || index >= count.load(std::memory_order_acquire)) return;
            auto function = call.load(std::memory_order_acquire);
            void* argument = context.load(std::memory_order_acquire);
            if (!ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
            function(argument, index, worker);
            finished.fetch_add(1, std::memory_order_release);
        }
    }

    void await(uint64_t generation) {
        auto start = std::chrono::steady_clock::now();
        for (int round = 1;; round++) {
            if (ticket.load(std::memory_order_acquire) >> 32 != generation) return;
            RELAX();
            if (round % 64) continue;
            auto waited = std::chrono::steady_clock::now() - start;
            if (waited > YIELDING) break;
            if (waited > SPIN) sched_yield();
        }
        std::unique_lock<std::mutex> lock(sleeping);
        sleepers++;
        wake.wait(lock, [&] { return ticket.load() >> 32 != generation; });
        sleepers--;
    }

    void loop(int worker) {
        uint64_t generation = 0;
        for (;;) {
            await(generation);
            generation = ticket.load(std::memory_order_acquire) >> 32;
            if (worker < threads.load(std::memory_order_acquire)) work(worker);
        }
    }

    void run(int wanted, long n, void (*function)(void*, long, int), void* argument) {
        for (; workers < wanted - 1; workers++) std::thread(&Pool::loop, this, workers + 1).detach();
        uint64_t generation = (ticket.load() >> 32) + 1;
        ticket.store((generation - 1) << 32 | CLOSED);
        threads.store(wanted, std::memory_order_release);
        call.store(function, std::memory_order_release);
        context.store(argument, std::memory_order_release);
        finished.store(0, std::memory_order_release);
        count.store(n, std::memory_order_release);
        ticket.store(generation << 32);
        if (sleepers.load()) {
            std::lock_guard<std::mutex> lock(sleeping);
            wake.notify_all();
        }
        work(0);
        for (int round = 1; finished.load(std::memory_order_acquire) != n; round++) round % 2048 ? RELAX() : (void)sched_yield();
        ticket.store(generation << 32 | CLOSED);
    }
};

Pool* pool = new Pool;  // never destroyed: workers outlive static destructors
int registered = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });  // a forked child has no workers
}  // namespace

void pool_run(int threads, long count, void (*call)(void*, long, int), void* context) {
    std::unique_lock<std::mutex> lock(pool->busy, std::try_to_lock);
    if (lock.owns_lock() && count < (long)CLOSED) return pool->run(threads, count, call, context);
    for (long i = 0; i < count; i++) call(context, i, 0);
}
