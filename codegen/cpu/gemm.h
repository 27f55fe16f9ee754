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

// What to fetch while computing: the panel that comes next, a share of it with each tile.
struct Prefetch {
    const char *at;
    int64_t step;
};

// ---- C[M, 32] (+)= A[M, kc] B[kc, 32]

static INLINE void fetch(Prefetch &f) {
    __builtin_prefetch(f.at, 0, 2);
    __builtin_prefetch(f.at + 64, 0, 2);
    f.at += f.step;
}

// M rows of NV vectors of columns, held in registers.
template <int M, int NV> struct Tile {
    vf c[M][NV];

    INLINE void clear() {
        for (int i = 0; i < M; i++)
            for (int j = 0; j < NV; j++) c[i][j] = vf{};
    }
    INLINE void put(float *out, bool add) {
        for (int i = 0; i < M; i++)
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
            for (int j = 0; j < NV; j++) c[i][j] = fma(x, b[j], c[i][j]);
        }
    }
};

template <int M, class T>
static INLINE void accumulate(Tile<M, 2> &tile, const float *a, const T *b, int64_t kc, Prefetch f) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < kc; k++, b += PANEL) {
        const vf columns[2] = {load(b), load(b + VL)};
        tile.step(a + k, Operand<float>::LDA, columns);
        if (sizeof(T) == 4 || (k & 1)) fetch(f);
    }
}

template <int M>
static INLINE void accumulate(Tile<M, 2> &tile, const float *a, const bf16 *b, int64_t kc,
                              Prefetch f) {
    for (int64_t k = 0; k < kc; k += 2, b += 2 * PANEL) {
        vu p[2];
        memcpy(p, b, sizeof p);
        const vf even[2] = {(vf)(p[0] << 16), (vf)(p[1] << 16)};
        const vf odd[2] = {(vf)(p[0] & 0xffff0000), (vf)(p[1] & 0xffff0000)};
        tile.step(a + k, Operand<float>::LDA, even);
        tile.step(a + k + 1, Operand<float>::LDA, odd);
        fetch(f);
    }
}

#if defined(__AVX512BF16__)
template <int M>
static INLINE void accumulate(Tile<M, 2> &tile, const bf16 *a, const bf16 *b, int64_t kc,
                              Prefetch f) {
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
                                            int64_t kc, float *c, bool add, Prefetch f) {
    for (int64_t j = 0; j < PANEL; j += 2 * VL) {
        Tile<M, 2> tile;
        tile.clear();
        accumulate<M>(tile, a, b + j * pairs<T>(), kc, f);
        tile.put(c + j, add);
        f.step = 0;
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

// C[m, 32] (+)= A[m, K] W[32, K]^T for one tile of rows and one panel.
template <class T>
static inline void gemm(int64_t m, const typename Operand<T>::A *a, const T *panel, int64_t K,
                        float *c, bool add, Prefetch f) {
    for (int64_t k = 0; k < K; k += KC) {
        int64_t kc = padded_k<T>(min_of(KC, K - k));
        Micro<T>::of[m](a, panel, kc, c, add, f);
        a += m * Operand<T>::LDA;
        panel += kc * PANEL;
        f.at += kc * PANEL * sizeof(T) / 128 * f.step;
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
    int64_t bytes = panel_size<T>(K) * sizeof(T);
    const char *at = reinterpret_cast<const char *>(next ? next : panel);
    for (int64_t t = first; t < last; t++) {
        int64_t row = tiles.first(t), tile = t - first;
        Prefetch f{at, 0};
        if (next && last - first == 1) f.step = 128;
        if (next && last - first > 1 && tile < 2) f = {at + tile * (bytes / 2), 64};
        gemm<T>(tiles.size(t), a + row * row_size<T>(K), panel, K, c + row * PANEL, false, f);
    }
}
