// rms_norm:      y[R, D] = x / sqrt(mean(x^2) + eps) * w[D]
// add_rms_norm:  sum[R, D] = x + r, rounded; y = rms_norm(sum)
// norm_rope_write: qkv[R, (H + 2G) D] -> q, k normalised per head (where weights are given),
//     rotated: x cos + rotate_half(x) sin on the first `rot` of D, halves paired (i, i + rot/2);
//     q goes to q_out[R, H, D], k and v to the caches [N, L, G, D] at [row_seq, row_pos].
#pragma once

#include "team.h"

template <class T> static INLINE float inverse_rms(const T *x, int64_t D, float eps) {
    vf s = {}, t = {};
    int64_t i = 0;
    for (; i + 2 * VL <= D; i += 2 * VL) {
        vf a = load(x + i), b = load(x + i + VL);
        s = fma(a, a, s);
        t = fma(b, b, t);
    }
    for (; i < D; i += VL) {
        vf a = load_n(x + i, D - i);
        s = fma(a, a, s);
    }
    return 1.0f / __builtin_sqrtf(hsum(s + t) / float(D) + eps);
}

template <class T, class O>
static INLINE void scale_row(O *y, const T *x, const T *w, int64_t D, float by) {
    for (int64_t i = 0; i < D; i += VL) {
        vf v = load_n(x + i, D - i) * by;
        if (w) v *= load_n(w + i, D - i);
        store_n(y + i, v, D - i);
    }
}

template <class T>
static void rms_norm(T *y, const T *x, const T *w, int64_t R, int64_t D, float eps) {
    parallel_for(R, R * D * 2 * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++)
            scale_row(y + r * D, x + r * D, w, D, inverse_rms(x + r * D, D, eps));
    });
}

template <class T>
static void add_rms_norm(T *sum, T *y, const T *x, const T *r, const T *w, int64_t R, int64_t D,
                         float eps) {
    parallel_for(R, R * D * 4 * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            T *s = sum + row * D;
            for (int64_t i = 0; i < D; i += VL) {
                vf v = load_n(x + row * D + i, D - i) + load_n(r + row * D + i, D - i);
                store_n(s + i, v, D - i);
            }
            scale_row(y + row * D, s, w, D, inverse_rms(s, D, eps));
        }
    });
}

// One head: to = rotate(norm(from)); `head` holds D floats.
template <class T>
static INLINE void norm_rope(T *to, const T *from, const T *w, const float *cos, const float *sin,
                             int64_t D, int64_t rot, float eps, float *head) {
    scale_row(head, from, w, D, w ? inverse_rms(from, D, eps) : 1.0f);
    const int64_t half = rot / 2;
    for (int64_t i = 0; i < half; i += VL) {
        const int64_t n = half - i;
        vf a = load_n(head + i, n), b = load_n(head + half + i, n);
        vf ra = fma(a, load_n(cos + i, n), -(b * load_n(sin + i, n)));
        vf rb = fma(b, load_n(cos + half + i, n), a * load_n(sin + half + i, n));
        store_n(to + i, ra, n);
        store_n(to + half + i, rb, n);
    }
    for (int64_t i = 2 * half; i < D; i += VL) store_n(to + i, load_n(head + i, D - i), D - i);
}

struct RopeShape {
    int64_t R, H, G, D, L, rot;
};

template <class T>
static void norm_rope_write(T *q_out, T *keys, T *values, const T *qkv, const T *q_norm,
                            const T *k_norm, const float *cos, const float *sin,
                            const int64_t *row_seq, const int64_t *row_pos, RopeShape s, float eps) {
    const int64_t D = s.D, width = (s.H + 2 * s.G) * D, padded = (D + 31) & ~int64_t(15);
    float *heads = reinterpret_cast<float *>(scratch(num_threads() * padded * 4));
    parallel_for(s.R, s.R * width * 2 * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
        float *head = heads + Team::rank() * padded;
        for (int64_t r = first; r < last; r++) {
            const T *from = qkv + r * width;
            const float *c = cos + row_pos[r] * s.rot, *n = sin + row_pos[r] * s.rot;
            const int64_t at = (row_seq[r] * s.L + row_pos[r]) * s.G * D;
            for (int64_t h = 0; h < s.H; h++, from += D)
                norm_rope(q_out + (r * s.H + h) * D, from, q_norm, c, n, D, s.rot, eps, head);
            for (int64_t g = 0; g < s.G; g++, from += D)
                norm_rope(keys + at + g * D, from, k_norm, c, n, D, s.rot, eps, head);
            memcpy(values + at, from, size_t(s.G * D) * sizeof(T));
        }
    });
}
