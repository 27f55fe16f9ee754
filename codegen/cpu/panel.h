// Operands of a product C[m, 32] = A[m, K] W[32, K]^T: how W and A lie in memory, and how rows are cut.
//
// W comes packed (pack.py): panels of 32 output columns, zero-padded, each panel K-major:
//     f32, f16   [K][32]
//     bf16       [ceil(K/2)][32][2]      pairs along K, as vdpbf16ps and AMX tiles read them
// A is copied into rows of constant stride, in blocks of KC along K: [ceil(K/KC)][m][LDA], as
// float32, or as bf16 where the machine multiplies bf16 pairs.
#pragma once

#include "team.h"

enum : int64_t { PANEL = 32, KC = 512 };

// Elements along K that lie side by side for one column.
template <class T> static constexpr int64_t pairs() { return 1; }
template <> constexpr int64_t pairs<bf16>() { return 2; }

// How rows of A stand: LDA elements apart, zeros behind the last one of K up to a multiple of STEP, at
// most MR rows in a tile, cut where it can be at multiples of UNIT.  AHEAD: where there is one tile of rows,
// how many bytes ahead of the panel's words to ask for more; 0 asks for the next panel.  Measured on
// Sapphire Rapids, float32: 5 rows from 13.9 to 14.5 GB/s, 14 rows from 11.6 to 12.5.
template <class T> struct Operand {
    typedef float A;
    enum : int64_t { LDA = KC + 16, STEP = pairs<T>(), UNIT = 1, MR = VL == 16 ? 14 : 6, AHEAD = VL == 16 ? 8192 : 0 };
};
#if defined(__AMX_BF16__)
template <> struct Operand<bf16> {
    typedef bf16 A;
    enum : int64_t { LDA = KC + 32, STEP = 32, UNIT = 16, MR = 48, AHEAD = 0 };
};
#elif defined(__AVX512BF16__)
template <> struct Operand<bf16> {
    typedef bf16 A;
    enum : int64_t { LDA = KC + 32, STEP = 2, UNIT = 1, MR = 14, AHEAD = 4096 };
};
#endif

// Elements of A up to which each thread has its own: half of an L2 cache, at most.
enum : int64_t { OWN_ROWS = 128 << 10 };

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
// Elements of A for so many rows.  Behind the last one some may be read whose products are not kept.
template <class T> static inline int64_t rows_size(int64_t rows, int64_t K) {
    return rows * row_size<T>(K) + (Operand<T>::UNIT - 1) * Operand<T>::LDA;
}

// ---- tiles of rows: as equal as can be

struct Tiling {
    int64_t rows, unit, count;

    Tiling(int64_t rows, int64_t most, int64_t unit = 1)
        : rows(rows), unit(unit), count(div_up(rows, most)) {}
    int64_t first(int64_t tile) const {
        return min_of(rows, tile * div_up(rows, unit) / count * unit);
    }
    int64_t size(int64_t tile) const { return first(tile + 1) - first(tile); }
};

template <class T> static inline Tiling tiles_of(int64_t rows) {
    return Tiling(rows, Operand<T>::MR, Operand<T>::UNIT);
}

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
            for (int64_t j = kc; j % Operand<T>::STEP; j++) a[j] = {};
        }
    }
}

// ---- what to fetch while computing: the panel that comes next

// Places from which lines are asked for in turn.  Measured: on Sapphire Rapids one place reads at 19.4
// GB/s and four at 17.5; on an EPYC with AVX2 four are faster than one.
enum : int { PLACES = VL == 16 ? 1 : 4 };

// `step` bytes with each 128 bytes of the panel that is multiplied, so that lines are asked for evenly: a
// burst fills the queue of misses, and then the multiply-adds wait for memory too.
struct Prefetch {
    const char *at[PLACES];
    int64_t step;

    Prefetch(const char *from, int64_t bytes, int64_t step) : step(step) {
        for (int i = 0; i < PLACES; i++) at[i] = from + bytes / PLACES * i;
    }
    INLINE void line(int64_t advance) {
        __builtin_prefetch(at[0], 0, 2);
        const char *next = at[0] + advance;
        for (int i = 0; i + 1 < PLACES; i++) at[i] = at[i + 1];
        at[PLACES - 1] = next;
    }
    // As much as goes with one of `passes` over 128 bytes.  A line asked for twice is in the cache.
    INLINE void fetch(int passes) {
        const int lines = passes == 1 ? 2 : 1;
        for (int i = 0; i < lines; i++) line(step / (passes * lines));
    }
};
