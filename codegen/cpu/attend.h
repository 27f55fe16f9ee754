// attend: o[R, H, D] = softmax(scale q K^T) V over the first row_limit[r] keys of the row's slot.
//
// q [R, H, D]; keys, values [N, L, G, D]; H / G query heads share a K/V head.  Rows that follow one
// another with equal slot and limit are a run, and a run's queries for one K/V head go through the
// keys together, up to two panels of 32 at once, KEYS keys at a time from key 0 on:
//
//     S [keys, 32] = K [keys, D] (scale Q)^T [D, 32]      a query is a lane in all of it, so
//     P = exp(S - max), with an online softmax            nothing is reduced across lanes
//     O^T [D, 32] += V^T [D, keys] P [keys, 32]
//
// A lane does not know the others, so the bits do not depend on them.  No keys: zeros.
#pragma once

#include "gemm.h"

enum : int64_t { KEYS = VL == 16 ? 56 : 48, QUERY_PANELS = 2, QUERIES = QUERY_PANELS * PANEL };

struct AttendShape {
    int64_t R, H, G, D, L;
    float scale;
};

// ---- C[M, columns] (+)= A[M, kc] B[kc, 32] in float32: A[i, k] is at a[i * row + k * column]

template <int M, int NV, bool TRANSPOSED>
static __attribute__((noinline)) void lanes_micro(const float *a, int64_t column, const float *b,
                                                  int64_t kc, float *c, bool add) {
    Tile<M, NV> tile;
    tile.clear();
    for (int64_t k = 0; k < kc; k++, b += PANEL) {
        vf columns[NV];
        for (int j = 0; j < NV; j++) columns[j] = load(b + j * VL);
        if (TRANSPOSED)
            tile.step(a + k * column, 1, columns);
        else
            tile.step(a + k, Operand<float>::LDA, columns);
    }
    tile.put(c, add);
}

template <int NV, bool TRANSPOSED> struct LanesMicro {
    typedef void (*Fn)(const float *, int64_t, const float *, int64_t, float *, bool);
    template <int M> static constexpr Fn at = lanes_micro<M, NV, TRANSPOSED>;
    static constexpr Fn of[15] = {
        nullptr, at<1>, at<2>,  at<3>,  at<4>,  at<5>,  at<6>,
#if defined(__AVX512F__)
        at<7>,   at<8>, at<9>,  at<10>, at<11>, at<12>, at<13>, at<14>,
#endif
    };
};

// A call of the above for the first `live` of 32 lanes.
template <bool TRANSPOSED>
static INLINE void lanes_gemm(int64_t m, int64_t live, const float *a, int64_t column,
                              const float *b, int64_t kc, float *c, bool add) {
    for (int64_t j = 0; j < live; j += 2 * VL) {
        if (live - j <= VL)
            LanesMicro<1, TRANSPOSED>::of[m](a, column, b + j, kc, c + j, add);
        else
            LanesMicro<2, TRANSPOSED>::of[m](a, column, b + j, kc, c + j, add);
    }
}

// ---- one panel of queries

struct Queries {
    float *q;        // [D][32], scaled
    float *out;      // O^T [D][32]
    float *best, *sum;  // [32]
    int64_t live;    // queries in the panel

    Queries() = default;
    Queries(Carve &carve, int64_t D) {
        q = carve.take<float>(D * PANEL), out = carve.take<float>(D * PANEL);
        best = carve.take<float>(PANEL), sum = carve.take<float>(PANEL);
    }

    // at(i): where the i-th query starts
    template <class T, class At> INLINE void read(const T *x, int64_t D, float scale, At &&at) {
        memset(q, 0, size_t(D * PANEL) * 4);
        memset(out, 0, size_t(D * PANEL) * 4);
        memset(sum, 0, size_t(PANEL) * 4);
        for (int64_t i = 0; i < PANEL; i++) best[i] = -__builtin_inff();
        for (int64_t i = 0; i < live; i++)
            for (int64_t d = 0; d < D; d += VL) {
                float t[VL];
                store(t, load_n(x + at(i) + d, D - d) * scale);
                for (int64_t l = 0; l < VL && d + l < D; l++) q[(d + l) * PANEL + i] = t[l];
            }
    }
    template <class T, class At> INLINE void write(T *o, int64_t D, bool any, At &&at) const {
        for (int64_t i = 0; i < live; i++) {
            const float by = any ? 1.0f / sum[i] : 0.0f;
            for (int64_t d = 0; d < D; d += VL) {
                float t[VL] = {};
                for (int64_t l = 0; l < VL && d + l < D; l++) t[l] = out[(d + l) * PANEL + i];
                store_n(o + at(i) + d, load(t) * by, D - d);
            }
        }
    }

    // Scores [keys][32] to probabilities; the past is scaled down to the new maximum.
    INLINE void soften(float *s, int64_t keys, int64_t D) {
        const float low = -__builtin_inff();
        for (int64_t j = 0; j < live; j += VL) {
            const vf old = load(best + j);
            vf peak = old, other = old;
            int64_t key = 0;
            for (; key + 1 < keys; key += 2) {
                peak = vmax(load(s + key * PANEL + j), peak);
                other = vmax(load(s + (key + 1) * PANEL + j), other);
            }
            if (key < keys) peak = vmax(load(s + key * PANEL + j), peak);
            peak = vmax(other, peak);
            const vf shift = peak == splat(low) ? vf{} : peak;
            const vf fade = vexp(old - shift);
            vf total = load(sum + j) * fade;
            for (key = 0; key < keys; key++) {
                const vf e = vexp(load(s + key * PANEL + j) - shift);
                store(s + key * PANEL + j, e);
                total += e;
            }
            store(sum + j, total);
            store(best + j, peak);
            for (int64_t d = 0; d < D; d++) {
                float *c = out + d * PANEL + j;
                store(c, load(c) * fade);
            }
        }
    }
};

struct AttendScratch {
    Queries panel[QUERY_PANELS];
    float *k, *v, *scores;

    AttendScratch(Carve &carve, int64_t D) {
        for (Queries &p : panel) p = Queries(carve, D);
        k = carve.take<float>(KEYS * row_size<float>(D));
        v = carve.take<float>(KEYS * D + 2 * VL);
        scores = carve.take<float>(KEYS * PANEL);
    }
};

// V tile as float32, one key after the other.  In place the keys are a power of two apart, and
// would share a few sets of the first cache.
template <class T>
static INLINE void read_values(float *to, const T *values, int64_t stride, int64_t n, int64_t D) {
    for (int64_t i = 0; i < n; i++) copy_row(to + i * D, values + i * stride, D);
}

// A head's rows lie too far apart for the hardware to guess the next ones.
template <class T>
static INLINE void fetch_rows(const T *x, int64_t stride, int64_t n, int64_t D) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T)))
            __builtin_prefetch(x + i * stride + d, 0, 2);
}

// K tile as A, tile after tile of rows.
template <class T>
static INLINE void read_keys(float *a, const Tiling &tiles, const T *keys, int64_t stride, int64_t D) {
    for (int64_t t = 0; t < tiles.count; t++)
        for (int64_t d = 0, i = 0; d < D; d += KC)
            for (i = 0; i < tiles.size(t); i++, a += Operand<float>::LDA)
                copy_row(a, keys + (tiles.first(t) + i) * stride + d, min_of(KC, D - d));
}

// Queries [first, first + M) of a run that starts at o and q, for one K/V head.
template <class T>
static void attend_chunk(T *o, const T *q, const T *keys, const T *values, int64_t first,
                         int64_t M, int64_t limit, const AttendShape &s, AttendScratch &w) {
    const int64_t D = s.D, heads = s.H / s.G, stride = s.G * D, panels = div_up(M, PANEL);
    const Tiling columns = tiles_of<float>(D);
    auto at = [&](int64_t i) { return ((first + i) / heads * s.H + (first + i) % heads) * D; };

    for (int64_t p = 0; p < panels; p++) {
        w.panel[p].live = min_of(PANEL, M - p * PANEL);
        w.panel[p].read(q, D, s.scale, [&](int64_t i) { return at(p * PANEL + i); });
    }
    for (int64_t key = 0; key < limit; key += KEYS) {
        const int64_t n = min_of(KEYS, limit - key);
        const Tiling tiles = tiles_of<float>(n);
        const int64_t next = min_of(KEYS, limit - key - n);
        read_values(w.v, values + key * stride, stride, n, D);
        read_keys(w.k, tiles, keys + key * stride, stride, D);
        fetch_rows(keys + (key + n) * stride, stride, next, D);
        fetch_rows(values + (key + n) * stride, stride, next, D);
        for (int64_t p = 0; p < panels; p++) {
            Queries &panel = w.panel[p];
            for (int64_t t = 0; t < tiles.count; t++) {
                const float *a = w.k + tiles.first(t) * row_size<float>(D);
                float *c = w.scores + tiles.first(t) * PANEL;
                for (int64_t d = 0; d < D; d += KC, a += tiles.size(t) * Operand<float>::LDA)
                    lanes_gemm<false>(tiles.size(t), panel.live, a, 0, panel.q + d * PANEL,
                                      min_of(KC, D - d), c, d > 0);
            }
            panel.soften(w.scores, n, D);
            for (int64_t t = 0; t < columns.count; t++)
                lanes_gemm<true>(columns.size(t), panel.live, w.v + columns.first(t), D, w.scores,
                                 n, panel.out + columns.first(t) * PANEL, true);
        }
    }
    for (int64_t p = 0; p < panels; p++)
        w.panel[p].write(o, D, limit > 0, [&](int64_t i) { return at(p * PANEL + i); });
}

template <class T>
static void attend(T *o, const T *q, const T *keys, const T *values, const int64_t *row_seq,
                   const int64_t *row_limit, AttendShape s) {
    if (s.R <= 0) return;
    const int64_t heads = s.H / s.G, most = max_of(1, QUERIES / heads);
    int64_t work = 0;
    for (int64_t r = 0; r < s.R; r++) work += (row_limit[r] + KEYS) * s.H * s.D * 2;
    const int64_t threads = threads_for(work / 4);

    Carve measure{nullptr};
    AttendScratch(measure, s.D);
    Carve carve{scratch(measure.used * threads + (s.R + 1) * 8 + 256)};
    int64_t *starts = carve.take<int64_t>(s.R + 1), chunks = 0;
    for (int64_t r = 0; r < s.R; r++) {
        const bool same = r && row_seq[r] == row_seq[r - 1] && row_limit[r] == row_limit[r - 1];
        if (!same || r - starts[chunks - 1] == most) starts[chunks++] = r;
    }
    starts[chunks] = s.R;

    region(threads, [&](Team &team) {
        Carve own{carve.base + carve.used + team.rank() * measure.used};
        AttendScratch w(own, s.D);
        team.loop(0, chunks * s.G, 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                const int64_t chunk = i / s.G, g = i % s.G, r = starts[chunk];
                const int64_t head = g * heads * s.D, kv = row_seq[r] * s.L * s.G * s.D + g * s.D;
                const int64_t queries = (starts[chunk + 1] - r) * heads;
                for (int64_t m = 0; m < queries; m += QUERIES)
                    attend_chunk<T>(o + r * s.H * s.D + head, q + r * s.H * s.D + head, keys + kv,
                                    values + kv, m, min_of(QUERIES, queries - m), row_limit[r], s, w);
            }
        });
    });
}
