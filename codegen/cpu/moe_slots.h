// The slots of a mixture of experts, sorted by expert, and the rows that each expert is given.
#pragma once

#include "gemm.h"

struct MoeShape {
    int64_t D, F, E, k, activation;
};

// The slots of some rows by expert.  Tiles are numbered through all experts.
struct Sorted {
    int64_t slots, touched, tiles;
    bool past;                       // the caches, with what is written
    int64_t *expert, *first;         // of each touched expert; first[touched] = slots
    int64_t *first_tile;             // of each touched expert; first_tile[touched] = tiles
    int64_t *tile_slot, *tile_rows;  // of each tile
    int64_t *row, *place;            // row of a slot; slot of a (row, j), -1 where there is none
};

template <class T>
static Sorted sort_slots(Carve &carve, const int32_t *experts, int64_t R, const MoeShape &shape) {
    const int64_t E = shape.E, k = shape.k;
    Sorted s{};
    int64_t *count = carve.take<int64_t>(E + 1);
    s.expert = carve.take<int64_t>(E), s.first = carve.take<int64_t>(E + 1);
    s.first_tile = carve.take<int64_t>(E + 1);
    s.tile_slot = carve.take<int64_t>(R * k), s.tile_rows = carve.take<int64_t>(R * k);
    s.row = carve.take<int64_t>(R * k), s.place = carve.take<int64_t>(R * k);
    if (!carve.base) return s;

    memset(count, 0, size_t(E + 1) * 8);
    for (int64_t i = 0; i < R * k; i++)
        if (experts[i] >= 0 && experts[i] < E) count[experts[i]]++;
    s.slots = s.touched = s.tiles = 0;
    for (int64_t e = 0; e < E; e++) {
        const Tiling tiles = tiles_of<T>(count[e]);
        if (!count[e]) continue;
        s.expert[s.touched] = e, s.first[s.touched] = s.slots;
        s.first_tile[s.touched++] = s.tiles;
        for (int64_t t = 0; t < tiles.count; t++) {
            s.tile_slot[s.tiles] = s.slots + tiles.first(t);
            s.tile_rows[s.tiles++] = tiles.size(t);
        }
        count[e] = s.slots, s.slots += tiles.rows;
    }
    s.first[s.touched] = s.slots, s.first_tile[s.touched] = s.tiles;
    s.past = s.touched * 3 * shape.D * shape.F * int64_t(sizeof(T)) >= CACHE;
    for (int64_t i = 0; i < R * k; i++) {
        const bool known = experts[i] >= 0 && experts[i] < E;
        s.place[i] = known ? count[experts[i]]++ : -1;
        if (known) s.row[s.place[i]] = i / k;
    }
    return s;
}

// The rows that each expert is given, as tiles of A: all of them copied before the region, or, where an expert's
// are few, by each thread when it comes to the expert, so that they lie near (from another core's cache they would
// come line by line).
template <class T> struct ExpertRows {
    typedef typename Operand<T>::A A;
    const Sorted *s;
    const T *x;
    A *a;
    int64_t D, R;
    bool own;

    ExpertRows(Carve &carve, const Sorted &s, const T *x, int64_t R, int64_t k, int64_t D, int64_t threads)
        : s(&s), x(x), D(D), R(R), own(R * row_size<T>(D) <= OWN_ROWS) {
        a = carve.take<A>(own ? threads * rows_size<T>(R, D) : rows_size<T>(R * k, D));
    }
    void pack(int64_t e, A *to) const {
        for (int64_t t = s->first_tile[e]; t < s->first_tile[e + 1]; t++) {
            const int64_t slot = s->tile_slot[t];
            pack_rows<T>(to + (slot - s->first[e]) * row_size<T>(D), s->tile_rows[t], D,
                         [&](int64_t i) { return x + s->row[slot + i] * D; });
        }
    }
    void pack_all() const {
        for (int64_t e = 0; e < s->touched && !own; e++) pack(e, a + s->first[e] * row_size<T>(D));
    }
    // Of expert e; `last` is the one that this thread asked for before.
    INLINE const A *of(int64_t e, int64_t rank, int64_t &last) const {
        if (!own) return a + s->first[e] * row_size<T>(D);
        A *mine = a + rank * rows_size<T>(R, D);
        if (e != last) pack(e, mine);
        last = e;
        return mine;
    }
};
