// attend in float32: a query is a lane.
//
//     S [keys, 32] = K [keys, D] (scale Q)^T [D, 32]      a query is a lane in all of it, so
//     P = exp(S - max), with an online softmax            nothing is reduced across lanes
//     O^T [D, 32] += V^T [D, keys] P [keys, 32]
#pragma once

#include "gemm.h"

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

// ---- what to fetch while computing: rows of the next block, which a group of heads reads together

struct RowsAhead {
    const char *keys, *values;
    int64_t stride, span, left, at = 0;  // bytes; rows; where in a row

    template <class T>
    RowsAhead(const T *k, const T *v, int64_t stride, int64_t rows, int64_t span)
        : keys(reinterpret_cast<const char *>(k)), values(reinterpret_cast<const char *>(v)),
          stride(stride * sizeof(T)), span(span * sizeof(T)), left(rows) {}

    // Pairs of lines.
    int64_t lines() const { return left * div_up(span, 64); }
    INLINE void fetch(int64_t lines) {
        for (; lines > 0 && left > 0; lines--) {
            __builtin_prefetch(keys + at, 0, 2);
            __builtin_prefetch(values + at, 0, 2);
            at += 64;
            if (at >= span) keys += stride, values += stride, at = 0, left--;
        }
    }
};

// ---- KEYS keys and values of one head, as float32

struct LaneBlock {
    enum : int64_t { KEYS = VL == 16 ? 56 : 48 };
    float *k, *v, *scores;
    int64_t n;

    LaneBlock(Carve &carve, int64_t D) {
        k = carve.take<float>(KEYS * row_size<float>(D));
        v = carve.take<float>(KEYS * D + 2 * VL);
        scores = carve.take<float>(KEYS * PANEL);
    }

    // In place the keys are a power of two apart, and would share a few sets of the first cache.
    template <class T>
    INLINE void read(const T *keys, const T *values, int64_t stride, int64_t count, int64_t D) {
        n = count;
        const Tiling tiles = tiles_of<float>(n);
        float *a = k;
        for (int64_t t = 0; t < tiles.count; t++)
            for (int64_t d = 0; d < D; d += KC)
                for (int64_t i = 0; i < tiles.size(t); i++, a += Operand<float>::LDA)
                    copy_row(a, keys + (tiles.first(t) + i) * stride + d, min_of(KC, D - d));
        for (int64_t i = 0; i < n; i++) copy_row(v + i * D, values + i * stride, D);
    }
};

// ---- up to 32 queries of one head

struct LaneQueries {
    typedef LaneBlock Block;
    struct Use {};
    float *q;        // [D][32], scaled
    float *out;      // O^T [D][32]
    float *best, *sum;  // [32]
    int64_t live;    // queries in the panel

    LaneQueries() = default;
    LaneQueries(Carve &carve, int64_t D) {
        q = carve.take<float>(D * PANEL), out = carve.take<float>(D * PANEL);
        best = carve.take<float>(PANEL), sum = carve.take<float>(PANEL);
    }

    // at(i): where the i-th query starts
    template <class T, class At>
    INLINE void read(const T *x, int64_t count, int64_t D, float scale, At &&at) {
        live = count;
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

    // What these keys and values say.
    INLINE void absorb(const LaneBlock &block, int64_t D, float, RowsAhead &ahead, int64_t share) {
        const Tiling tiles = tiles_of<float>(block.n), columns = tiles_of<float>(D);
        for (int64_t t = 0; t < tiles.count; t++) {
            const float *a = block.k + tiles.first(t) * row_size<float>(D);
            float *c = block.scores + tiles.first(t) * PANEL;
            for (int64_t d = 0; d < D; d += KC, a += tiles.size(t) * Operand<float>::LDA)
                lanes_gemm<false>(tiles.size(t), live, a, 0, q + d * PANEL, min_of(KC, D - d), c,
                                  d > 0);
        }
        soften(block.scores, block.n, D, ahead, share);
        for (int64_t t = 0; t < columns.count; t++)
            lanes_gemm<true>(columns.size(t), live, block.v + columns.first(t), D, block.scores,
                             block.n, out + columns.first(t) * PANEL, true);
    }

    // Scores [keys][32] to probabilities; the past is scaled down to the new maximum.
    INLINE void soften(float *s, int64_t keys, int64_t D, RowsAhead &ahead, int64_t share) {
        const int64_t each = div_up(share, div_up(live, VL) * max_of(1, keys));
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
                ahead.fetch(each);
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
