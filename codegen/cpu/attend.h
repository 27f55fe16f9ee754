// attend: o[R, H, D] = softmax(scale q K^T) V over the first row_limit[r] keys of the row's slot.
//
// q [R, H, D]; keys, values [N, L, G, D]; H / G query heads share a K/V head.  Rows that follow one
// another with equal slot and limit are a run, and a run's queries for one K/V head go through the
// keys together, up to two panels of 32 at once.  The keys go by blocks from key 0 on, and every block
// through all heads of a group, which lie side by side: so memory is read in order.
//
// A query does not know the others, so the bits do not depend on them.  No keys: zeros.
#pragma once

#include "attend_lanes.h"
#include "attend_tiles.h"

enum : int64_t { QUERY_PANELS = 2, QUERIES = QUERY_PANELS * PANEL, STATE_BYTES = 768 << 10 };

struct AttendShape {
    int64_t R, H, G, D, L;
    float scale;
};

template <class T> struct Attention { typedef LaneQueries Queries; };
#if defined(__AMX_BF16__)
template <> struct Attention<bf16> { typedef TileQueries Queries; };
#endif

template <class T> struct AttendScratch {
    typedef typename Attention<T>::Queries Queries;
    typename Queries::Block block;
    Queries *panel;  // of each head of a group

    AttendScratch(Carve &carve, int64_t D, int64_t heads) : block(carve, D) {
        panel = carve.take<Queries>(heads * QUERY_PANELS);
        for (int64_t i = 0; i < heads * QUERY_PANELS; i++) {
            const Queries q(carve, D);
            if (carve.base) panel[i] = q;
        }
    }
};

// Queries [first, first + M) of a run, for `group` K/V heads that start at o, q, keys and values.
template <class T>
static void attend_chunk(T *o, const T *q, const T *keys, const T *values, int64_t first,
                         int64_t M, int64_t limit, int64_t group, const AttendShape &s,
                         AttendScratch<T> &w) {
    const int64_t D = s.D, heads = s.H / s.G, stride = s.G * D, panels = div_up(M, PANEL);
    const int64_t KEYS = Attention<T>::Queries::Block::KEYS;
    auto each = [&](auto &&body) {
        for (int64_t g = 0; g < group; g++)
            for (int64_t p = 0; p < panels; p++)
                body(w.panel[g * QUERY_PANELS + p], g * heads * D, [&, p](int64_t i) {
                    const int64_t query = first + p * PANEL + i;
                    return (query / heads * s.H + query % heads) * D;
                }, min_of(PANEL, M - p * PANEL));
    };
    // In the order of memory: below, a head's part of a row is too short for the machine to foresee what follows.
    RowsAhead(keys, values, stride, min_of(KEYS, limit), group * D).fetch(INT64_MAX);
    each([&](auto &panel, int64_t head, auto &&at, int64_t live) {
        panel.read(q + head, live, D, s.scale, at);
    });
    const typename Attention<T>::Queries::Use use{};
    for (int64_t key = 0; key < limit; key += KEYS) {
        const int64_t n = min_of(KEYS, limit - key), next = min_of(KEYS, limit - key - n);
        for (int64_t g = 0; g < group; g++) {
            const int64_t from = key + n + next * g / group, rows = key + n + next * (g + 1) / group - from;
            w.block.read(keys + key * stride + g * D, values + key * stride + g * D, stride, n, D);
            RowsAhead ahead(keys + from * stride, values + from * stride, stride, rows, group * D);
            const int64_t share = div_up(ahead.lines(), panels);
            for (int64_t p = 0; p < panels; p++)
                w.panel[g * QUERY_PANELS + p].absorb(w.block, D, s.scale, ahead, share);
        }
    }
    each([&](auto &panel, int64_t head, auto &&at, int64_t) { panel.write(o + head, D, limit > 0, at); });
}

template <class T>
static void attend(T *o, const T *q, const T *keys, const T *values, const int64_t *row_seq,
                   const int64_t *row_limit, AttendShape s) {
    if (s.R <= 0) return;
    const int64_t heads = s.H / s.G, most = max_of(1, QUERIES / heads);
    int64_t work = 0;
    for (int64_t r = 0; r < s.R; r++) work += (row_limit[r] + PANEL) * s.H * s.D * 2;
    const int64_t threads = threads_for(work / 4);

    // Where runs of at most `most` rows start; only their number where there is no `starts`.
    auto cut = [&](int64_t *starts) {
        int64_t chunks = 0, start = 0;
        for (int64_t r = 0; r < s.R; r++) {
            const bool same = r && row_seq[r] == row_seq[r - 1] && row_limit[r] == row_limit[r - 1];
            if (same && r - start < most) continue;
            start = r;
            if (starts) starts[chunks] = r;
            chunks++;
        }
        return chunks;
    };
    const int64_t chunks = cut(nullptr);
    // Heads side by side: as many as keep the threads busy and their state in the L2 cache.
    const int64_t state = QUERY_PANELS * 2 * PANEL * 4 * s.D;
    const int64_t shares = threads == 1 || chunks >= 2 * threads ? 1 : 2 * threads;
    const int64_t group = max_of(1, min_of(div_up(s.G, shares), STATE_BYTES / state));
    const int64_t groups = div_up(s.G, group);

    Carve measure{nullptr};
    AttendScratch<T>(measure, s.D, group);
    Carve carve{scratch(measure.used * threads + (chunks + 1) * 8 + 256)};
    int64_t *starts = carve.take<int64_t>(chunks + 1);
    starts[cut(starts)] = s.R;
    region(threads, [&](Team &team) {
        Carve own{carve.base + carve.used + team.rank() * measure.used};
        AttendScratch<T> w(own, s.D, group);
        team.loop(0, chunks * groups, 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                const int64_t chunk = i / groups, g = i % groups * group, r = starts[chunk];
                const int64_t head = g * heads * s.D, kv = row_seq[r] * s.L * s.G * s.D + g * s.D;
                const int64_t queries = (starts[chunk + 1] - r) * heads;
                for (int64_t m = 0; m < queries; m += QUERIES)
                    attend_chunk<T>(o + r * s.H * s.D + head, q + r * s.H * s.D + head, keys + kv,
                                    values + kv, m, min_of(QUERIES, queries - m), row_limit[r],
                                    min_of(group, s.G - g), s, w);
            }
        });
    });
}
