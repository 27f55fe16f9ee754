// vocab_choice: of each live row of x[C, D], the token to choose and how sure the model is.
//
// z = x W^T (+ bias) over the vocabulary, rounded to T; p = softmax(z).
//     token       argmax of z without mask_id, or of z / t + Gumbel noise where t > 0; ties go to
//                 the lowest id
//     confidence  p[token];  margin  difference of the two largest p without mask_id
//     entropy     -sum p ln p
// vocab_choice_asked also tells, of tokens asked[C, S] named for each row, p and the score by which
// the choice is made: z, or z / t + noise; a block leaves their logits where p will stand.
// The vocabulary goes by blocks of 256 tokens: a block's logits live in a buffer of the thread,
// and only its largest values and sums are kept.  Blocks are merged in their order, so neither
// threads nor other rows show in the bits.
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

struct Choice {
    int64_t token;
    float confidence, margin, entropy;
    float score, shift, total;  // p of a logit z is exp(z - shift) / total
};

// Of infinite logits no probability is a number; a policy has to go on all the same.
static float number(float p) { return p == p ? p : 0.0f; }

// sums: room for 3 * blocks.
static Choice merge_blocks(const Kept *kept, int64_t blocks, float *sums, bool noisy,
                           int64_t mask_id) {
    const float low = -__builtin_inff();
    float *tops = sums, *totals = sums + blocks, *weighted = totals + blocks;
    float top = low, best = low, second = low, chosen = low, value = low;
    int32_t token = INT32_MAX;
    for (int64_t b = 0; b < blocks; b++) {
        const Kept &f = kept[b];
        tops[b] = f.of[MAX], totals[b] = f.of[SUM], weighted[b] = f.of[ZSUM];
        top = f.of[MAX] > top ? f.of[MAX] : top;
        const float v = f.of[BEST];
        second = f.of[SECOND] > second ? f.of[SECOND] : second;
        const float lesser = v > best ? best : v;
        second = lesser > second ? lesser : second;
        best = v > best ? v : best;
        const float w = noisy ? f.of[NOISY] : v;
        if (w > value || (w == value && token == INT32_MAX)) {
            value = w, token = f.token(noisy ? NOISY_TOKEN : TOKEN);
            chosen = noisy ? f.of[NOISY_Z] : v;
        }
    }
    if (token == INT32_MAX) token = mask_id == 0;
    const float shift = top == low ? 0.0f : top;
    vf sum = {}, zsum = {};
    for (int64_t b = 0; b < blocks; b += VL) {
        const vf m = load_n(tops + b, blocks - b) - shift, s = load_n(totals + b, blocks - b);
        const vf e = vexp(m);
        sum += e * s;
        vf z = e * (load_n(weighted + b, blocks - b) + m * s);
        zsum += e == vf{} ? vf{} : z;
    }
    const float total = hsum(sum);
    Choice c;
    c.token = token;
    c.confidence = number(exp1(chosen - shift) / total);
    c.margin = number((exp1(best - shift) - exp1(second - shift)) / total);
    const float entropy = number(log1(total) - hsum(zsum) / total);
    c.entropy = entropy < 0.0f ? 0.0f : entropy;
    c.score = value, c.shift = shift, c.total = total;
    return c;
}

static void answer(const Asked &asked, const Choice &c, const Row &row, int64_t mask_id) {
    if (!asked.token) return;
    asked.choice[row.index] = c.score;
    const bool noisy = row.temperature > 0.0f;
    for (int64_t s = row.index * asked.S; s < (row.index + 1) * asked.S; s++) {
        const int32_t token = int32_t(asked.token[s]);
        const float z = asked.probability[s] == asked.probability[s] ? asked.probability[s]
                                                                    : -__builtin_inff();
        const float with = noisy ? z / row.temperature + gumbel(row.key, splat_i(token))[0] : z;
        asked.score[s] = token == mask_id ? -__builtin_inff() : with;
        asked.probability[s] = number(exp1(z - c.shift) / c.total);
    }
}

struct ChoiceShape {
    int64_t C, B, V, D, mask_id;
};
struct ChoiceOut {
    int64_t *token;
    float *confidence, *margin, *entropy;

    INLINE void put(int64_t c, Choice x) const {
        token[c] = x.token, confidence[c] = x.confidence;
        margin[c] = x.margin, entropy[c] = x.entropy;
    }
};

template <class T>
static void choose_rows(const ChoiceOut &out, const T *x, const T *w, const T *bias,
                        const Row *rows, int64_t count, const ChoiceShape &s,
                        const Asked &asked) {
    typedef typename Operand<T>::A A;
    const int64_t D = s.D, V = s.V, size = panel_size<T>(D);
    const int64_t panels = div_up(V, PANEL), blocks = div_up(V, BLOCK), per = BLOCK / PANEL;
    const int64_t threads = threads_for(V * D * max_of(4, count) / 4);
    const bool past = V * D * int64_t(sizeof(T)) > CACHE;
    const Tiling tiles = tiles_of<T>(count);

    Carve measure{nullptr};
    measure.take<A>(rows_size<T>(count, D)), measure.take<Kept>(count * blocks);
    measure.take<float>(threads * max_of(count * BLOCK, 3 * blocks));
    Carve carve{scratch(measure.used)};
    A *a = carve.take<A>(rows_size<T>(count, D));
    Kept *kept = carve.take<Kept>(count * blocks);  // [row][block]
    const int64_t own = max_of(count * BLOCK, 3 * blocks);
    float *logits = carve.take<float>(threads * own);

    for (int64_t t = 0; t < tiles.count; t++) {
        const Row *of = rows + tiles.first(t);
        pack_rows<T>(a + tiles.first(t) * row_size<T>(D), tiles.size(t), D,
                     [&](int64_t i) { return x + of[i].index * D; });
    }
    region(threads, [&](Team &team) {
        float *z = logits + team.rank() * own;
        team.loop(0, blocks, 1, [&](int64_t b, int64_t) {
            for (int64_t p = b * per; p < min_of(panels, (b + 1) * per); p++)
                gemm_panel<T>(tiles, 0, tiles.count, a, w + p * size,
                              p + 1 < panels ? w + (p + 1) * size : nullptr, D,
                              z + (p - b * per) * count * PANEL);
            for (int64_t i = 0; i < count; i++) {
                const Kept k = reduce_block<T>(z + i * PANEL, count * PANEL, bias, b * BLOCK, V,
                                               s.mask_id, rows[i], asked);
                for (int64_t j = 0; j < 16; j += VL)
                    put(kept[i * blocks + b].of + j, load(k.of + j), past);
            }
        });
        end_stream();
        team.barrier();
        team.loop(1, count, 1, [&](int64_t i, int64_t) {
            const Choice c =
                merge_blocks(kept + i * blocks, blocks, z, rows[i].temperature > 0.0f, s.mask_id);
            out.put(rows[i].index, c);
            answer(asked, c, rows[i], s.mask_id);
        });
    });
}

struct Noise {
    const float *temperature;
    const int64_t *seed, *tick, *pos;
};

template <class T>
static void vocab_choice(ChoiceOut out, const T *x, const T *w, const T *bias, const uint8_t *live,
                         Noise noise, ChoiceShape s, Asked asked = {}) {
    const float low = -__builtin_inff();
    const int64_t per = s.B > 0 ? max_of(1, s.C / s.B) : 1;
    Row rows[CHOICE_ROWS];
    int64_t count = 0;
    for (int64_t c = 0; c < s.C; c++) {
        if (!live[c]) {
            out.put(c, Choice{-1, low, low, 0.0f, low, 0.0f, 1.0f});
            if (asked.token) asked.choice[c] = low;
            for (int64_t i = c * asked.S; i < (c + 1) * asked.S; i++)
                asked.probability[i] = 0.0f, asked.score[i] = low;
        } else {
            const int64_t b = c / per;
            const uint32_t key = noise_key(uint64_t(noise.seed[b]), uint64_t(noise.tick[b]),
                                           uint64_t(noise.pos[c]));
            rows[count++] = {c, noise.temperature[b], key};
        }
        if (count && (count == CHOICE_ROWS || c + 1 == s.C)) {
            choose_rows<T>(out, x, w, bias, rows, count, s, asked);
            count = 0;
        }
    }
}
