// The kernel library: every kernel of the ABI (docs/formats.md) for float32, bf16 and f16.
#include <time.h>

#include "abi.h"
#include "abi_table.h"
#include "attend.h"
#include "linear.h"
#include "moe_ffn.h"
#include "norm.h"
#include "pointwise.h"
#include "route.h"
#include "route_limited.h"
#include "soft_embed.h"
#include "vocab_choice.h"

typedef float f32;

#define FOR_EACH_TYPE(KERNEL) KERNEL(f32) KERNEL(bf16) KERNEL(f16)

#define EMBEDDING(T)                                                                            \
    DC_EXPORT void embedding_##T(const Arg *a) {                                                \
        gather_rows(ptr<char>(a[0]), ptr<char>(a[1]), ptr<int64_t>(a[2]), a[3].i,               \
                    a[4].i * int64_t(sizeof(T)));                                               \
    }
FOR_EACH_TYPE(EMBEDDING)

DC_EXPORT void gather_rows(const Arg *a) {
    gather_rows(ptr<char>(a[0]), ptr<char>(a[1]), ptr<int64_t>(a[2]), a[3].i, a[4].i);
}

#define RMS_NORM(T)                                                                             \
    DC_EXPORT void rms_norm_##T(const Arg *a) {                                                 \
        rms_norm(ptr<T>(a[0]), ptr<T>(a[1]), ptr<T>(a[2]), a[3].i, a[4].i, float(a[5].f));      \
    }
FOR_EACH_TYPE(RMS_NORM)

#define ADD_RMS_NORM(T)                                                                         \
    DC_EXPORT void add_rms_norm_##T(const Arg *a) {                                             \
        add_rms_norm(ptr<T>(a[0]), ptr<T>(a[1]), ptr<T>(a[2]), ptr<T>(a[3]), ptr<T>(a[4]),      \
                     a[5].i, a[6].i, float(a[7].f));                                            \
    }
FOR_EACH_TYPE(ADD_RMS_NORM)

#define LINEAR(T)                                                                               \
    DC_EXPORT void linear_##T(const Arg *a) {                                                   \
        linear(ptr<T>(a[0]), ptr<T>(a[1]), ptr<T>(a[2]), ptr<T>(a[3]), ptr<T>(a[4]), a[5].i,    \
               a[6].i, a[7].i);                                                                 \
    }
FOR_EACH_TYPE(LINEAR)

#define SILU_MUL(T)                                                                             \
    DC_EXPORT void silu_mul_##T(const Arg *a) {                                                 \
        silu_mul(ptr<T>(a[0]), ptr<T>(a[1]), ptr<T>(a[2]), a[3].i, a[4].i, a[5].i, a[6].i);     \
    }
FOR_EACH_TYPE(SILU_MUL)

#define NORM_ROPE_WRITE(T)                                                                      \
    DC_EXPORT void norm_rope_write_##T(const Arg *a) {                                          \
        norm_rope_write(ptr<T>(a[0]), ptr<T>(a[1]), ptr<T>(a[2]), ptr<T>(a[3]), ptr<T>(a[4]),   \
                        ptr<T>(a[5]), ptr<float>(a[6]), ptr<float>(a[7]), ptr<int64_t>(a[8]),   \
                        ptr<int64_t>(a[9]),                                                     \
                        RopeShape{a[10].i, a[11].i, a[12].i, a[13].i, a[14].i, a[15].i},        \
                        float(a[16].f));                                                        \
    }
FOR_EACH_TYPE(NORM_ROPE_WRITE)

#define ATTEND(T)                                                                               \
    DC_EXPORT void attend_##T(const Arg *a) {                                                   \
        attend(ptr<T>(a[0]), ptr<T>(a[1]), ptr<T>(a[2]), ptr<T>(a[3]), ptr<int64_t>(a[4]),      \
               ptr<int64_t>(a[5]),                                                              \
               AttendShape{a[6].i, a[7].i, a[8].i, a[9].i, a[10].i, float(a[11].f)});           \
    }
FOR_EACH_TYPE(ATTEND)

DC_EXPORT void route(const Arg *a) {
    route(ptr<float>(a[0]), ptr<int32_t>(a[1]), ptr<float>(a[2]), ptr<float>(a[3]), a[4].i,
          RouteShape{a[5].i, a[6].i, a[7].i, a[8].i, a[9].i, a[10].i, float(a[11].f)});
}

DC_EXPORT void route_limited(const Arg *a) {
    route_limited(ptr<float>(a[0]), ptr<int32_t>(a[1]), ptr<float>(a[2]), ptr<float>(a[3]),
                  ptr<int64_t>(a[4]), ptr<int64_t>(a[5]), ptr<int64_t>(a[6]), ptr<int64_t>(a[7]),
                  a[8].i, a[9].i,
                  RouteShape{a[10].i, a[11].i, a[12].i, a[13].i, a[14].i, a[15].i, float(a[16].f)},
                  Limits{a[17].f, a[18].i, a[19].i, a[20].i});
}

#define MOE_FFN(T)                                                                              \
    DC_EXPORT void moe_ffn_##T(const Arg *a) {                                                  \
        moe_ffn(ptr<T>(a[0]), ptr<T>(a[1]), ptr<float>(a[2]), ptr<int32_t>(a[3]), ptr<T>(a[4]), \
                ptr<T>(a[5]), ptr<T>(a[6]), ptr<T>(a[7]), a[8].i,                               \
                MoeShape{a[9].i, a[10].i, a[11].i, a[12].i, a[13].i});                          \
    }
FOR_EACH_TYPE(MOE_FFN)

#define SOFT_EMBED(T)                                                                           \
    DC_EXPORT void soft_embed_##T(const Arg *a) {                                               \
        soft_embed(ptr<T>(a[0]), ptr<T>(a[1]), ptr<T>(a[2]), ptr<T>(a[3]), ptr<T>(a[4]),        \
                   ptr<uint8_t>(a[5]), ptr<float>(a[6]),                                        \
                   SoftShape{a[7].i, a[8].i, a[9].i, a[10].i});                                 \
    }
FOR_EACH_TYPE(SOFT_EMBED)

#define VOCAB_CHOICE(T)                                                                         \
    DC_EXPORT void vocab_choice_##T(const Arg *a) {                                             \
        vocab_choice(ChoiceOut{ptr<int64_t>(a[0]), ptr<float>(a[1]), ptr<float>(a[2]),          \
                               ptr<float>(a[3])},                                               \
                     ptr<T>(a[4]), ptr<T>(a[5]), ptr<T>(a[6]), ptr<uint8_t>(a[7]),              \
                     Noise{ptr<float>(a[8]), ptr<int64_t>(a[9]), ptr<int64_t>(a[10]),           \
                           ptr<int64_t>(a[11])},                                                \
                     ChoiceShape{a[12].i, a[13].i, a[14].i, a[15].i, a[16].i});                 \
    }
FOR_EACH_TYPE(VOCAB_CHOICE)

#define VOCAB_CHOICE_ASKED(T)                                                                   \
    DC_EXPORT void vocab_choice_asked_##T(const Arg *a) {                                       \
        vocab_choice(ChoiceOut{ptr<int64_t>(a[0]), ptr<float>(a[1]), ptr<float>(a[2]),          \
                               ptr<float>(a[3])},                                               \
                     ptr<T>(a[7]), ptr<T>(a[8]), ptr<T>(a[9]), ptr<uint8_t>(a[10]),             \
                     Noise{ptr<float>(a[11]), ptr<int64_t>(a[12]), ptr<int64_t>(a[13]),         \
                           ptr<int64_t>(a[14])},                                                \
                     ChoiceShape{a[16].i, a[17].i, a[18].i, a[19].i, a[20].i},                  \
                     Asked{ptr<int64_t>(a[15]), ptr<float>(a[5]), ptr<float>(a[6]),             \
                           ptr<float>(a[4]), a[21].i});                                         \
    }
FOR_EACH_TYPE(VOCAB_CHOICE_ASKED)

DC_EXPORT void dc_set_threads(int64_t threads) { max_threads = threads; }

DC_EXPORT void dc_run(const Launch *launches, int64_t count) {
    for (int64_t i = 0; i < count; i++) launches[i].fn(launches[i].args);
}

static double now() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

DC_EXPORT void dc_run_timed(const Launch *launches, int64_t count, double *seconds) {
    for (int64_t i = 0; i < count; i++) {
        const double start = now();
        launches[i].fn(launches[i].args);
        seconds[i] = now() - start;
    }
}
