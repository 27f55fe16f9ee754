// Threads and scratch memory.
//
// A kernel opens at most one parallel region; inside, loops hand out chunks by a shared counter
// (the cores may be busy with other things) and `barrier` separates phases.
#pragma once

#include <omp.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "abi.h"
#include "simd.h"

static int64_t max_threads = 0;

static inline int64_t num_threads() {
    return max_threads > 0 ? max_threads : omp_get_max_threads();
}

static inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

struct Team {
    int64_t size;
    int64_t next[8] = {};

    static int64_t rank() { return omp_get_thread_num(); }

    static void barrier() {
#pragma omp barrier
    }

    // body(first, last) over chunks of [0, n); `phase` numbers the loops of a region.
    template <class F> void loop(int phase, int64_t n, int64_t chunk, F &&body) {
        for (;;) {
            int64_t first = __atomic_fetch_add(&next[phase], chunk, __ATOMIC_RELAXED);
            if (first >= n) return;
            body(first, min_of(first + chunk, n));
        }
    }

    // The same, with smaller chunks toward the end: where items differ, no thread waits long for another.
    template <class F> void loop_uneven(int phase, int64_t n, int64_t chunk, F &&body) {
        for (int64_t first = __atomic_load_n(&next[phase], __ATOMIC_RELAXED); first < n;) {
            const int64_t last = first + max_of(1, min_of(chunk, (n - first) / (2 * size)));
            if (!__atomic_compare_exchange_n(&next[phase], &first, last, false, __ATOMIC_RELAXED,
                                             __ATOMIC_RELAXED))
                continue;
            body(first, last);
            first = last;
        }
    }
};

// Rows that the thread's AMX tiles are set for; 0 where they are not in use.  Setting and releasing them for
// every panel drained what was on its way from memory.  Left in use they would cost 8 KB at every switch of
// threads, so a region ends with their release.
static thread_local int64_t tiles_set = 0;
static inline void release_tiles() {
#if defined(__AMX_BF16__)
    if (tiles_set) asm volatile("tilerelease" : : : "memory");
    tiles_set = 0;
#endif
}

// f(team) on each of `threads` threads.
template <class F> static inline void region(int64_t threads, F &&f) {
    Team team{threads};
    if (threads <= 1) {
        team.size = 1;
        f(team);
        release_tiles();
        return;
    }
#pragma omp parallel num_threads((int)threads)
    {
        f(team);
        release_tiles();
    }
}

// Threads worth starting for so much work (in multiply-adds, or bytes moved).
static inline int64_t threads_for(int64_t work) {
    return work < 200000 ? 1 : min_of(num_threads(), work / 100000);
}

// body(first, last) over [0, n), `work` in all.
template <class F> static inline void parallel_for(int64_t n, int64_t work, F &&body) {
    int64_t threads = threads_for(work);
    region(threads, [&](Team &t) { t.loop(0, n, max_of(1, div_up(n, threads * 4)), body); });
}

// The calling thread's scratch memory; what an earlier call returned is void afterwards.
struct Scratch {
    char *memory;
    size_t size;
};
static pthread_key_t scratch_key;
static void free_scratch(void *p) {
    free(static_cast<Scratch *>(p)->memory);
    free(p);
}
__attribute__((constructor)) static void make_scratch_key() {
    pthread_key_create(&scratch_key, free_scratch);
}

static inline char *scratch(size_t bytes) {
    Scratch *s = static_cast<Scratch *>(pthread_getspecific(scratch_key));
    if (!s) {
        s = static_cast<Scratch *>(calloc(1, sizeof(Scratch)));
        if (!s) abort();
        pthread_setspecific(scratch_key, s);
    }
    if (s->size < bytes) {
        free(s->memory);
        const size_t page = bytes < (512 << 10) ? 4096 : 2 << 20;
        s->size = (bytes + bytes / 4 + page - 1) & ~(page - 1);
        s->memory = static_cast<char *>(aligned_alloc(page, s->size));
        if (!s->memory) abort();
#ifdef MADV_HUGEPAGE
        if (page > 4096) madvise(s->memory, s->size, MADV_HUGEPAGE);  // as in runtime/pages.py
#endif
    }
    return s->memory;
}

// Lays out arrays one after the other: first with base null to learn the size, then in earnest.
struct Carve {
    char *base;
    size_t used = 0;

    template <class T> T *take(int64_t n) {
        char *p = base + used;
        used += (size_t(n) * sizeof(T) + 127) & ~size_t(63);
        return reinterpret_cast<T *>(p);
    }
};
