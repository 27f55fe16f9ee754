// The loop under linear, moe_ffn, vocab_choice and attend: C[m, 32] = A[m, K] W[32, K]^T for one panel.
//
// Each output is summed in float32 in the order of K within a block, then over blocks: the order
// does not depend on m, so a row's bits do not depend on its neighbours.
#pragma once

#include "amx.h"
#include "panel.h"

// ---- C[M, 32] (+)= A[M, kc] B[kc, 32]

enum : int { PASSES = PANEL / (2 * VL) };  // over a panel, of two vectors of columns each

// sum stays in its register, since x and y are still needed: left alone, the compiler lets a
// multiply-add overwrite one of its factors, and then moves sums about and spills them.
static INLINE void hold(vf &sum, vf x, vf y) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    asm("" : "+x"(sum) : "x"(x), "x"(y));
#endif
}

// M rows of NV vectors of columns, held in registers.
template <int M, int NV> struct Tile {
    vf c[M][NV];

    // All loops are unrolled, or the sums would live in memory.
    INLINE void clear() {
#pragma GCC unroll 16
        for (int i = 0; i < M; i++)
#pragma GCC unroll 2
            for (int j = 0; j < NV; j++) c[i][j] = vf{};
    }
    INLINE void put(float *out, bool add) {
#pragma GCC unroll 16
        for (int i = 0; i < M; i++)
#pragma GCC unroll 2
            for (int j = 0; j < NV; j++) {
                float *p = out + i * PANEL + j * VL;
                store(p, add ? load(p) + c[i][j] : c[i][j]);
            }
    }
    // a: one element of each row, `stride` apart
    INLINE void step(const float *a, int64_t stride, const vf *b) {
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const vf x = splat(a[i * stride]);
#pragma GCC unroll 2
            for (int j = 0; j < NV; j++) {
                c[i][j] = fma(x, b[j], c[i][j]);
                hold(c[i][j], x, b[j]);
            }
        }
    }
};

template <int M, class T>
static INLINE void accumulate(Tile<M, 2> &tile, const float *a, const T *b, int64_t kc,
                              Prefetch &f) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < kc; k++, b += PANEL) {
        const vf columns[2] = {load(b), load(b + VL)};
        tile.step(a + k, Operand<float>::LDA, columns);
        if (sizeof(T) == 4 || (k & 1)) f.fetch(PASSES);
    }
}

// The first, the second of VL pairs of bf16, widened.  Loaded vector by vector: an array of them
// would go through the stack, and wait there (on AVX2 this took four fifths of the time).
static INLINE vu words(const bf16 *p) {
    vu w;
    memcpy(&w, p, sizeof w);
    return w;
}
static INLINE vf low_half(const bf16 *p) { return (vf)(words(p) << 16); }
static INLINE vf high_half(const bf16 *p) { return (vf)(words(p) & 0xffff0000); }

template <int M>
static INLINE void accumulate(Tile<M, 2> &tile, const float *a, const bf16 *b, int64_t kc,
                              Prefetch &f) {
    for (int64_t k = 0; k < kc; k += 2, b += 2 * PANEL) {
        const vf even[2] = {low_half(b), low_half(b + 2 * VL)};
        tile.step(a + k, Operand<float>::LDA, even);
        // The odd half reads its words anew: kept, they would cost the registers of two sums.
        asm("" : : : "memory");
        const vf odd[2] = {high_half(b), high_half(b + 2 * VL)};
        tile.step(a + k + 1, Operand<float>::LDA, odd);
        f.fetch(PASSES);
    }
}

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template <int M>
static INLINE void accumulate(Tile<M, 2> &tile, const bf16 *a, const bf16 *b, int64_t kc,
                              Prefetch &f) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < kc; k += 2, b += 2 * PANEL) {
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            int32_t pair;
            memcpy(&pair, a + k + i * Operand<bf16>::LDA, 4);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            tile.c[i][0] = (vf)_mm512_dpbf16_ps((__m512)tile.c[i][0], x, b0);
            tile.c[i][1] = (vf)_mm512_dpbf16_ps((__m512)tile.c[i][1], x, b1);
        }
        f.fetch(PASSES);
    }
}
#endif

template <class T, int M>
static __attribute__((noinline)) void micro(const typename Operand<T>::A *a, const T *b,
                                            int64_t kc, float *c, bool add, Prefetch f) {
    for (int64_t j = 0; j < PANEL; j += 2 * VL) {
        Tile<M, 2> tile;
        tile.clear();
        accumulate(tile, a, b + j * pairs<T>(), kc, f);
        tile.put(c + j, add);
    }
}

template <class T> struct Micro {
    typedef void (*Fn)(const typename Operand<T>::A *, const T *, int64_t, float *, bool, Prefetch);
    static constexpr Fn of[15] = {
        nullptr,      micro<T, 1>,
        micro<T, 2>,  micro<T, 3>,
        micro<T, 4>,  micro<T, 5>,
        micro<T, 6>,
#if defined(__AVX512F__)
        micro<T, 7>,  micro<T, 8>,
        micro<T, 9>,  micro<T, 10>,
        micro<T, 11>, micro<T, 12>,
        micro<T, 13>, micro<T, 14>,
#endif
    };
};

// C for all tiles of some rows against one panel, c [rows, 32], by blocks of KC along K; meanwhile fetches what
// comes next: for one tile of rows a little further on, for several the next block.  (The next panel would be too
// far: with K = 2048 it had left the L2 cache again, and 16 rows took 1.80 times as long as reading, now 1.14.)
template <class T>
static inline void gemm_panel(const Tiling &tiles, int64_t first, int64_t last,
                              const typename Operand<T>::A *a, const T *panel, const T *next,
                              int64_t K, float *c) {
    const int64_t parts = last - first == 1 ? 1 : 2;
    const bool nearby = parts == 1 && Operand<T>::AHEAD;
    for (int64_t k = 0; k < K; k += KC) {
        const int64_t kc = padded_k<T>(min_of(KC, K - k)), bytes = kc * PANEL * int64_t(sizeof(T));
        const T *then = k + KC < K ? panel + kc * PANEL : next;
        const char *at = nearby ? reinterpret_cast<const char *>(panel) + Operand<T>::AHEAD
                                : reinterpret_cast<const char *>(then ? then : panel);
        for (int64_t t = first; t < last; t++) {
            // One tile fetches all of the block, or the first two half of it each.
            const int64_t row = tiles.first(t), m = tiles.size(t), tile = t - first;
            const bool fetches = nearby || (then && tile < parts);
            const Prefetch f(at + (fetches ? tile * (bytes / parts) : 0), bytes / parts,
                       fetches ? 128 / parts : 0);
            const auto *rows = a + row * row_size<T>(K) + k / KC * m * Operand<T>::LDA;
            Micro<T>::of[m](rows, panel, kc, c + row * PANEL, k > 0, f);
        }
        panel += kc * PANEL;
    }
}

#if defined(__AMX_BF16__)
template <bool COPIES>
static inline void tile_gemm(int64_t m, const bf16 *a, const bf16 *panel, int64_t K, float *c,
                             const bf16 *next) {
    if (m > 2 * TILE_ROWS)
        tile_gemm<3, COPIES>(m, a, panel, K, c, next);
    else if (m > TILE_ROWS)
        tile_gemm<2, COPIES>(m, a, panel, K, c, next);
    else
        tile_gemm<1, COPIES>(m, a, panel, K, c, next);
}

template <>
inline void gemm_panel<bf16>(const Tiling &tiles, int64_t first, int64_t last, const bf16 *a,
                             const bf16 *panel, const bf16 *next, int64_t K, float *c) {
    if (tiles.count == 1) return tile_gemm<true>(tiles.rows, a, panel, K, c, next);
    for (int64_t t = first; t < last; t++) {
        const bf16 *rows = a + tiles.first(t) * row_size<bf16>(K);
        float *to = c + tiles.first(t) * PANEL;
        if (t == first)
            tile_gemm<true>(tiles.size(t), rows, panel, K, to, next);
        else
            tile_gemm<false>(tiles.size(t), rows, panel, K, to, next);
    }
}
#endif
