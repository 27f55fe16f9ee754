// linear: y[R, N] = x[R, K] W[N, K]^T (+ bias[N]) (+ residual[R, N])
//
// Panels of 32 output columns are shared out among the threads; each is read from memory once for
// a block of rows that fits the L2 cache, next to the panel being multiplied and the one that is
// on its way.
#pragma once

#include "gemm.h"

// y = c + bias + residual for m rows of one panel; every one rounded once.
template <class T>
static INLINE void finish_linear(int64_t m, const float *c, T *y, const T *bias, const T *residual,
                                 int64_t N, int64_t column, bool past) {
    const int64_t end = min_of(N, column + PANEL);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = column; j < end; j += VL) {
            const int64_t n = end - j;
            vf v = load(c + i * PANEL + j - column);
            if (bias) v += load_n(bias + j, n);
            if (residual) v += load_n(residual + i * N + j, n);
            if (n < VL)
                store_n(y + i * N + j, v, n);
            else
                put(y + i * N + j, v, past);
        }
    }
}

template <class T>
static void linear(T *y, const T *x, const T *w, const T *bias, const T *residual, int64_t R,
                   int64_t N, int64_t K) {
    typedef typename Operand<T>::A A;
    if (R <= 0 || N <= 0) return;
    const int64_t threads = threads_for(N * K * max_of(R, 4) / 4);
    const int64_t row_bytes = row_size<T>(K) * sizeof(A);
    const int64_t MR = Operand<T>::MR;
    const int64_t block = max_of(4 * MR, (3 << 19) / max_of(row_bytes, 1) / MR * MR);
    const int64_t panels = div_up(N, PANEL), size = panel_size<T>(K);
    const bool past = N * K * int64_t(sizeof(T)) >= CACHE && can_stream(y, N);

    for (int64_t r0 = 0; r0 < R; r0 += block) {
        const Tiling tiles = tiles_of<T>(min_of(block, R - r0));
        // Few panels: the rows are shared out as well.
        const int64_t shares = panels >= 4 * threads ? 1 : min_of(tiles.count, div_up(4 * threads, panels));
        // Few rows: every thread copies all, since from another core's cache they would come line by line.  Many
        // are copied before the region: a barrier would cost more, above all where the cores are busy.
        const int64_t a_size = rows_size<T>(tiles.rows, K), copies = a_size <= OWN_ROWS ? threads : 1;
        Carve measure{nullptr};
        measure.take<A>(copies * a_size), measure.take<float>(threads * tiles.rows * PANEL);
        Carve carve{scratch(measure.used)};
        A *as = carve.take<A>(copies * a_size);
        float *cs = carve.take<float>(threads * tiles.rows * PANEL);
        auto pack = [&](A *a) {
            for (int64_t t = 0; t < tiles.count; t++) {
                const T *rows = x + (r0 + tiles.first(t)) * K;
                pack_rows<T>(a + tiles.first(t) * row_size<T>(K), tiles.size(t), K,
                             [&](int64_t i) { return rows + i * K; });
            }
        };
        if (copies == 1) pack(as);
        region(threads, [&](Team &team) {
            float *c = cs + team.rank() * tiles.rows * PANEL;
            A *a = copies > 1 ? as + team.rank() * a_size : as;
            if (copies > 1) pack(a);
            const int64_t items = panels * shares;
            const int64_t chunk = max_of(1, items / (team.size * 2));
            team.loop(0, items, team.size == 1 ? items : chunk, [&](int64_t first, int64_t last) {
                for (int64_t i = first; i < last; i++) {
                    const int64_t p = i / shares, share = i % shares;
                    const int64_t t0 = share * tiles.count / shares;
                    const int64_t t1 = (share + 1) * tiles.count / shares;
                    const T *panel = w + p * size;
                    gemm_panel<T>(tiles, t0, t1, a, panel, p + 1 < panels ? panel + size : nullptr, K, c);
                    const int64_t row = tiles.first(t0), m = tiles.first(t1) - row;
                    finish_linear(m, c + row * PANEL, y + (r0 + row) * N, bias,
                                  residual ? residual + (r0 + row) * N : nullptr, N, p * PANEL, past);
                }
            });
            end_stream();
        });
    }
}
