// attend: o[R, H, D] = softmax(scale q K^T) V over the first row_limit[r] keys of the row's slot.
//
// q [R, H, D]; keys, values [N, L, G, D]; H / G query heads share a K/V head.  Rows that follow one
// another with equal slot and limit are a run; the queries of a run's chunk that share a K/V head
// go through the keys together, 64 at a time from key 0 on, with an online softmax.  The tiles do
// not depend on the other rows, so neither do the bits.  No keys: zeros.
#pragma once

#include "gemm.h"

enum : int64_t { KEYS = 64, QUERIES = 4 * MR };

struct AttendShape {
    int64_t R, H, G, D, L;
    float scale;
};

// K tile, transposed into panels of keys: [2][D][32], as pack.py packs a weight of 64 rows.
template <class T>
static INLINE void pack_keys(float *panels, const T *keys, int64_t stride, int64_t n, int64_t D) {
    if (n < KEYS) memset(panels, 0, size_t(KEYS * D) * sizeof(float));
    for (int64_t key = 0; key < n; key++) {
        float *to = panels + key / PANEL * PANEL * D + key % PANEL;
        for (int64_t d = 0; d < D; d += VL) {
            float t[VL];
            store(t, load_n(keys + key * stride + d, D - d));
            for (int64_t i = 0; i < VL && d + i < D; i++) to[(d + i) * PANEL] = t[i];
        }
    }
}

// V tile into panels of 32 of its columns: [ceil(D/32)][64][32].
template <class T>
static INLINE void pack_values(float *panels, const T *values, int64_t stride, int64_t n, int64_t D) {
    if (n < KEYS || D % PANEL)
        memset(panels, 0, size_t(div_up(D, PANEL) * KEYS * PANEL) * sizeof(float));
    for (int64_t key = 0; key < n; key++)
        for (int64_t d = 0; d < D; d += VL) {
            float *to = panels + (d / PANEL * KEYS + key) * PANEL + d % PANEL;
            store_n(to, load_n(values + key * stride + d, D - d), D - d);
        }
}

#if defined(__AVX512BF16__)
static INLINE void pack_keys(bf16 *panels, const bf16 *keys, int64_t stride, int64_t n, int64_t D) {
    const int64_t pairs = (D + 1) / 2;
    if (n < KEYS || D % 2) memset(panels, 0, size_t(KEYS * pairs) * 4);
    for (int64_t key = 0; key < n; key++) {
        uint32_t *to = reinterpret_cast<uint32_t *>(panels) + key / PANEL * PANEL * pairs + key % PANEL;
        const bf16 *from = keys + key * stride;
        for (int64_t d = 0; d + 1 < D; d += 2) memcpy(to + d / 2 * PANEL, from + d, 4);
        if (D % 2) memcpy(to + D / 2 * PANEL, from + D - 1, 2);
    }
}
static INLINE void pack_values(bf16 *panels, const bf16 *values, int64_t stride, int64_t n,
                               int64_t D) {
    if (n < KEYS || D % PANEL) memset(panels, 0, size_t(div_up(D, PANEL) * KEYS * PANEL) * 2);
    for (int64_t key = 0; key < n; key += 2) {
        const bf16 *even = values + key * stride, *odd = even + stride;
        for (int64_t d = 0; d < D; d++) {
            bf16 *to = panels + (d / PANEL * KEYS + key) * PANEL + d % PANEL * 2;
            to[0] = even[d];
            if (key + 1 < n) to[1] = odd[d];
        }
    }
}
#endif

// What one thread needs for a chunk of queries.
template <class A> struct AttendScratch {
    A *q, *p, *k, *v;
    float *scores, *out, *best, *sum;

    AttendScratch(Carve &carve, int64_t queries, int64_t D, int64_t row, int64_t prow) {
        const int64_t wide = div_up(D, PANEL) * PANEL;
        q = carve.take<A>(queries * row);
        p = carve.take<A>(queries * prow);
        k = carve.take<A>(KEYS * (D + 1));
        v = carve.take<A>(KEYS * wide);
        scores = carve.take<float>(queries * KEYS);
        out = carve.take<float>(queries * wide);
        best = carve.take<float>(queries);
        sum = carve.take<float>(queries * VL);
    }
};

// One tile of keys for one query: scores to probabilities; returns what the past is scaled by.
template <class A>
static INLINE float soften(const float *s0, const float *s1, A *p, int64_t live, float scale,
                           float *best, float *sum) {
    vf s[KEYS / VL], top = splat(-__builtin_inff());
    for (int64_t j = 0; j < KEYS / VL; j++) {
        s[j] = load((j * VL < PANEL ? s0 : s1 - PANEL) + j * VL) * scale;
        if (live < KEYS) s[j] = lanes() + int32_t(j * VL) < int32_t(live) ? s[j] : splat(-__builtin_inff());
        top = vmax(s[j], top);
    }
    const float old = *best, peak = hmax(top), now = peak > old ? peak : old;
    const float shift = now == -__builtin_inff() ? 0.0f : now;
    const float fade = exp1(old - shift);
    vf total = load(sum) * fade;
    for (int64_t j = 0; j < KEYS / VL; j++) {
        vf e = vexp(s[j] - shift);
        store(p + j * VL, e);
        total += sizeof(A) == 4 ? e : rounded<A>(e);
    }
    store(sum, total);
    *best = now;
    return fade;
}

template <class T> struct AttendTypes {
    typedef typename Operand<T>::A A;
    // The products read K, V and probabilities as A; where that is float32, as float32 panels.
    enum : int64_t { LDA = Operand<A>::LDA };
};

template <class T>
static void attend_chunk(T *o, const T *q, const T *keys, const T *values, int64_t rows,
                         int64_t limit, const AttendShape &s,
                         AttendScratch<typename AttendTypes<T>::A> &w) {
    typedef typename AttendTypes<T>::A A;
    const int64_t D = s.D, heads = s.H / s.G, M = rows * heads, stride = s.G * D;
    const int64_t panels = div_up(D, PANEL), LDA = Operand<A>::LDA;
    const Tiling tiles(M);
    auto at = [&](int64_t i) { return (i / heads * s.H + i % heads) * D; };

    for (int64_t t = 0; t < tiles.count; t++) {
        const int64_t first = tiles.first(t);
        pack_rows<T>(w.q + first * row_size<A>(D), tiles.size(t), D,
                     [&](int64_t i) { return q + at(first + i); });
    }
    memset(w.out, 0, size_t(M * panels * PANEL) * 4);
    memset(w.sum, 0, size_t(M * VL) * 4);
    for (int64_t i = 0; i < M; i++) w.best[i] = -__builtin_inff();

    for (int64_t key = 0; key < limit; key += KEYS) {
        const int64_t live = min_of(KEYS, limit - key);
        pack_keys(w.k, keys + key * stride, stride, live, D);
        pack_values(w.v, values + key * stride, stride, live, D);
        for (int64_t t = 0; t < tiles.count; t++) {
            const int64_t first = tiles.first(t), m = tiles.size(t);
            float *scores = w.scores + first * KEYS;
            const A *a = w.q + first * row_size<A>(D);
            const Prefetch none{reinterpret_cast<const char *>(a), 0};
            for (int64_t half = 0; half < 2; half++)
                gemm<A>(m, a, w.k + half * panel_size<A>(D), D, scores + half * m * PANEL, false, none);
            float *out = w.out + first * panels * PANEL;
            for (int64_t i = 0; i < m; i++) {
                const int64_t row = first + i;
                const float fade = soften(scores + i * PANEL, scores + (m + i) * PANEL,
                                          w.p + row * LDA, live, s.scale, w.best + row, w.sum + row * VL);
                for (int64_t p = 0; p < panels && fade != 1.0f; p++)
                    for (int64_t j = 0; j < PANEL; j += VL) {
                        float *c = out + (p * m + i) * PANEL + j;
                        store(c, load(c) * fade);
                    }
            }
            for (int64_t p = 0; p < panels; p++)
                gemm<A>(m, w.p + first * LDA, w.v + p * KEYS * PANEL, KEYS, out + p * m * PANEL, true, none);
        }
    }
    for (int64_t t = 0; t < tiles.count; t++)
        for (int64_t i = 0, m = tiles.size(t); i < m; i++) {
            const int64_t row = tiles.first(t) + i;
            const float total = hsum(load(w.sum + row * VL));
            const float by = limit > 0 ? 1.0f / total : 0.0f;
            for (int64_t d = 0; d < D; d += VL) {
                const float *c = w.out + tiles.first(t) * panels * PANEL + (d / PANEL * m + i) * PANEL;
                store_n(o + at(row) + d, load(c + d % PANEL) * by, D - d);
            }
        }
}

template <class T>
static void attend(T *o, const T *q, const T *keys, const T *values, const int64_t *row_seq,
                   const int64_t *row_limit, AttendShape s) {
    typedef typename AttendTypes<T>::A A;
    if (s.R <= 0) return;
    const int64_t heads = s.H / s.G, most = max_of(1, QUERIES / heads);
    const int64_t row = row_size<A>(s.D), prow = Operand<A>::LDA;
    int64_t work = 0;
    for (int64_t r = 0; r < s.R; r++) work += (row_limit[r] + KEYS) * s.H * s.D * 2;
    const int64_t threads = threads_for(work / 4);

    Carve measure{nullptr};
    AttendScratch<A>(measure, most * heads, s.D, row, prow);
    Carve carve{scratch(measure.used * threads + (s.R + 1) * 8 + 256)};
    int64_t *starts = carve.take<int64_t>(s.R + 1), chunks = 0;
    for (int64_t r = 0; r < s.R; r++) {
        const bool same = r && row_seq[r] == row_seq[r - 1] && row_limit[r] == row_limit[r - 1];
        if (!same || r - starts[chunks - 1] == most) starts[chunks++] = r;
    }
    starts[chunks] = s.R;

    region(threads, [&](Team &team) {
        Carve own{carve.base + carve.used + team.rank() * measure.used};
        AttendScratch<A> w(own, most * heads, s.D, row, prow);
        team.loop(0, chunks * s.G, 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                const int64_t chunk = i / s.G, g = i % s.G, r = starts[chunk];
                const int64_t head = g * heads * s.D, kv = row_seq[r] * s.L * s.G * s.D + g * s.D;
                attend_chunk<T>(o + r * s.H * s.D + head, q + r * s.H * s.D + head, keys + kv,
                                values + kv, starts[chunk + 1] - r, row_limit[r], s, w);
            }
        });
    });
}
