// moe_ffn: y[R, D] = sum_j weights[r, j] * expert(experts[r, j], x[r])
//          expert(e, x) = (act(x Wg^T + bg) * (x Wu^T + bu)) Wd^T + bd, hidden width F
//
// gate_up is packed [E, 2F, D], gate rows first; down is packed [E, D, F].  The (row, j) pairs,
// slots, are sorted by expert, so that each expert that any row chose is read once; then three
// phases: gate and up with the activation, and down, each shared out over all experts' panels, and
// the sums, shared out over the columns.  (Where F is no multiple of 32, gate and up columns do not
// pair by panel, and the activation is a phase of its own.)  The slots of a row are added up in the
// order of j, whatever else runs.
#pragma once

#include "moe_slots.h"

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

// c[slot of the expert][32] = A[slot of the expert] W[e]^T for one panel of one expert.
template <class T>
static INLINE void expert_panel(const Sorted &s, int64_t e, const typename Operand<T>::A *a,
                                const T *panel, const T *next, int64_t K, float *c) {
    gemm_panel<T>(tiles_of<T>(s.first[e + 1] - s.first[e]), 0, s.first_tile[e + 1] - s.first_tile[e],
                  a, panel, next, K, c);
}

// body(e, p) for each touched expert and each of `per` panels.
template <class Body>
static INLINE void each_panel(Team &team, int phase, const Sorted &s, int64_t per, Body &&body) {
    const int64_t items = s.touched * per;
    const int64_t chunk = max_of(1, min_of(per, items / (team.size * 6)));
    team.loop_uneven(phase, items, chunk, [&](int64_t first, int64_t last) {
        int64_t e = first / per, p = first % per;
        for (int64_t i = first; i < last; i++) {
            body(e, p);
            if (++p == per) p = 0, e++;
        }
    });
}

// Columns [f0, f1) of the hidden layer, within one block of KC, for the slots of an expert; at(slot, column)
// is where gate and up stand.
template <class T, class At>
static void activate_columns(const Sorted &s, int64_t e, int64_t f0, int64_t f1, At &&at,
                             const T *bias, typename Operand<T>::A *act, const MoeShape &shape) {
    const int64_t F = shape.F, block = f0 / KC, LDA = Operand<T>::LDA;
    if (bias) bias += s.expert[e] * 2 * F;
    for (int64_t t = s.first_tile[e]; t < s.first_tile[e + 1]; t++) {
        const int64_t slot = s.tile_slot[t], m = s.tile_rows[t];
        typename Operand<T>::A *a = act + slot * row_size<T>(F) + block * m * LDA;
        for (int64_t i = 0; i < m; i++, a += LDA) {
            for (int64_t f = f0; f < f1; f += VL) {
                const int64_t n = f1 - f;
                vf gate = load(at(slot + i, f)), up;
                if (F % VL == 0) {
                    up = load(at(slot + i, F + f));
                } else {
                    for (int64_t l = 0; l < VL; l++) up[l] = l < n ? *at(slot + i, F + f + l) : 0.0f;
                }
                if (bias) gate += load_n(bias + f, n), up += load_n(bias + F + f, n);
                const vf v = rounded<T>(activate(gate, shape.activation) * up);
                if (n >= VL)
                    put(a + (f - block * KC), v, s.past);
                else
                    store_n(a + (f - block * KC), v, n);
            }
            for (int64_t f = f1 - block * KC; f % Operand<T>::STEP; f++) a[f] = {};
        }
    }
}

template <class T>
static void gate_and_up(Team &team, const Sorted &s, const ExpertRows<T> &x, const T *w,
                        const T *bias, float *c, float *h, typename Operand<T>::A *act,
                        const MoeShape &shape) {
    const int64_t F = shape.F, D = shape.D;
    const Panels<T> panels{s, w, div_up(2 * F, PANEL), panel_size<T>(D)};
    int64_t last = -1;
    if (F % PANEL == 0) {
        const int64_t half = F / PANEL;
        each_panel(team, 0, s, half, [&](int64_t e, int64_t p) {
            const int64_t first = s.first[e], rows = s.first[e + 1] - first;
            const T *gate = panels.at(e, p), *up = panels.at(e, half + p);
            const T *next = p + 1 < half ? panels.at(e, p + 1) : panels.at(e + 1, 0);
            const auto *a = x.of(e, team.rank(), last);
            expert_panel<T>(s, e, a, gate, up, D, c);
            expert_panel<T>(s, e, a, up, next, D, c + rows * PANEL);
            auto at = [&](int64_t slot, int64_t column) {
                return c + ((column < F ? 0 : rows) + slot - first) * PANEL + column % PANEL;
            };
            activate_columns<T>(s, e, p * PANEL, (p + 1) * PANEL, at, bias, act, shape);
        });
        return;
    }
    each_panel(team, 0, s, panels.count, [&](int64_t e, int64_t p) {
        expert_panel<T>(s, e, x.of(e, team.rank(), last), panels.at(e, p), panels.at(e, p + 1), D,
                        h + (p * s.slots + s.first[e]) * PANEL);
    });
    team.barrier();
    each_panel(team, 1, s, div_up(F, KC), [&](int64_t e, int64_t block) {
        const int64_t f = block * KC;
        auto at = [&](int64_t slot, int64_t column) {
            return h + (column / PANEL * s.slots + slot) * PANEL + column % PANEL;
        };
        activate_columns<T>(s, e, f, min_of(F, f + KC), at, bias, act, shape);
    });
}

// Columns of panel p of y, for all rows; out is [panel][slot][32].
template <class T>
static INLINE void combine_panel(const Sorted &s, int64_t p, int64_t R, const float *out,
                                 const float *weights, const int32_t *experts, const T *bias, T *y,
                                 const MoeShape &shape) {
    const float *of = out + p * s.slots * PANEL;
    if (s.past)
        for (int64_t i = 0; i < s.slots * PANEL; i += 64 / 4) __builtin_prefetch(of + i, 0, 2);
    for (int64_t i = 0; i < R * shape.k; i += shape.k) {
        T *row = y + i / shape.k * shape.D;
        for (int64_t d = p * PANEL; d < min_of(shape.D, (p + 1) * PANEL); d += VL) {
            const int64_t n = shape.D - d;
            vf sum = {};
            for (int64_t j = i; j < i + shape.k; j++) {
                if (s.place[j] < 0) continue;
                vf v = load(of + s.place[j] * PANEL + d % PANEL);
                if (bias) v += load_n(bias + experts[j] * shape.D + d, n);
                sum = fma(v, splat(weights[j]), sum);
            }
            store_n(row + d, sum, n);
        }
    }
}

template <class T> struct MoeScratch {
    Sorted sorted;
    ExpertRows<T> x;
    typename Operand<T>::A *act;
    float *hidden, *out;  // [panel][slot][32]: gate and up; down. The same memory.
    float *c;             // of each thread, [2][slots of an expert][32]
    int64_t c_size;

    MoeScratch(Carve &carve, const T *rows, const int32_t *experts, int64_t R, const MoeShape &s,
               int64_t threads)
        : sorted(sort_slots<T>(carve, experts, R, s)),
          x(carve, sorted, rows, R, s.k, s.D, threads) {
        const int64_t slots = R * s.k;
        act = carve.take<typename Operand<T>::A>(rows_size<T>(slots, s.F));
        hidden = out = carve.take<float>(slots * div_up(max_of(2 * s.F, s.D), PANEL) * PANEL);
        c_size = 2 * R * PANEL + 32;
        c = carve.take<float>(threads * c_size);
    }
};

template <class T>
static void moe_rows(T *y, const T *x, const float *weights, const int32_t *experts,
                     const T *gate_up, const T *down, const T *gate_up_bias, const T *down_bias,
                     int64_t R, const MoeShape &shape) {
    const int64_t threads = threads_for(R * shape.k * shape.D * shape.F * 3);
    Carve measure{nullptr};
    MoeScratch<T>(measure, x, experts, R, shape, threads);
    Carve carve{scratch(measure.used)};
    MoeScratch<T> w(carve, x, experts, R, shape, threads);
    const Sorted &s = w.sorted;

    w.x.pack_all();
    region(threads, [&](Team &team) {
        float *c = w.c + team.rank() * w.c_size;
        gate_and_up<T>(team, s, w.x, gate_up, gate_up_bias, c, w.hidden, w.act, shape);
        end_stream();
        team.barrier();
        const Panels<T> panels{s, down, div_up(shape.D, PANEL), panel_size<T>(shape.F)};
        each_panel(team, 2, s, panels.count, [&](int64_t e, int64_t p) {
            const int64_t first = s.first[e], rows = s.first[e + 1] - first;
            const auto *a = w.act + first * row_size<T>(shape.F);
            expert_panel<T>(s, e, a, panels.at(e, p), panels.at(e, p + 1), shape.F, c);
            float *to = w.out + (p * s.slots + first) * PANEL;
            for (int64_t i = 0; i < rows * PANEL; i += VL) put(to + i, load(c + i), s.past);
        });
        end_stream();
        team.barrier();
        team.loop(3, panels.count, 1, [&](int64_t p, int64_t) {
            combine_panel<T>(s, p, R, w.out, weights, experts, down_bias, y, shape);
        });
    });
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
