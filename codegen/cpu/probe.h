// What this machine does at best: bytes read and multiply-adds a second.  A bound for every kernel;
// compiled by `dcompile/floor.py`, no part of an artifact.
//
//     probe_read   seconds f64 [1], weights, bytes, streams, threads    every byte once
//     probe_rate   seconds f64 [1], sums f32 [VL], rounds, threads      ROUND_FLOPS a round and thread,
//                  operands in registers
//     probe_pairs  the same with pairs of bf16, where the machine has the instruction
#pragma once

#include <time.h>

#include "team.h"

enum : int { CHAINS = 12 };  // enough for the latency of a multiply-add

static double clock_now() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// The words or-ed together, the least work that needs them all, from `streams` places in turn.
static vu read_share(const char *p, int64_t bytes, int64_t streams) {
    vu a = {}, b = {};
    const int64_t share = bytes / streams / 64 * 64;
    for (int64_t i = 0; i < share; i += 64)
        for (int64_t s = 0; s < streams; s++)
            for (int64_t j = 0; j < 64; j += 2 * sizeof(vu)) {
                vu x, y;
                memcpy(&x, p + s * share + i + j, sizeof x);
                memcpy(&y, p + s * share + i + (j + sizeof x) % 64, sizeof y);
                a |= x, b |= y;
            }
    return a | b;
}

template <class F> static void timed(double *seconds, int64_t threads, F &&f) {
    const double start = clock_now();
    region(threads, [&](Team &team) { f(team.rank(), team.size); });
    *seconds = clock_now() - start;
}

DC_EXPORT void probe_read(const Arg *a) {
    const char *p = ptr<char>(a[1]);
    const int64_t bytes = a[2].i, streams = a[3].i;
    timed(ptr<double>(a[0]), a[4].i, [&](int64_t rank, int64_t size) {
        const vu v = read_share(p + bytes / size * rank, bytes / size, streams);
        volatile uint32_t sink = v[0];
        (void)sink;
    });
}

DC_EXPORT void probe_rate(const Arg *a) {
    float *sums = ptr<float>(a[1]);
    timed(ptr<double>(a[0]), a[3].i, [&](int64_t rank, int64_t) {
        const vf by = load(sums), plus = by;
        vf c[CHAINS];
        for (int j = 0; j < CHAINS; j++) c[j] = by;
        for (int64_t i = a[2].i; i; i--) {
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
    const float *sums = ptr<float>(a[1]);
    timed(ptr<double>(a[0]), a[3].i, [&](int64_t, int64_t) {
        const __m512bh x = (__m512bh)load(sums);
        __m512 c[CHAINS];
        for (int j = 0; j < CHAINS; j++) c[j] = (__m512)load(sums);
        for (int64_t i = a[2].i; i; i--) {
#pragma GCC unroll 12
            for (int j = 0; j < CHAINS; j++) c[j] = _mm512_dpbf16_ps(c[j], x, x);
        }
        for (int j = 1; j < CHAINS; j++) c[0] += c[j];
        volatile float sink = hsum((vf)c[0]);
        (void)sink;
    });
}
#endif

// FLOP of one round of `probe_rate`; of `probe_pairs` twice as many.
DC_EXPORT void probe_round_flops(const Arg *a) { *ptr<int64_t>(a[0]) = 2 * CHAINS * VL; }
