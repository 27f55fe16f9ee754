// attend of bf16 on AMX tiles.
//
//     S^T [keys, 32] = K [keys, D] Q^T [D, 32]            a query is a lane: nothing is reduced across
//     P = exp(scale S - max), with an online softmax      lanes; then P is turned and rounded to bf16
//     O [32, D] += P [32, keys] V [keys, D]
//
// Both are products with a panel: of 32 queries, and of 32 columns of V.
#pragma once

#include "amx.h"
#include "attend_lanes.h"

#if defined(__AMX_BF16__)

// ---- 16 x 16 words turned

static INLINE void turn(__m512i w[16]) {
    __m512i t[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(w[i], w[i + 1]), b = _mm512_unpackhi_epi32(w[i], w[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(w[i + 2], w[i + 3]);
        const __m512i d = _mm512_unpackhi_epi32(w[i + 2], w[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // t[4 r + i]: rows 4 r to 4 r + 3 of columns i, i + 4, i + 8, i + 12
        const __m512i a = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
        w[i] = _mm512_shuffle_i32x4(a, c, 0x88), w[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        w[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), w[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

// Lane by lane the pair (x, y), rounded to bf16.
static INLINE __m512i pair_of(vf x, vf y) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)y));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// ---- KEYS keys and values of one head

static INLINE int64_t whole_steps(int64_t n) { return (n + TILE_K - 1) & -TILE_K; }

struct TileBlock {
    enum : int64_t { KEYS = 64 };
    const bf16 *k;   // rows, `lda` apart: where they lie, or copied to `rows`
    bf16 *rows;      // zeros behind D and behind the last key
    bf16 *v;         // panels of 32 columns, pairs of keys side by side; columns in the order of `column`
    bf16 *p;         // [32][KEYS + 32], rows of A
    float *scores;   // [KEYS][32]
    int64_t n, lda;

    enum : int64_t { LDP = KEYS + 32 };

    TileBlock(Carve &carve, int64_t D) {
        rows = carve.take<bf16>(KEYS * (whole_steps(D) + 32));
        v = carve.take<bf16>(div_up(D, PANEL) * KEYS * PANEL);
        p = carve.take<bf16>(PANEL * LDP);
        scores = carve.take<float>(KEYS * PANEL);
    }

    INLINE void read(const bf16 *keys, const bf16 *values, int64_t stride, int64_t count, int64_t D) {
        n = count;
        read_keys(keys, stride, D);
        for (int64_t d = 0; d < D; d += PANEL) read_values(values + d, stride, min_of(PANEL, D - d), v + d * KEYS);
    }

    INLINE void read_keys(const bf16 *keys, int64_t stride, int64_t D) {
        const int64_t width = whole_steps(D);
        k = keys, lda = stride;
        if (width == D && n == KEYS) return;
        k = rows, lda = width + 32;
        for (int64_t i = 0; i < n; i++) {
            memcpy(rows + i * lda, keys + i * stride, size_t(D) * sizeof(bf16));
            memset(rows + i * lda + D, 0, size_t(width - D) * sizeof(bf16));
        }
        memset(rows + n * lda, 0, size_t((whole_steps(n) - n) * lda) * sizeof(bf16));
    }

    // A panel.  Interleaving mixes quarters of two vectors, so its columns are 0..3, 8..11, 16..19, 24..27
    // and then 4..7, 12..15, 20..23, 28..31.
    INLINE void read_values(const bf16 *values, int64_t stride, int64_t width, bf16 *to) const {
        const __mmask32 inside = width == PANEL ? ~0u : (1u << width) - 1;
        for (int64_t i = 0; i < whole_steps(n); i += 2, to += 2 * PANEL) {
            const bf16 *x = values + i * stride;
            const __m512i none = _mm512_setzero_si512();
            const __m512i even = i < n ? _mm512_maskz_loadu_epi16(inside, x) : none;
            const __m512i odd = i + 1 < n ? _mm512_maskz_loadu_epi16(inside, x + stride) : none;
            _mm512_storeu_si512(to, _mm512_unpacklo_epi16(even, odd));
            _mm512_storeu_si512(to + PANEL, _mm512_unpackhi_epi16(even, odd));
        }
    }
};

// ---- up to 32 queries of one head

struct TileQueries {
    typedef TileBlock Block;
    bf16 *q;     // a panel [D / 2][32][2], zeros behind D
    float *out;  // O [ceil(D / 32)][32][32], columns as in V's panels
    float *best, *sum;  // [32]
    int64_t live;

    // The tiles are all whole, while this lives.
    struct Use {
        TileConfig config;
        const Tiles tiles;
        static INLINE TileConfig whole() {
            TileConfig c;
            for (int i = 0; i < 8; i++) c.tile(i, TILE_ROWS);
            return c;
        }
        INLINE Use() : config(whole()), tiles(config) {}
    };

    TileQueries() = default;
    TileQueries(Carve &carve, int64_t D) {
        q = carve.take<bf16>(whole_steps(D) * PANEL), out = carve.take<float>(whole_steps(D) * PANEL);
        best = carve.take<float>(PANEL), sum = carve.take<float>(PANEL);
    }

    template <class At>
    INLINE void read(const bf16 *x, int64_t count, int64_t D, float, At &&at) {
        live = count;
        memset(q, 0, size_t(whole_steps(D) * PANEL) * sizeof(bf16));
        memset(out, 0, size_t(whole_steps(D) * PANEL) * 4);
        memset(sum, 0, size_t(PANEL) * 4);
        for (int64_t i = 0; i < PANEL; i++) best[i] = -__builtin_inff();
        for (int64_t j = 0; j < live; j += VL)
            for (int64_t d = 0; d < D; d += 2 * VL) {
                const __mmask32 inside = D - d < 2 * VL ? (1u << (D - d)) - 1 : ~0u;
                __m512i words[16] = {};
                for (int64_t i = 0; i < VL && j + i < live; i++)
                    words[i] = _mm512_maskz_loadu_epi16(inside, x + at(j + i) + d);
                turn(words);
                for (int64_t i = 0; i < VL && d + 2 * i < D; i++)
                    _mm512_store_si512(q + ((d / 2 + i) * PANEL + j) * 2, words[i]);
            }
    }
    template <class At> INLINE void write(bf16 *o, int64_t D, bool any, At &&at) const {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (int64_t i = 0; i < live; i++) {
            const float by = any ? 1.0f / sum[i] : 0.0f;
            for (int64_t d = 0; d < D; d += PANEL) {
                const float *x = out + (d + i) * PANEL;
                const __m512 low = (__m512)(load(x) * by), high = (__m512)(load(x + VL) * by);
                store_n(o + at(i) + d, (vf)_mm512_permutex2var_ps(low, first, high), D - d);
                if (D - d > VL)
                    store_n(o + at(i) + d + VL, (vf)_mm512_permutex2var_ps(low, second, high), D - d - VL);
            }
        }
    }

    // What these keys and values say.
    INLINE void absorb(const TileBlock &block, int64_t D, float scale, RowsAhead &ahead, int64_t share) {
        if (live > TILE_ROWS)
            absorb_halves<2>(block, D, scale, ahead, share);
        else
            absorb_halves<1>(block, D, scale, ahead, share);
    }
    template <int HALVES>
    INLINE void absorb_halves(const TileBlock &block, int64_t D, float scale, RowsAhead &ahead, int64_t share) {
        const int64_t each = div_up(share, HALVES * div_up(block.n, 2));
        asm volatile("" : : : "memory");  // loads of tiles do not say that they read
        for (int64_t i = 0; i < block.n; i += TILE_K) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t d = 0; d < D; d += TILE_K)
                tile_step<2>(block.k + i * block.lda + d, block.lda, q + d * PANEL);
            store_c<2>(block.scores + i * PANEL);
        }
        asm volatile("" : : : "memory");
        for (int64_t j = 0; j < HALVES * VL; j += VL) soften(block, j, D, scale, ahead, each);
        asm volatile("" : : : "memory");
        for (int64_t d = 0; d < D; d += PANEL) {
            load_c<HALVES>(out + d * PANEL);
            for (int64_t i = 0; i < block.n; i += TILE_K)
                tile_step<HALVES>(block.p + i, TileBlock::LDP, block.v + d * TileBlock::KEYS + i * PANEL);
            store_c<HALVES>(out + d * PANEL);
        }
        asm volatile("" : : : "memory");
    }

    // Scores of lanes [j, j + 16) to rows of P; the past is scaled down to the new maximum.
    INLINE void soften(const TileBlock &block, int64_t j, int64_t D, float scale, RowsAhead &ahead,
                       int64_t each) {
        const float low = -__builtin_inff();
        const int64_t n = block.n;
        auto score = [&](int64_t key) { return load(block.scores + key * PANEL + j) * scale; };
        const vf old = load(best + j);
        vf peak = old, other = old;
        int64_t seen = 0;
        for (; seen + 1 < n; seen += 2)
            peak = vmax(score(seen), peak), other = vmax(score(seen + 1), other);
        if (seen < n) peak = vmax(score(seen), peak);
        peak = vmax(other, peak);
        const vf shift = peak == splat(low) ? vf{} : peak, fade = vexp(old - shift);
        vf total = load(sum + j) * fade;
        for (int64_t key = 0; key < n; key += TILE_K) {
            __m512i words[16];
            for (int64_t i = 0; i < TILE_K; i += 2) {
                const int64_t at = key + i;
                ahead.fetch(each);
                const vf even = at < n ? vexp(score(at) - shift) : vf{};
                const vf odd = at + 1 < n ? vexp(score(at + 1) - shift) : vf{};
                total += even;
                total += odd;
                words[i / 2] = pair_of(even, odd);
            }
            turn(words);
            for (int64_t i = 0; i < 16; i++)
                memcpy(block.p + (j + i) * TileBlock::LDP + key, &words[i], sizeof words[i]);
        }
        store(sum + j, total);
        store(best + j, peak);
        const vi faded = fade != splat(1.0f);
        for (int64_t i = 0; i < VL && j + i < live; i++)
            if (faded[i])
                for (int64_t d = 0; d < D; d += PANEL)
                    for (int64_t l = 0; l < PANEL; l += VL) {
                        float *x = out + (d + j + i) * PANEL + l;
                        store(x, load(x) * fade[i]);
                    }
    }
};

#endif
