// One panel of a product: C[m, 32] = A[m, K] W[32, K]^T, the loop under linear, moe_ffn,
// vocab_choice and attend.
//
// W comes packed (pack.py): panels of 32 output columns, zero-padded, each panel K-major:
//     f32, f16   [K][32]
//     bf16       [ceil(K/2)][32][2]      pairs along K, as vdpbf16ps reads them
// A is copied into rows of constant stride, in blocks of KC along K: [ceil(K/KC)][m][LDA], as
// float32, or as bf16 where the machine multiplies bf16 pairs.
//
// Each output is summed in float32 in the order of K within a block, then over blocks: the order
// does not depend on m, so a row's bits do not depend on its neighbours.
#pragma once

#include "team.h"

enum : int64_t { PANEL = 32, KC = 512 };

#if defined(__AVX512F__)
enum : int { MR = 14 };
#else
enum : int { MR = 6 };
#endif

template <class T> struct Operand {
    typedef float A;
    enum : int64_t { LDA = KC + 16 };
};
#if defined(__AVX512BF16__)
template <> struct Operand<bf16> {
    typedef bf16 A;
    enum : int64_t { LDA = KC + 32 };
};
#endif


// Elements along K that lie side by side for one column.
template <class T> static constexpr int64_t pairs() { return 1; }
template <> constexpr int64_t pairs<bf16>() { return 2; }

template <class T> static inline int64_t padded_k(int64_t K) { return K; }
template <> inline int64_t padded_k<bf16>(int64_t K) { return (K + 1) & ~int64_t(1); }

template <class T> static inline int64_t panel_size(int64_t K) { return padded_k<T>(K) * PANEL; }
template <class T> static inline int64_t packed_size(int64_t N, int64_t K) {
    return div_up(N, PANEL) * panel_size<T>(K);
}
// Elements of A for one row.
template <class T> static inline int64_t row_size(int64_t K) {
    return div_up(K, KC) * Operand<T>::LDA;
}

// What to fetch while computing: the panel that comes next, at four places in turn, since the
// hardware reads several streams faster than one.  The lines are spread evenly over the time: a
// burst fills the queue of misses, and then the multiply-adds wait for memory too.
struct Prefetch {
    const char *at, *other, *third, *fourth;
    int64_t step;
};

// ---- C[M, 32] (+)= A[M, kc] B[kc, 32]

// With each 128 bytes of a panel, in each of the passes over it, so that `step` 64 makes two lines.
static INLINE void fetch(Prefetch &f) {
    constexpr int passes = PANEL / (2 * VL), lines = passes == 1 ? 2 : 1;
    for (int i = 0; i < lines; i++) {
        __builtin_prefetch(f.at, 0, 2);
        const char *after = f.at + f.step * 2 / (passes * lines);
        f.at = f.other, f.other = f.third, f.third = f.fourth, f.fourth = after;
    }
}

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
        if (sizeof(T) == 4 || (k & 1)) fetch(f);
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
        fetch(f);
    }
}

#if defined(__AVX512BF16__)
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
        fetch(f);
    }
}
#endif

template <class T, int M>
static __attribute__((noinline)) void micro(const typename Operand<T>::A *a, const T *b,
                                            int64_t kc, float *c, bool add, Prefetch &f) {
    Prefetch next = f;  // of its own, so that it stays in registers
    for (int64_t j = 0; j < PANEL; j += 2 * VL) {
        Tile<M, 2> tile;
        tile.clear();
        accumulate(tile, a, b + j * pairs<T>(), kc, next);
        tile.put(c + j, add);
    }
    f = next;
}

template <class T> struct Micro {
    typedef void (*Fn)(const typename Operand<T>::A *, const T *, int64_t, float *, bool, Prefetch &);
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

// C[m, 32] (+)= A[m, K] W[32, K]^T for one tile of rows and one panel.
template <class T>
static inline void gemm(int64_t m, const typename Operand<T>::A *a, const T *panel, int64_t K,
                        float *c, bool add, Prefetch f) {
    for (int64_t k = 0; k < K; k += KC) {
        int64_t kc = padded_k<T>(min_of(KC, K - k));
        Micro<T>::of[m](a, panel, kc, c, add, f);
        a += m * Operand<T>::LDA;
        panel += kc * PANEL;
        add = true;
    }
}

// ---- tiles of rows: as equal as can be, none above MR

struct Tiling {
    int64_t rows, count;

    explicit Tiling(int64_t rows) : rows(rows), count(div_up(rows, MR)) {}
    int64_t first(int64_t tile) const { return tile * rows / count; }
    int64_t size(int64_t tile) const { return first(tile + 1) - first(tile); }
};

static INLINE void copy_row(float *to, const float *from, int64_t n) {
    memcpy(to, from, size_t(n) * sizeof(float));
}
static INLINE void copy_row(bf16 *to, const bf16 *from, int64_t n) {
    memcpy(to, from, size_t(n) * sizeof(bf16));
}
template <class T> static INLINE void copy_row(float *to, const T *from, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) store_n(to + i, load_n(from + i, n - i), n - i);
}

// Copies m rows of x, row(i) being where the i-th starts, into a tile of A.
template <class T, class Row>
static inline void pack_rows(typename Operand<T>::A *a, int64_t m, int64_t K, Row &&row) {
    for (int64_t k = 0; k < K; k += KC) {
        const int64_t kc = min_of(KC, K - k);
        for (int64_t i = 0; i < m; i++, a += Operand<T>::LDA) {
            copy_row(a, row(i) + k, kc);
            if (kc & 1) a[kc] = {};
        }
    }
}

// C for all tiles of some rows against one panel, c [rows, 32]; meanwhile fetches the next panel.
template <class T>
static inline void gemm_panel(const Tiling &tiles, int64_t first, int64_t last,
                              const typename Operand<T>::A *a, const T *panel, const T *next,
                              int64_t K, float *c) {
    const char *at = reinterpret_cast<const char *>(next ? next : panel);
    const int64_t half = panel_size<T>(K) * sizeof(T) / 2;
    for (int64_t t = first; t < last; t++) {
        // One tile fetches all of the panel, or the first two half of it each.
        const int64_t row = tiles.first(t), tile = t - first;
        const bool alone = last - first == 1, fetches = next && tile < 2;
        const char *from = at + (fetches ? tile * half : 0);
        const int64_t part = alone ? half / 2 : half / 4;
        Prefetch f{from, from + part, from + 2 * part, from + 3 * part, 0};
        if (fetches) f.step = alone ? 64 : 32;
        gemm<T>(tiles.size(t), a + row * row_size<T>(K), panel, K, c + row * PANEL, false, f);
    }
}
