// Threads that share out the indices of a loop. Made for a machine that others use too: the caller claims indices like every worker and
// never waits for a worker that has not started, only for indices that are being worked on. So a thread that the system has put aside costs
// one chunk of work, not the whole loop.
#pragma once
#include <type_traits>

// Calls call(context, index, worker) for every index in [0, count), on up to `threads` threads, and returns when all are done. A caller that
// finds the pool in use runs its loop alone.
void pool_run(int threads, long count, void (*call)(void*, long, int), void* context);

template <typename F>
static inline void each(int threads, long count, F&& body) {
    using Body = std::remove_reference_t<F>;
    if (threads < 2 || count < 2) {
        for (long i = 0; i < count; i++) body(i);
        return;
    }
    pool_run(threads, count, [](void* context, long i, int) { (*(Body*)context)(i); }, (void*)&body);
}
