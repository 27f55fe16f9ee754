// What this machine does at best: bytes read and multiply-adds a second.  A bound for every kernel;
// compiled by `dcompile/cost/machine.py`, no part of an artifact.
//
//     probe_read   seconds f64 [1], weights, bytes, streams, ahead, threads    every byte once; asks
//                  for what lies `ahead` bytes further on
//     probe_rate   rate f64 [1], rounds, threads       FLOP a second, all threads together, of
//                  multiply-adds with operands in registers
//     probe_pairs, probe_tiles   the same of bf16 in pairs and in AMX tiles, where the machine has them
#pragma once

#include <time.h>

#include "amx.h"

enum : int { CHAINS = 12 };  // enough for the latency of a multiply-add

static double clock_now() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// The words or-ed together, the least work that needs them all, from `streams` places in turn.
static vu read_share(const char *p, int64_t bytes, int64_t streams, int64_t ahead) {
    vu a = {}, b = {};
    const int64_t share = bytes / streams / 64 * 64;
    for (int64_t i = 0; i < share; i += 64)
        for (int64_t s = 0; s < streams; s++) {
            __builtin_prefetch(p + s * share + i + ahead, 0, 2);
            for (int64_t j = 0; j < 64; j += 2 * sizeof(vu)) {
                vu x, y;
                memcpy(&x, p + s * share + i + j, sizeof x);
                memcpy(&y, p + s * share + i + (j + sizeof x) % 64, sizeof y);
                a |= x, b |= y;
            }
        }
    return a | b;
}

// f(rank, threads) on each thread: the seconds that it took.
template <class F> static double timed(int64_t threads, F &&f) {
    const double start = clock_now();
    region(threads, [&](Team &team) { f(team.rank(), team.size); });
    return clock_now() - start;
}

DC_EXPORT void probe_read(const Arg *a) {
    const char *p = ptr<char>(a[1]);
    const int64_t bytes = a[2].i, streams = a[3].i, ahead = a[4].i;
    *ptr<double>(a[0]) = timed(a[5].i, [&](int64_t rank, int64_t size) {
        const vu v = read_share(p + bytes / size * rank, bytes / size, streams, ahead);
        volatile uint32_t sink = v[0];
        (void)sink;
    });
}

// work(): so many FLOP, done `rounds` times.
template <class F> static double rate_of(double flops, int64_t rounds, int64_t threads, F &&work) {
    const double seconds = timed(threads, [&](int64_t, int64_t) { work(rounds); });
    return flops * double(rounds) * double(threads) / seconds;
}

DC_EXPORT void probe_rate(const Arg *a) {
    *ptr<double>(a[0]) = rate_of(2 * CHAINS * VL, a[1].i, a[2].i, [](int64_t rounds) {
        volatile float one = 1.0f;
        const vf by = splat(one), plus = by;
        vf c[CHAINS];
        for (int j = 0; j < CHAINS; j++) c[j] = by;
        for (; rounds; rounds--) {
#pragma GCC unroll 12
            for (int j = 0; j < CHAINS; j++) c[j] = fma(c[j], by, plus);
        }
        for (int j = 1; j < CHAINS; j++) c[0] += c[j];
        volatile float sink = hsum(c[0]);
        (void)sink;
    });
}

#if defined(__AVX512BF16__)
DC_EXPORT void probe_pairs(const Arg *a) {
    *ptr<double>(a[0]) = rate_of(4 * CHAINS * VL, a[1].i, a[2].i, [](int64_t rounds) {
        volatile float one = 1.0f;
        const __m512bh x = (__m512bh)splat(one);
        __m512 c[CHAINS];
        for (int j = 0; j < CHAINS; j++) c[j] = (__m512)splat(one);
        for (; rounds; rounds--) {
#pragma GCC unroll 12
            for (int j = 0; j < CHAINS; j++) c[j] = _mm512_dpbf16_ps(c[j], x, x);
        }
        for (int j = 1; j < CHAINS; j++) c[0] += c[j];
        volatile float sink = hsum((vf)c[0]);
        (void)sink;
    });
}
#endif

#if defined(__AMX_BF16__)
DC_EXPORT void probe_tiles(const Arg *a) {
    const double flops = 4 * 2 * TILE_ROWS * TILE_COLUMNS * TILE_K;
    *ptr<double>(a[0]) = rate_of(flops, a[1].i, a[2].i, [](int64_t rounds) {
        TileConfig config;
        for (int i = 0; i < 8; i++) config.tile(i, 16);
        const Tiles tiles(config);
        for (; rounds; rounds--) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    });
}
#endif
