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

#include "choice_block.h"

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
    const bool past = V * D * int64_t(sizeof(T)) >= CACHE;
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
