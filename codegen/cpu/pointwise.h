// silu_mul:    y[R, F] = silu(gate) * up, rows of gate and up at strides of their own
// embedding:   out[R, D] = table[ids]
// gather_rows: out[C, row] = x[index]
#pragma once

#include "team.h"

template <class T>
static void silu_mul(T *y, const T *gate, const T *up, int64_t R, int64_t F, int64_t gate_stride,
                     int64_t up_stride) {
    parallel_for(R, R * F * 4, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            const T *g = gate + r * gate_stride, *u = up + r * up_stride;
            for (int64_t i = 0; i < F; i += VL)
                store_n(y + r * F + i, silu(load_n(g + i, F - i)) * load_n(u + i, F - i), F - i);
        }
    });
}

static void gather_rows(char *out, const char *x, const int64_t *index, int64_t C, int64_t bytes) {
    parallel_for(C, C * bytes / 4, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; c++)
            memcpy(out + c * bytes, x + index[c] * bytes, size_t(bytes));
    });
}
