// A block of the vocabulary, for one row: its largest logits and the sums over it.
#pragma once

#include "gemm.h"

enum : int64_t { BLOCK = 8 * PANEL, CHOICE_ROWS = 256 };

// ---- Gumbel noise: -ln(-ln U), U = ((u >> 8) + 0.5) 2^-24, u a hash of key and token

static INLINE uint32_t mix(uint32_t x) {
    x ^= x >> 16, x *= 0x7feb352du;
    x ^= x >> 15, x *= 0x846ca68bu;
    return x ^ (x >> 16);
}
static INLINE vu mix(vu x) {
    x ^= x >> 16, x *= 0x7feb352du;
    x ^= x >> 15, x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

static INLINE uint32_t noise_key(uint64_t seed, uint64_t tick, uint64_t pos) {
    uint32_t k = mix(uint32_t(seed) ^ mix(uint32_t(seed >> 32)));
    k = mix(k ^ uint32_t(tick));
    return mix(k + uint32_t(pos) * 0x9E3779B9u);
}

// U has 25 bits; near 1, where float32 has not so many, ln U is computed from 1 - U, exact there.
static INLINE vf gumbel(uint32_t key, vi token) {
    vi h = (vi)(mix(key + (vu)token * 0x85EBCA6Bu) >> 8);
    vf low = (__builtin_convertvector(h, vf) + 0.5f) * 0x1p-24f;
    vf rest = (__builtin_convertvector(0xffffff - h, vf) + 0.5f) * 0x1p-24f;
    vi near = rest < splat(0.29289f);
    vi middle = h >= (1 << 23);
    vi bits = (vi)low;
    vi e = (bits - 0x3f3504f3) >> 23;
    vf r = (vf)(bits - (e << 23)) - 1.0f;
    vf exponent = __builtin_convertvector(e, vf);
    r = near ? -rest : (middle ? 1.0f - 2.0f * rest : r);
    exponent = near ? vf{} : (middle ? splat(-1.0f) : exponent);
    return -vlog(-log_of(r, exponent));
}

// ---- what is kept of a block of the vocabulary

enum Field { MAX, SUM, ZSUM, BEST, SECOND, TOKEN, NOISY, NOISY_TOKEN, NOISY_Z };

// Of one row, in a cache line of its own.
struct alignas(64) Kept {
    float of[16];

    INLINE int32_t token(Field field) const {
        int32_t t;
        memcpy(&t, of + field, 4);
        return t;
    }
};

struct Row {
    int64_t index;  // of C
    float temperature;
    uint32_t key;
};

// The tokens that a row asks about, and what it is told.
struct Asked {
    const int64_t *token;
    float *probability, *score, *choice;  // [C, S], [C, S], [C]
    int64_t S;
};

static const float NONE = 2147483648.0f;  // no token, above every other

// The largest value, its lowest token, and a third value that goes with them.
struct Peak {
    vf value, also;
    vi token;

    Peak() : value(splat(-__builtin_inff())), also(value), token(splat_i(INT32_MAX)) {}
    INLINE void see(vf v, vi t, vf a) {
        // A -inf is a value too, though only if nothing was seen before it.
        vi better = (v > value) | ((v == value) & (token == INT32_MAX));
        value = better ? v : value;
        token = better ? t : token;
        also = better ? a : also;
    }
    // Where the largest value with the lowest token stands; tokens went by, VL at a time, from a multiple of VL.
    int lane() const {
        const vi of = value == hmax(value) ? token : splat_i(INT32_MAX);
        int32_t least = INT32_MAX;
        for (int i = 0; i < VL; i++) least = of[i] < least ? of[i] : least;
        return least % VL;
    }
};

// The first of two passes where nothing is masked, nothing outside the vocabulary, and no noise: false where a
// lane met no number above -inf.
template <class T>
static INLINE bool reduce_plain(float *z, int64_t stride, const T *bias, int64_t token0, Peak &best,
                                vf &second) {
    vi token = lanes() + int32_t(token0);
    for (int64_t j = 0; j < BLOCK; j += VL, token += VL) {
        float *at = z + j / PANEL * stride + j % PANEL;
        vf v = load(at);
        if (bias) v += load(bias + token0 + j);
        v = rounded<T>(v);
        store(at, v);
        second = vmax(vmin(best.value, v), second);  // a NaN passes neither
        const vi better = v > best.value;
        best.value = better ? v : best.value;
        best.token = better ? token : best.token;
    }
    best.also = best.value;
    return -hmax(-best.value) > -__builtin_inff();
}

// z: the block's logits of one row, [panel][rows][32].
template <class T>
static Kept reduce_block(float *z, int64_t stride, const T *bias, int64_t token0, int64_t V,
                         int64_t mask_id, const Row &row, const Asked &asked) {
    const float low = -__builtin_inff();
    const int64_t count = min_of(BLOCK, V - token0);
    vf top = splat(low), second = top;
    Peak best, noisy;
    const bool masks = token0 <= mask_id && mask_id < token0 + BLOCK;
    bool done = false;
    if (count == BLOCK && !masks && !(row.temperature > 0.0f)) {
        done = reduce_plain(z, stride, bias, token0, best, second);
        top = best.value;
        bias = nullptr;  // is in z by now
        if (!done) best = Peak(), top = second = splat(low);
    }
    for (int64_t j = 0; j < count && !done; j += VL) {
        float *at = z + j / PANEL * stride + j % PANEL;
        vf v = load(at);
        if (bias) v += load_n(bias + token0 + j, count - j);
        v = rounded<T>(v);
        const vi token = lanes() + int32_t(token0 + j);
        const vi inside = token < int32_t(V);
        v = inside ? v : splat(low);
        store(at, v);
        top = vmax(v, top);
        // Outside the vocabulary and the mask's id nothing can be chosen; nor can a NaN.
        const vi open = inside & (token != int32_t(mask_id)) & (v == v);
        const vf choice = open ? v : splat(__builtin_nanf(""));
        second = vmax(vmin(best.value, choice), second);  // a NaN passes neither
        best.see(choice, token, choice);
        if (row.temperature > 0.0f)
            noisy.see(choice / row.temperature + gumbel(row.key, token), token, choice);
    }
    for (int64_t s = row.index * asked.S; s < (row.index + 1) * asked.S; s++) {
        const int64_t j = asked.token[s] - token0;
        if (0 <= j && j < count) asked.probability[s] = z[j / PANEL * stride + j % PANEL];
    }
    const float peak = hmax(top), shift = peak == low ? 0.0f : peak;
    vf sum = {}, zsum = {};
    for (int64_t j = 0; j < count; j += VL) {
        vf d = load(z + j / PANEL * stride + j % PANEL) - shift;
        vf e = vexp(d);
        sum += e;
        zsum += e == vf{} ? vf{} : e * d;
    }
    const int lane = best.lane(), n = row.temperature > 0.0f ? noisy.lane() : 0;
    const vf others = lanes() == lane ? splat(low) : best.value;
    const float runner_up = hmax(vmax(others, second));
    Kept kept = {{peak, hsum(sum), hsum(zsum), best.value[lane], runner_up, 0, noisy.value[n], 0,
                  noisy.also[n]}};
    memcpy(kept.of + TOKEN, (const int32_t *)&best.token + lane, 4);
    memcpy(kept.of + NOISY_TOKEN, (const int32_t *)&noisy.token + n, 4);
    return kept;
}
