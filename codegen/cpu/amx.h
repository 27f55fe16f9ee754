// bf16 panels on AMX tiles: C[m, 32] (+)= A[m, K] B[K, 32] for up to 48 rows.
//
// A tile is 16 rows of 64 bytes.  A panel of 32 columns, packed in pairs along K, is two B tiles side
// by side, read where it lies; A gives one tile for each 16 rows:
//
//     tmm0 tmm1      tmm4      x   tmm6 tmm7        up to 32 rows
//     tmm2 tmm3  +=  tmm5
//
//     tmm0 tmm1                                     up to 48: one tile for A and one for B, which take turns
//     tmm2 tmm3  +=  tmm6      x   tmm7             (all tiles are whole, so A is read, and C computed,
//     tmm4 tmm5                                     for 48 rows)
//
// tdpbf16ps takes 32 of K at a time, adds up even and odd products in float32, and treats denormals as
// zero.  Rows do not meet, and the order along K is the same for any number of them.
#pragma once

#include "panel.h"

#if defined(__AMX_BF16__)

enum : int64_t { TILE_ROWS = 16, TILE_K = Operand<bf16>::STEP, TILE_COLUMNS = 16 };

struct TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    INLINE void tile(int i, int64_t n) { rows[i] = uint8_t(n), bytes[i] = 64; }
};

// The tiles of a thread, while this lives.
struct Tiles {
    explicit INLINE Tiles(const TileConfig &config) {
        asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
        tiles_set = -1;
    }
    INLINE ~Tiles() { release_tiles(); }
};

// Tiles for C[m, 32], all zero, for A and for B; until the region ends.
template <int HALVES> static INLINE void set_tiles(int64_t m) {
    if (HALVES == 3) m = 3 * TILE_ROWS;
    if (tiles_set != m) {
        TileConfig config;
        for (int i = 0; i < 8; i++) config.tile(i, TILE_ROWS);
        const int64_t rows[2] = {min_of(m, TILE_ROWS), m - TILE_ROWS};
        for (int h = 0; h < 2 && HALVES < 3; h++) {
            const int64_t n = h < HALVES ? rows[h] : TILE_ROWS;
            config.tile(2 * h, n), config.tile(2 * h + 1, n), config.tile(4 + h, n);
        }
        asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
        tiles_set = m;
        return;
    }
    _tile_zero(0);
    _tile_zero(1);
    if (HALVES >= 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    if (HALVES == 3) {
        _tile_zero(4);
        _tile_zero(5);
    }
}

// C [32, 32], or its upper half.
template <int HALVES> static INLINE void load_c(const float *c) {
    constexpr int64_t row = 4 * PANEL;
    _tile_loadd(0, c, row);
    _tile_loadd(1, c + TILE_COLUMNS, row);
    if (HALVES == 2) {
        _tile_loadd(2, c + TILE_ROWS * PANEL, row);
        _tile_loadd(3, c + TILE_ROWS * PANEL + TILE_COLUMNS, row);
    }
}
template <int HALVES> static INLINE void store_c(float *c) {
    constexpr int64_t row = 4 * PANEL;
    _tile_stored(0, c, row);
    _tile_stored(1, c + TILE_COLUMNS, row);
    if (HALVES >= 2) {
        _tile_stored(2, c + TILE_ROWS * PANEL, row);
        _tile_stored(3, c + TILE_ROWS * PANEL + TILE_COLUMNS, row);
    }
}
// The last `rows` of 33 to 48.
static INLINE void store_third(float *c, int64_t rows) {
    alignas(64) float all[TILE_ROWS * PANEL];
    _tile_stored(4, all, 4 * PANEL);
    _tile_stored(5, all + TILE_COLUMNS, 4 * PANEL);
    asm volatile("" : : : "memory");
    for (int64_t i = 0; i < rows * PANEL; i += VL) store(c + i, load(all + i));
}

// A step of 32 along K: HALVES tiles of rows, `lda` elements apart, against a panel's two tiles of columns.
template <int HALVES> static INLINE void tile_step(const bf16 *a, int64_t lda, const bf16 *b) {
    constexpr int64_t row = 4 * PANEL;
    if (HALVES == 3) {
        _tile_loadd(7, b, row);
        _tile_loadd(6, a, 2 * lda);
        _tile_dpbf16ps(0, 6, 7);
        _tile_loadd(6, a + TILE_ROWS * lda, 2 * lda);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(6, a + 2 * TILE_ROWS * lda, 2 * lda);
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(7, b + 2 * TILE_COLUMNS, row);
        _tile_dpbf16ps(5, 6, 7);
        _tile_loadd(6, a, 2 * lda);
        _tile_dpbf16ps(1, 6, 7);
        _tile_loadd(6, a + TILE_ROWS * lda, 2 * lda);
        _tile_dpbf16ps(3, 6, 7);
        return;
    }
    _tile_loadd(6, b, row);
    _tile_loadd(4, a, 2 * lda);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 2 * TILE_COLUMNS, row);
    _tile_dpbf16ps(1, 4, 7);
    if (HALVES == 2) {
        _tile_loadd(5, a + TILE_ROWS * lda, 2 * lda);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// The panel of a step, copied to where the tiles are loaded from: at most `lines` of it, the rest zero; meanwhile
// asks for as much from `ahead`.  Tiles loaded from memory itself keep few lines on their way: 5 rows read at
// 7.9 GB/s so and at 13.3 by copies, 32 rows at 7.4 and 12.1 (Sapphire Rapids, where vectors alone read at 12.1).
// Asked first, then loaded, line by line in a loop: the other order, or the same unrolled, is slower by a quarter
// (Granite Rapids; why is not known).
static INLINE void copy_step(bf16 *to, const bf16 *b, int64_t lines, const bf16 *ahead) {
    enum : int64_t { LINE = 32 };
    for (int64_t i = 0; i < TILE_K; i++) {
        __builtin_prefetch(ahead + i * LINE, 0, 2);
        asm volatile("" : : : "memory");
        const __m512i line = i < lines ? _mm512_loadu_si512(b + i * LINE) : _mm512_setzero_si512();
        _mm512_store_si512(to + i * LINE, line);
    }
    asm volatile("" : : : "memory");  // a load of tiles does not say that it reads
}

// Where to ask for weights: a page of 4 KB further on, at first in this panel, then in the one that comes next.
struct Ahead {
    enum : int64_t { DISTANCE = 2048 };
    const bf16 *at, *end, *next;

    Ahead(const bf16 *panel, int64_t size, const bf16 *next)
        : at(panel + DISTANCE), end(panel + size), next(next ? next : panel + size) {}
    INLINE const bf16 *step() {
        if (at >= end) at = next, end = at + DISTANCE;
        at += TILE_K * PANEL;
        return at - TILE_K * PANEL;
    }
};

// C[m, 32] = A[m, K] B[K, 32].  COPIES: the panel comes from memory, not from a cache, and so does `next`.
template <int HALVES, bool COPIES>
static __attribute__((noinline)) void tile_gemm(int64_t m, const bf16 *a, const bf16 *b, int64_t K,
                                                float *c, const bf16 *next) {
    alignas(64) bf16 copies[2][TILE_K * PANEL];
    Ahead ahead(b, padded_k<bf16>(K) * PANEL, next);
    set_tiles<HALVES>(m);
    for (int64_t k0 = 0; k0 < K; k0 += KC, a += m * Operand<bf16>::LDA) {
        const int64_t kc = min_of(KC, K - k0);
        for (int64_t k = 0; k < kc; k += TILE_K, b += TILE_K * PANEL) {
            bf16 *copy = copies[k / TILE_K % 2];
            const bool whole = k + TILE_K <= kc;
            if (COPIES || !whole)
                copy_step(copy, b, whole ? TILE_K : padded_k<bf16>(kc - k), COPIES ? ahead.step() : b);
            tile_step<HALVES>(a + k, Operand<bf16>::LDA, COPIES || !whole ? copy : b);
        }
    }
    store_c<HALVES>(c);
    if (HALVES == 3) store_third(c + 2 * TILE_ROWS * PANEL, m - 2 * TILE_ROWS);
}

#endif
