// route: logits[R, E] -> the k experts of each row, best first, and their weights.
//
// score = softmax(logits) or sigmoid(logits); chosen by score + bias (or, for the last three of
// Score, by logits + bias), in groups where there are any: a group counts by the sum of its two
// best, and the best `kept_groups` stay.  Ties go to the lowest index; a NaN is below everything.
// weight = score (without bias; SOFTMAX_CHOSEN: the softmax over the chosen only), divided by the
// sum of the chosen + 1e-20 where `renormalize`, times `scale`.
#pragma once

#include "team.h"

enum Score : int64_t { SOFTMAX, SIGMOID, SOFTMAX_CHOSEN, SIGMOID_BY_LOGITS, SOFTMAX_BY_LOGITS };

struct RouteShape {
    int64_t E, k, score, groups, kept_groups, renormalize;
    float scale;
};

static inline void score_row(float *score, const float *logits, int64_t E, bool as_sigmoid) {
    if (as_sigmoid) {
        for (int64_t e = 0; e < E; e += VL)
            store_n(score + e, sigmoid(load_n(logits + e, E - e)), E - e);
        return;
    }
    float best = -__builtin_inff(), sum = 0.0f;
    for (int64_t e = 0; e < E; e++) best = logits[e] > best ? logits[e] : best;
    for (int64_t e = 0; e < E; e += VL)
        store_n(score + e, vexp(load_n(logits + e, E - e) - best), E - e);
    for (int64_t e = 0; e < E; e++) sum += score[e];
    for (int64_t e = 0; e < E; e++) score[e] /= sum;
}

// score[e] = exp(z[e]) / sum of exp(z) over the k chosen.
static inline void softmax_of_chosen(float *score, const float *z, const int32_t *chosen, int64_t E,
                                     int64_t k) {
    float best = -__builtin_inff(), sum = 0.0f;
    for (int64_t i = 0; i < k; i++) best = z[chosen[i]] > best ? z[chosen[i]] : best;
    for (int64_t e = 0; e < E; e += VL)
        store_n(score + e, vexp(load_n(z + e, E - e) - best), E - e);
    for (int64_t i = 0; i < k; i++) sum += score[chosen[i]];
    for (int64_t e = 0; e < E; e++) score[e] /= sum;
}

// The k largest keys, largest first, the lower index first among equals.
static inline void top(int32_t *index, int64_t k, const float *keys, int64_t n) {
    int64_t held = 0;
    for (int64_t e = 0; e < n; e++) {
        if (held == k && !(keys[e] > keys[index[k - 1]])) continue;
        int64_t at = held < k ? held++ : k - 1;
        for (; at > 0 && keys[e] > keys[index[at - 1]]; at--) index[at] = index[at - 1];
        index[at] = int32_t(e);
    }
}

static inline void drop_groups(float *keys, int32_t *order, float *sums, const RouteShape &s) {
    const float low = -__builtin_inff();
    const int64_t per = s.E / s.groups;
    for (int64_t g = 0; g < s.groups; g++) {
        float first = low, second = low;
        for (int64_t e = g * per; e < (g + 1) * per; e++) {
            float key = keys[e];
            second = key > first ? first : (key > second ? key : second);
            first = key > first ? key : first;
        }
        sums[g] = per > 1 ? first + second : first;
    }
    top(order, s.kept_groups, sums, s.groups);
    for (int64_t i = 0; i < s.kept_groups; i++) sums[order[i]] = __builtin_nanf("");
    for (int64_t g = 0; g < s.groups; g++)
        for (int64_t e = g * per; sums[g] == sums[g] && e < (g + 1) * per; e++) keys[e] = low;
}

// What ranks the experts of a row, and what weighs them.
static inline void rank_row(float *score, float *keys, const float *z, const float *bias,
                            const RouteShape &s) {
    score_row(score, z, s.E, s.score == SIGMOID || s.score == SIGMOID_BY_LOGITS);
    const float *by = s.score >= SOFTMAX_CHOSEN ? z : score;
    for (int64_t e = 0; e < s.E; e++) {
        float key = bias ? by[e] + bias[e] : by[e];
        keys[e] = key == key ? key : -__builtin_inff();
    }
}

static void route(float *weights, int32_t *experts, const float *logits, const float *bias,
                  int64_t R, RouteShape s) {
    const int64_t padded = (s.E + 31) & ~int64_t(15);
    float *memory = reinterpret_cast<float *>(scratch(num_threads() * padded * 16));
    parallel_for(R, R * s.E * 16, [&](int64_t first, int64_t last) {
        float *score = memory + Team::rank() * padded * 4, *keys = score + padded;
        float *sums = keys + padded;
        int32_t *order = reinterpret_cast<int32_t *>(sums + padded);
        for (int64_t r = first; r < last; r++) {
            const float *z = logits + r * s.E;
            rank_row(score, keys, z, bias, s);
            if (s.groups > 1 && s.kept_groups < s.groups) drop_groups(keys, order, sums, s);
            int32_t *chosen = experts + r * s.k;
            float *weight = weights + r * s.k, sum = 1e-20f;
            top(chosen, s.k, keys, s.E);
            if (s.score == SOFTMAX_CHOSEN) softmax_of_chosen(score, z, chosen, s.E, s.k);
            for (int64_t i = 0; i < s.k; i++) sum += score[chosen[i]];
            const float factor = s.renormalize ? s.scale / sum : s.scale;
            for (int64_t i = 0; i < s.k; i++) weight[i] = score[chosen[i]] * factor;
        }
    });
}
