// A two-layer "model" over 64-bit hashes: every output depends on every key that a row may see,
// so that one stale, missing or surplus row changes the tokens. toy.py has the same in Python.
#include <math.h>
#include <stdint.h>
#include <time.h>

typedef union { void *p; int64_t i; double f; } Arg;
typedef struct { void (*fn)(const Arg *); const Arg *args; } Launch;

static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}
#define I(k) ((int64_t *)a[k].p)
#define F(k) ((float *)a[k].p)

// h, canvas, row_seq, row_pos, R, L
extern "C" void toy_embed(const Arg *a) {
    for (int64_t r = 0; r < a[4].i; r++) {
        uint64_t token = I(1)[I(2)[r] * a[5].i + I(3)[r]];
        ((uint64_t *)a[0].p)[r] = mix(token * 1000003 + I(3)[r]);
    }
}

// out, h, keys, row_seq, row_pos, row_limit, R, L
extern "C" void toy_layer(const Arg *a) {
    uint64_t *out = (uint64_t *)a[0].p, *h = (uint64_t *)a[1].p, *keys = (uint64_t *)a[2].p;
    int64_t L = a[7].i;
    for (int64_t r = 0; r < a[6].i; r++) keys[I(3)[r] * L + I(4)[r]] = mix(h[r] + 1);
    for (int64_t r = 0; r < a[6].i; r++) {
        uint64_t sum = h[r];
        for (int64_t j = 0; j < I(5)[r]; j++) sum += keys[I(3)[r] * L + j] * (j + 1);
        out[r] = mix(sum);
    }
}

// token, confidence, commit, open, canvas, h, block_seq, block_pos, choice_row, threshold,
// temperature, seed, tick, B, n, L, V, mask
extern "C" void toy_choose(const Arg *a) {
    uint64_t *h = (uint64_t *)a[5].p;
    int64_t n = a[14].i, L = a[15].i, V = a[16].i, mask = a[17].i;
    for (int64_t b = 0; b < a[13].i; b++) {
        int64_t *line = I(4) + I(6)[b] * L, *pos = I(7) + b * n;
        float best = -INFINITY;
        for (int64_t i = 0; i < n; i++) {
            uint64_t x = h[I(8)[b * n + i]] + 17 * pos[i];
            if (F(10)[b] > 0) x ^= mix((uint64_t)I(11)[b] * 31 + I(12)[b] * 7919 + pos[i]);
            x = mix(x);
            bool live = line[pos[i]] == mask;
            int64_t token = (x >> 8) % (V - 1);
            I(0)[b * n + i] = live ? token + (token >= mask) : -1;
            F(1)[b * n + i] = live ? (float)((x >> 40) % 4096) / 4096 : -INFINITY;
            best = fmaxf(best, F(1)[b * n + i]);
        }
        for (int64_t i = 0; i < n; i++) {
            float c = F(1)[b * n + i];
            uint8_t commit = c > -INFINITY && (c >= F(9)[b] || c == best);
            ((uint8_t *)a[2].p)[b * n + i] = commit;
            if (commit) line[pos[i]] = I(0)[b * n + i];
            ((uint8_t *)a[3].p)[b * n + i] = line[pos[i]] == mask;
        }
    }
}

extern "C" void dc_run(const Launch *l, int64_t count) {
    for (int64_t i = 0; i < count; i++) l[i].fn(l[i].args);
}

static double now() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

extern "C" void dc_run_timed(const Launch *l, int64_t count, double *seconds) {
    for (int64_t i = 0; i < count; i++) {
        double began = now();
        l[i].fn(l[i].args);
        seconds[i] = now() - began;
    }
}

int64_t dc_threads = 0;
extern "C" void dc_set_threads(int64_t threads) { dc_threads = threads; }

extern "C" const char dc_abi[] =
    "toy_embed >h:i64[R] canvas:i64[@N,L] row_seq:i64[R]<@N row_pos:i64[R]<L R L; L>=1\n"
    "toy_layer >out:i64[R] h:i64[R] *keys:i64[@N,L] row_seq:i64[R]<@N row_pos:i64[R]<L "
    "row_limit:i64[R]<=L R L\n"
    "toy_choose >token:i64[B,n] >confidence:f32[B,n] >commit:u8[B,n] >open:u8[B,n] "
    "*canvas:i64[@N,L] h:i64[1] block_seq:i64[B]<@N block_pos:i64[B,n]<L choice_row:i64[B,n]<h/1 "
    "threshold:f32[B] temperature:f32[B] seed:i64[B] tick:i64[B] B n L V mask; V>=2\n";
