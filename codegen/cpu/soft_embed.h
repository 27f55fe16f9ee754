// soft_embed: y[r] = weight[r] softmax(x[r] W^T (+ bias)) E for live rows, 0 for the others.
//
// As attention, with the vocabulary for keys: blocks of 256 tokens go by, a row's mixture is scaled down
// whenever a larger logit comes.  The vocabulary is cut into SHARES, whatever the number of threads, and
// their mixtures are added in order, so neither threads nor other rows show in the bits.
#pragma once

#include "gemm.h"

enum : int64_t { SOFT_BLOCK = 256, SOFT_ROWS = 128, SHARES = 8, SOFT_TILE = 6 };

struct SoftShape {
    int64_t R, V, D, E;
};

// Logits to exp(z - peak) in place, for one row of a block; the sum is what they add up to.
template <class T>
static float soften(float *z, int64_t stride, const T *bias, int64_t count, float *peak, float *scale) {
    const float low = -__builtin_inff();
    vf top = splat(*peak);
    for (int64_t j = 0; j < count; j += VL) {
        float *at = z + j / PANEL * stride + j % PANEL;
        vf v = load(at);
        if (bias) v += load_n(bias + j, count - j);
        v = rounded<T>(v);
        v = (v == v) & (lanes() + int32_t(j) < int32_t(count)) ? v : splat(low);
        store(at, v);
        top = vmax(v, top);
    }
    const float now = hmax(top), shift = now == low ? 0.0f : now;
    *scale = exp1(*peak - shift);
    *peak = now;
    vf sum = {};
    for (int64_t j = 0; j < count; j += VL) {
        float *at = z + j / PANEL * stride + j % PANEL;
        const vf e = vexp(load(at) - shift);
        sum += e;
        store(at, e);
    }
    return hsum(sum);
}

// mix[i] = scale[i] mix[i] + p[i] E for M rows of a block; p [panel][rows][32], E [count, width].
template <class T, int M>
static void mix_rows(float *mix, const float *scale, const float *p, int64_t stride, const T *table,
                     int64_t count, int64_t width) {
    for (int64_t e = 0; e < width; e += VL) {
        const int64_t n = width - e;
        vf sum[M];
        for (int i = 0; i < M; i++) sum[i] = load_n(mix + i * width + e, n) * scale[i];
        for (int64_t j = 0; j < count; j++) {
            const float *at = p + j / PANEL * stride + j % PANEL;
            const T *row = table + j * width + e;
            const vf v = n >= VL ? load(row) : load_n(row, n);
            for (int i = 0; i < M; i++) sum[i] = fma(splat(at[i * PANEL]), v, sum[i]);
        }
        for (int i = 0; i < M; i++) store_n(mix + i * width + e, sum[i], n);
    }
}

template <class T>
static void mix_block(int64_t rows, float *mix, const float *scale, const float *p, int64_t stride,
                      const T *table, int64_t count, int64_t width) {
    for (int64_t i = 0; i < rows; i += SOFT_TILE) {
        float *to = mix + i * width;
        const float *from = p + i * PANEL;
        switch (min_of(SOFT_TILE, rows - i)) {
        case 1: mix_rows<T, 1>(to, scale + i, from, stride, table, count, width); break;
        case 2: mix_rows<T, 2>(to, scale + i, from, stride, table, count, width); break;
        case 3: mix_rows<T, 3>(to, scale + i, from, stride, table, count, width); break;
        case 4: mix_rows<T, 4>(to, scale + i, from, stride, table, count, width); break;
        case 5: mix_rows<T, 5>(to, scale + i, from, stride, table, count, width); break;
        default: mix_rows<T, 6>(to, scale + i, from, stride, table, count, width);
        }
    }
}

template <class T>
static void soft_embed_rows(T *y, const T *x, const T *w, const T *bias, const T *table,
                            const float *weight, const int64_t *index, int64_t count,
                            const SoftShape &s) {
    typedef typename Operand<T>::A A;
    const int64_t V = s.V, D = s.D, E = s.E, size = panel_size<T>(D);
    const int64_t panels = div_up(V, PANEL), blocks = div_up(V, SOFT_BLOCK), per = SOFT_BLOCK / PANEL;
    const int64_t shares = min_of(SHARES, blocks), threads = threads_for(V * (D + E) * count);
    const float low = -__builtin_inff();
    const Tiling tiles = tiles_of<T>(count);

    Carve measure{nullptr};
    measure.take<A>(rows_size<T>(count, D)), measure.take<float>(shares * count * E);
    measure.take<float>(2 * shares * count), measure.take<float>(threads * count * (SOFT_BLOCK + 1));
    Carve carve{scratch(measure.used)};
    A *a = carve.take<A>(rows_size<T>(count, D));
    float *mixes = carve.take<float>(shares * count * E);
    float *peaks = carve.take<float>(2 * shares * count), *sums = peaks + shares * count;
    float *buffers = carve.take<float>(threads * count * (SOFT_BLOCK + 1));

    for (int64_t t = 0; t < tiles.count; t++) {
        const int64_t *of = index + tiles.first(t);
        pack_rows<T>(a + tiles.first(t) * row_size<T>(D), tiles.size(t), D,
                     [&](int64_t i) { return x + of[i] * D; });
    }
    region(threads, [&](Team &team) {
        float *z = buffers + team.rank() * count * (SOFT_BLOCK + 1), *scale = z + count * SOFT_BLOCK;
        team.loop(0, shares, 1, [&](int64_t share, int64_t) {
            float *mix = mixes + share * count * E, *peak = peaks + share * count;
            float *sum = sums + share * count;
            memset(mix, 0, size_t(count * E) * sizeof(float));
            for (int64_t i = 0; i < count; i++) peak[i] = low, sum[i] = 0.0f;
            for (int64_t b = share * blocks / shares; b < (share + 1) * blocks / shares; b++) {
                for (int64_t p = b * per; p < min_of(panels, (b + 1) * per); p++)
                    gemm_panel<T>(tiles, 0, tiles.count, a, w + p * size,
                                  p + 1 < panels ? w + (p + 1) * size : nullptr, D,
                                  z + (p - b * per) * count * PANEL);
                const int64_t token = b * SOFT_BLOCK, tokens = min_of(SOFT_BLOCK, V - token);
                for (int64_t i = 0; i < count; i++) {
                    const float part = soften<T>(z + i * PANEL, count * PANEL, bias ? bias + token : nullptr,
                                                 tokens, peak + i, scale + i);
                    sum[i] = sum[i] * scale[i] + part;
                }
                mix_block<T>(count, mix, scale, z, count * PANEL, table + token * E, tokens, E);
            }
        });
    });
    for (int64_t i = 0; i < count; i++) {
        float top = low, total = 0.0f, scales[SHARES];
        for (int64_t k = 0; k < shares; k++) top = peaks[k * count + i] > top ? peaks[k * count + i] : top;
        for (int64_t k = 0; k < shares; k++) {
            scales[k] = exp1(peaks[k * count + i] - (top == low ? 0.0f : top));
            total += scales[k] * sums[k * count + i];
        }
        T *out = y + index[i] * E;
        // Of infinite logits no probability is a number: such a row is left as it is.
        const bool sound = total > 0.0f;
        const float by = sound ? weight[index[i]] / total : 0.0f;
        for (int64_t e = 0; e < E; e += VL) {
            vf v = {};
            for (int64_t k = 0; sound && k < shares; k++)
                v += load_n(mixes + (k * count + i) * E + e, E - e) * scales[k];
            store_n(out + e, v * by, E - e);
        }
    }
}

template <class T>
static void soft_embed(T *y, const T *x, const T *w, const T *bias, const T *table,
                       const uint8_t *live, const float *weight, SoftShape s) {
    int64_t index[SOFT_ROWS], count = 0;
    for (int64_t r = 0; r < s.R; r++) {
        if (live[r])
            index[count++] = r;
        else
            memset(y + r * s.E, 0, size_t(s.E) * sizeof(T));
        if (count && (count == SOFT_ROWS || r + 1 == s.R)) {
            soft_embed_rows<T>(y, x, w, bias, table, weight, index, count, s);
            count = 0;
        }
    }
}
