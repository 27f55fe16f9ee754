// route_limited: `route` that bounds how many experts a block reads, and how many tokens an expert gets.
//
// pool > 0: the rows of one block of one sequence choose among the `pool` experts whose best key in
// those rows is greatest (LLaDA2.2).  capacity > 0: of a sequence's T rows an expert takes at most
// ceil(capacity T k / E), those with the greatest scores, the lower row first among equals; the others
// lose it (expert -1, weight 0), or with `reroute`, row by row, get their best expert with room
// (Capacity-Aware Inference, arXiv 2503.05066).  Weights keep the divisor of the first choice.
// A sequence's result depends on its own rows only; sequences are looked at one after the other.
#pragma once

#include "route.h"

struct Limits {
    double capacity;
    int64_t reroute, pool, block;
};

// The rows of a launch: keys and scores of all experts, and which sequence and block each is in.
struct Rows {
    int64_t R;
    float *keys, *score, *factor;       // [R, E], [R, E], [R]
    const int64_t *seq;                 // [R]
    int64_t *block, *member;            // of each row; rows of the group at hand
    uint8_t *done, *kept;               // [R]
    int64_t *load;                      // [E]
    float *best;                        // [E]
    int32_t *order;                     // [max(E, R)]

    Rows(Carve &carve, int64_t R, int64_t E, const int64_t *seq) : R(R), seq(seq) {
        keys = carve.take<float>(R * E), score = carve.take<float>(R * E);
        factor = carve.take<float>(R), best = carve.take<float>(max_of(E, R) + 16);
        block = carve.take<int64_t>(R), member = carve.take<int64_t>(R);
        load = carve.take<int64_t>(E), order = carve.take<int32_t>(max_of(E, R) + 16);
        done = carve.take<uint8_t>(R), kept = carve.take<uint8_t>(R);
    }

    // body(count) for each group of rows of one sequence (and block), rows ascending in `member`.
    template <class Body> void each_group(bool by_block, Body &&body) {
        memset(done, 0, size_t(R));
        for (int64_t first = 0; first < R; first++) {
            if (done[first]) continue;
            int64_t count = 0;
            for (int64_t r = first; r < R; r++)
                if (seq[r] == seq[first] && (!by_block || block[r] == block[first]))
                    member[count++] = r, done[r] = 1;
            body(count);
        }
    }
};

static void keep_pool(Rows &rows, int64_t count, int64_t E, int64_t pool) {
    const float low = -__builtin_inff();
    for (int64_t e = 0; e < E; e++) {
        float best = low;
        for (int64_t i = 0; i < count; i++) {
            const float key = rows.keys[rows.member[i] * E + e];
            best = key > best ? key : best;
        }
        rows.best[e] = best, rows.load[e] = 0;
    }
    top(rows.order, pool, rows.best, E);
    for (int64_t i = 0; i < pool; i++) rows.load[rows.order[i]] = 1;
    for (int64_t i = 0; i < count; i++)
        for (int64_t e = 0; e < E; e++)
            if (!rows.load[e]) rows.keys[rows.member[i] * E + e] = low;
}

// Where the row stands among those of its expert: by score, then by row.
static void drop_overflow(Rows &rows, int64_t count, float *weights, int32_t *experts,
                          const RouteShape &s, int64_t room, bool reroute) {
    for (int64_t e = 0; e < s.E; e++) {
        int64_t chosen = 0;
        for (int64_t i = 0; i < count; i++) {
            const int64_t r = rows.member[i];
            for (int64_t j = 0; j < s.k; j++)
                if (experts[r * s.k + j] == e) rows.block[chosen++] = r * s.k + j;
        }
        rows.load[e] = min_of(chosen, room);
        if (chosen <= room) continue;
        for (int64_t i = 0; i < chosen; i++) {
            const float score = rows.score[rows.block[i] / s.k * s.E + e];
            rows.best[i] = score == score ? score : -__builtin_inff();
        }
        top(rows.order, room, rows.best, chosen);
        memset(rows.kept, 0, size_t(chosen));
        for (int64_t n = 0; n < room; n++) rows.kept[rows.order[n]] = 1;
        for (int64_t i = 0; i < chosen; i++)
            if (!rows.kept[i]) experts[rows.block[i]] = -1, weights[rows.block[i]] = 0.0f;
    }
    for (int64_t i = 0; reroute && i < count; i++) {
        const int64_t r = rows.member[i];
        int32_t *mine = experts + r * s.k;
        for (int64_t j = 0; j < s.k; j++) {
            if (mine[j] >= 0) continue;
            int64_t best = -1;
            for (int64_t e = 0; e < s.E; e++) {
                const float key = rows.keys[r * s.E + e];
                bool open = rows.load[e] < room && key > -__builtin_inff();
                for (int64_t n = 0; n < s.k; n++) open &= mine[n] != e;
                if (open && (best < 0 || key > rows.keys[r * s.E + best])) best = e;
            }
            if (best < 0) continue;
            mine[j] = int32_t(best), rows.load[best]++;
            weights[r * s.k + j] = rows.score[r * s.E + best] * rows.factor[r];
        }
    }
}

static void route_limited(float *weights, int32_t *experts, const float *logits, const float *bias,
                          const int64_t *row_seq, const int64_t *row_pos, const int64_t *block_seq,
                          const int64_t *block_pos, int64_t R, int64_t B, RouteShape s, Limits l) {
    Carve measure{nullptr};
    Rows(measure, R, s.E, row_seq);
    Carve carve{scratch(measure.used)};
    Rows rows(carve, R, s.E, row_seq);
    for (int64_t r = 0; r < R; r++) {
        const float *z = logits + r * s.E;
        float *key = rows.keys + r * s.E;
        rank_row(rows.score + r * s.E, key, z, bias, s);
        if (s.groups > 1 && s.kept_groups < s.groups) drop_groups(key, rows.order, rows.best, s);
        // Blocks are counted from the one that the sequence decides now.
        int64_t begin = 0;
        for (int64_t b = 0; b < B; b++)
            if (block_seq[b] == row_seq[r]) begin = block_pos[b * l.block];
        const int64_t past = row_pos[r] - begin;
        rows.block[r] = past >= 0 ? past / l.block : -((l.block - 1 - past) / l.block);
    }
    if (l.pool > 0 && l.pool < s.E)
        rows.each_group(true, [&](int64_t count) { keep_pool(rows, count, s.E, l.pool); });
    for (int64_t r = 0; r < R; r++) {
        int32_t *chosen = experts + r * s.k;
        float *score = rows.score + r * s.E, sum = 1e-20f;
        top(chosen, s.k, rows.keys + r * s.E, s.E);
        if (s.score == SOFTMAX_CHOSEN)
            softmax_of_chosen(score, logits + r * s.E, chosen, s.E, s.k);
        for (int64_t i = 0; i < s.k; i++) sum += score[chosen[i]];
        rows.factor[r] = s.renormalize ? s.scale / sum : s.scale;
        for (int64_t i = 0; i < s.k; i++)
            weights[r * s.k + i] = score[chosen[i]] * rows.factor[r];
    }
    if (l.capacity <= 0) return;
    rows.each_group(false, [&](int64_t count) {
        const double share = l.capacity * double(count) * double(s.k) / double(s.E);
        const int64_t room = max_of(1, int64_t(__builtin_ceil(share - 1e-9)));
        drop_overflow(rows, count, weights, experts, s, room, l.reroute);
    });
}
