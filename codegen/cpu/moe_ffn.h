// moe_ffn: y[R, D] = sum_j weights[r, j] * expert(experts[r, j], x[r])
//          expert(e, x) = (act(x Wg^T + bg) * (x Wu^T + bu)) Wd^T + bd, hidden width F
//
// gate_up is packed [E, 2F, D], gate rows first; down is packed [E, D, F].  The (row, j) pairs,
// slots, are sorted by expert, so that each expert that any row chose is read once; then two
// phases, each shared out over all experts' panels: gate and up with the activation, and down.
// (Where F is no multiple of 32, gate and up columns do not pair by panel, and the activation is a
// phase of its own.)  The slots of a row are added up in the order of j, whatever else runs.
#pragma once

#include "gemm.h"

enum Activation : int64_t { SILU, GELU, GELU_TANH, RELU };

static INLINE vf activate(vf x, int64_t kind) {
    if (kind == SILU) return silu(x);
    if (kind == RELU) return x < vf{} ? vf{} : x;
    if (kind == GELU_TANH) {
        vf u = fma(x * x, x * 0.044715f, x) * 1.5957691216057308f;
        return x / (vexp(-u) + 1.0f);
    }
    // x * Phi(x), with erfc as in Abramowitz and Stegun 7.1.26
    vf a = (x < vf{} ? -x : x) * 0.70710678118654752f;
    vf t = 1.0f / fma(a, splat(0.3275911f), splat(1.0f));
    vf p = fma(t, splat(1.061405429f), splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f)) * t * vexp(-a * a);
    return x * (x < vf{} ? p * 0.5f : 1.0f - p * 0.5f);
}

struct MoeShape {
    int64_t D, F, E, k, activation;
};

// The slots of some rows by expert.  Tiles are numbered through all experts.
struct Sorted {
    int64_t slots, touched, tiles;
    int64_t *expert, *first;         // of each touched expert; first[touched] = slots
    int64_t *first_tile;             // of each touched expert; first_tile[touched] = tiles
    int64_t *tile_slot, *tile_rows;  // of each tile
    int64_t *row, *place;            // row of a slot; slot of a (row, j), -1 where there is none
};

template <class T>
static void sort_slots(Sorted &s, Carve &carve, const int32_t *experts, int64_t R, int64_t E,
                       int64_t k) {
    int64_t *count = carve.take<int64_t>(E + 1);
    s.expert = carve.take<int64_t>(E), s.first = carve.take<int64_t>(E + 1);
    s.first_tile = carve.take<int64_t>(E + 1);
    s.tile_slot = carve.take<int64_t>(R * k), s.tile_rows = carve.take<int64_t>(R * k);
    s.row = carve.take<int64_t>(R * k), s.place = carve.take<int64_t>(R * k);
    if (!carve.base) return;

    memset(count, 0, size_t(E + 1) * 8);
    for (int64_t i = 0; i < R * k; i++)
        if (experts[i] >= 0 && experts[i] < E) count[experts[i]]++;
    s.slots = s.touched = s.tiles = 0;
    for (int64_t e = 0; e < E; e++) {
        const Tiling tiles = tiles_of<T>(count[e]);
        if (!count[e]) continue;
        s.expert[s.touched] = e, s.first[s.touched] = s.slots;
        s.first_tile[s.touched++] = s.tiles;
        for (int64_t t = 0; t < tiles.count; t++) {
            s.tile_slot[s.tiles] = s.slots + tiles.first(t);
            s.tile_rows[s.tiles++] = tiles.size(t);
        }
        count[e] = s.slots, s.slots += tiles.rows;
    }
    s.first[s.touched] = s.slots, s.first_tile[s.touched] = s.tiles;
    for (int64_t i = 0; i < R * k; i++) {
        const bool known = experts[i] >= 0 && experts[i] < E;
        s.place[i] = known ? count[experts[i]]++ : -1;
        if (known) s.row[s.place[i]] = i / k;
    }
}

// Panels of the touched experts, in the order in which they are multiplied.
template <class T> struct Panels {
    const Sorted &s;
    const T *w;
    int64_t count, size;  // of an expert's panels; of a panel

    const T *at(int64_t e, int64_t p) const {
        if (p >= count) e++, p = 0;
        return e < s.touched ? w + (s.expert[e] * count + p) * size : nullptr;
    }
};

// out[panel][slot][32] = A[slot] W[expert of the slot]^T for one panel of one expert.
template <class T>
static INLINE void expert_panel(const Sorted &s, int64_t e, int64_t p,
                                const typename Operand<T>::A *a, const T *panel, const T *next,
                                int64_t K, float *out) {
    const int64_t slot = s.first[e];
    gemm_panel<T>(tiles_of<T>(s.first[e + 1] - slot), 0, s.first_tile[e + 1] - s.first_tile[e],
                  a + slot * row_size<T>(K), panel, next, K, out + (p * s.slots + slot) * PANEL);
}

// body(e, p) for each touched expert and each of `per` panels.
template <class Body>
static INLINE void each_panel(Team &team, int phase, const Sorted &s, int64_t per, Body &&body) {
    const int64_t items = s.touched * per;
    const int64_t chunk = team.size == 1 ? items : max_of(1, min_of(per, items / (team.size * 6)));
    team.loop(phase, items, chunk, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) body(i / per, i % per);
    });
}

// Columns [f0, f1) of the hidden layer, within one block of KC, for the slots of an expert.
template <class T>
static void activate_columns(const Sorted &s, int64_t e, int64_t f0, int64_t f1, const float *h,
                             const T *bias, typename Operand<T>::A *act, const MoeShape &shape) {
    const int64_t F = shape.F, block = f0 / KC, LDA = Operand<T>::LDA;
    if (bias) bias += s.expert[e] * 2 * F;
    for (int64_t t = s.first_tile[e]; t < s.first_tile[e + 1]; t++) {
        const int64_t slot = s.tile_slot[t], m = s.tile_rows[t];
        typename Operand<T>::A *a = act + slot * row_size<T>(F) + block * m * LDA;
        for (int64_t i = 0; i < m; i++, a += LDA) {
            auto at = [&](int64_t column) {
                return h + (column / PANEL * s.slots + slot + i) * PANEL + column % PANEL;
            };
            for (int64_t f = f0; f < f1; f += VL) {
                const int64_t n = f1 - f;
                vf gate = load(at(f)), up;
                if (F % VL == 0) {
                    up = load(at(F + f));
                } else {
                    for (int64_t l = 0; l < VL; l++) up[l] = l < n ? *at(F + f + l) : 0.0f;
                }
                if (bias) gate += load_n(bias + f, n), up += load_n(bias + F + f, n);
                store_n(a + (f - block * KC), rounded<T>(activate(gate, shape.activation) * up), n);
            }
            for (int64_t f = f1 - block * KC; f % Operand<T>::STEP; f++) a[f] = {};
        }
    }
}

template <class T>
static void gate_and_up(Team &team, const Sorted &s, const typename Operand<T>::A *x, const T *w,
                        const T *bias, float *h, typename Operand<T>::A *act,
                        const MoeShape &shape) {
    const int64_t F = shape.F, D = shape.D;
    const Panels<T> panels{s, w, div_up(2 * F, PANEL), panel_size<T>(D)};
    if (F % PANEL == 0) {
        const int64_t half = F / PANEL;
        each_panel(team, 0, s, half, [&](int64_t e, int64_t p) {
            const T *gate = panels.at(e, p), *up = panels.at(e, half + p);
            const T *next = p + 1 < half ? panels.at(e, p + 1) : panels.at(e + 1, 0);
            expert_panel<T>(s, e, p, x, gate, up, D, h);
            expert_panel<T>(s, e, half + p, x, up, next, D, h);
            activate_columns<T>(s, e, p * PANEL, (p + 1) * PANEL, h, bias, act, shape);
        });
        return;
    }
    each_panel(team, 0, s, panels.count, [&](int64_t e, int64_t p) {
        expert_panel<T>(s, e, p, x, panels.at(e, p), panels.at(e, p + 1), D, h);
    });
    team.barrier();
    each_panel(team, 1, s, div_up(F, KC), [&](int64_t e, int64_t block) {
        const int64_t f = block * KC;
        activate_columns<T>(s, e, f, min_of(F, f + KC), h, bias, act, shape);
    });
}

template <class T>
static INLINE void combine_row(const Sorted &s, int64_t r, const float *out, const float *weights,
                               const int32_t *experts, const T *bias, T *y, const MoeShape &shape) {
    for (int64_t d = 0; d < shape.D; d += VL) {
        const int64_t n = shape.D - d;
        vf sum = {};
        for (int64_t j = 0; j < shape.k; j++) {
            const int64_t slot = s.place[r * shape.k + j];
            if (slot < 0) continue;
            vf v = load(out + (d / PANEL * s.slots + slot) * PANEL + d % PANEL);
            if (bias) v += load_n(bias + experts[r * shape.k + j] * shape.D + d, n);
            sum = fma(v, splat(weights[r * shape.k + j]), sum);
        }
        store_n(y + r * shape.D + d, sum, n);
    }
}

template <class T> struct MoeScratch {
    Sorted sorted;
    typename Operand<T>::A *x, *act;
    float *hidden, *out;  // [panel][slot][32]: gate and up; down. The same memory.

    MoeScratch(Carve &carve, const int32_t *experts, int64_t R, const MoeShape &s) {
        const int64_t slots = R * s.k;
        sort_slots<T>(sorted, carve, experts, R, s.E, s.k);
        x = carve.take<typename Operand<T>::A>(slots * row_size<T>(s.D));
        act = carve.take<typename Operand<T>::A>(slots * row_size<T>(s.F));
        hidden = out = carve.take<float>(slots * div_up(max_of(2 * s.F, s.D), PANEL) * PANEL);
    }
};

template <class T>
static void moe_rows(T *y, const T *x, const float *weights, const int32_t *experts,
                     const T *gate_up, const T *down, const T *gate_up_bias, const T *down_bias,
                     int64_t R, const MoeShape &shape) {
    Carve measure{nullptr};
    MoeScratch<T>(measure, experts, R, shape);
    Carve carve{scratch(measure.used)};
    MoeScratch<T> w(carve, experts, R, shape);
    const Sorted &s = w.sorted;

    for (int64_t t = 0; t < s.tiles; t++) {
        const int64_t slot = s.tile_slot[t];
        pack_rows<T>(w.x + slot * row_size<T>(shape.D), s.tile_rows[t], shape.D,
                     [&](int64_t i) { return x + s.row[slot + i] * shape.D; });
    }
    region(threads_for(s.slots * shape.D * shape.F * 3), [&](Team &team) {
        gate_and_up<T>(team, s, w.x, gate_up, gate_up_bias, w.hidden, w.act, shape);
        team.barrier();
        const Panels<T> panels{s, down, div_up(shape.D, PANEL), panel_size<T>(shape.F)};
        each_panel(team, 2, s, panels.count, [&](int64_t e, int64_t p) {
            expert_panel<T>(s, e, p, w.act, panels.at(e, p), panels.at(e, p + 1), shape.F, w.out);
        });
    });
    for (int64_t r = 0; r < R; r++)
        combine_row<T>(s, r, w.out, weights, experts, down_bias, y, shape);
}

template <class T>
static void moe_ffn(T *y, const T *x, const float *weights, const int32_t *experts,
                    const T *gate_up, const T *down, const T *gate_up_bias, const T *down_bias,
                    int64_t R, MoeShape shape) {
    // As many rows at once as keep the scratch memory near 64 MiB.
    const int64_t slot = 4 * (3 * shape.F + 2 * shape.D + 2 * KC);
    const int64_t block = max_of(32, (64 << 20) / (slot * max_of(1, shape.k)));
    for (int64_t r = 0; r < R; r += block)
        moe_rows<T>(y + r * shape.D, x + r * shape.D, weights + r * shape.k, experts + r * shape.k,
                    gate_up, down, gate_up_bias, down_bias, min_of(block, R - r), shape);
}
