// Vectors of VL float32 lanes, conversions from and to bf16 and f16, exp and log.
//
// Everything is written with the vector extensions of GCC and Clang; intrinsics stand only where
// these would not give the one instruction that is meant.  Compiled with -ffp-contract=off: a
// multiply-add is fused where `fma` says so and nowhere else, so equal rows give equal bits.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif

#define INLINE inline __attribute__((always_inline))

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

// Minus zero, not plus zero: x - 0 is x even for -0, so this compiles to a mere broadcast.
static INLINE vf splat(float x) { return x - vf{}; }
static INLINE vi splat_i(int32_t x) { return vi{} + x; }
static INLINE vu splat_u(uint32_t x) { return vu{} + x; }

static INLINE vi lanes() {
    vi v;
    for (int i = 0; i < VL; i++) v[i] = i;
    return v;
}

static INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// The larger, the smaller; where one is a NaN, the second argument.
static INLINE vf vmax(vf x, vf best) { return x > best ? x : best; }
static INLINE vf vmin(vf x, vf best) { return x < best ? x : best; }

static INLINE vf vsqrt(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)x);
#else
    for (int i = 0; i < VL; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// Over all lanes, by halves: the upper with the lower.  (An array of them goes through memory.)
#if defined(__AVX512F__)
#define BY_HALVES(v, op)                                                                            \
    const __m256 upper = _mm256_castsi256_ps(_mm512_extracti64x4_epi64((__m512i)v, 1));             \
    const __m256 a = _mm256_##op##_ps(upper, _mm512_castps512_ps256((__m512)v));                    \
    const __m128 b = _mm_##op##_ps(_mm256_extractf128_ps(a, 1), _mm256_castps256_ps128(a));         \
    const __m128 c = _mm_##op##_ps(_mm_movehl_ps(b, b), b);                                         \
    return _mm_cvtss_f32(_mm_##op##_ss(_mm_movehdup_ps(c), c))
static INLINE float hsum(vf v) { BY_HALVES(v, add); }
static INLINE float hmax(vf v) { BY_HALVES(v, max); }
#undef BY_HALVES
#else
template <class F> static INLINE float by_halves(vf v, F &&f) {
    float t[VL];
    memcpy(t, &v, sizeof v);
    for (int w = VL / 2; w; w /= 2)
        for (int i = 0; i < w; i++) t[i] = f(t[i + w], t[i]);
    return t[0];
}
static INLINE float hsum(vf v) {
    return by_halves(v, [](float x, float y) { return x + y; });
}
static INLINE float hmax(vf v) {
    return by_halves(v, [](float x, float y) { return x > y ? x : y; });
}
#endif

// ---- loads and stores: VL elements, or the first n of them (the rest read as zero)

static INLINE vf widen_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

static INLINE vh narrow_bf16(vf x) {
    vu u = (vu)x;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu quiet = (u >> 16) | 0x40;
    return __builtin_convertvector((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded, vh);
}

static INLINE vf widen_f16(vh h) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
    return (vf)_mm256_cvtph_ps((__m128i)h);
#else
    vu u = __builtin_convertvector(h, vu);
    vf x = (vf)((u & 0x7fff) << 13) * 0x1p112f;
    vu bits = (vu)x;
    bits = x >= splat(65536.0f) ? bits | 0x7f800000 : bits;
    return (vf)(bits | ((u & 0x8000) << 16));
#endif
}

static INLINE vh narrow_f16(vf x) {
#if defined(__AVX512F__)
    return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vu u = (vu)x, sign = u & 0x80000000;
    u ^= sign;
    // Below 2^-14 a float32 addition with the right exponent rounds to f16's denormal grid.
    vu small = (vu)((vf)u + splat(0.5f)) - 0x3f000000;
    vu normal = (u + 0xc8000fff + ((u >> 13) & 1)) >> 13;
    vu half = u < 0x38800000 ? small : normal;
    half = u >= 0x47800000 ? (u > 0x7f800000 ? splat_u(0x7e00) : splat_u(0x7c00)) : half;
    return __builtin_convertvector(half | (sign >> 16), vh);
#endif
}

static INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
static INLINE vf load(const bf16 *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return widen_bf16(h);
}
static INLINE vf load(const f16 *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return widen_f16(h);
}
static INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
static INLINE void store(bf16 *p, vf v) {
    vh h = narrow_bf16(v);
    memcpy(p, &h, sizeof h);
}
static INLINE void store(f16 *p, vf v) {
    vh h = narrow_f16(v);
    memcpy(p, &h, sizeof h);
}

template <class T> static INLINE vf load_n(const T *p, int64_t n) {
    if (n >= VL) return load(p);
    T t[VL] = {};
    for (int64_t i = 0; i < n; i++) t[i] = p[i];
    return load(t);
}
template <class T> static INLINE void store_n(T *p, vf v, int64_t n) {
    if (n >= VL) return store(p, v);
    T t[VL];
    store(t, v);
    for (int64_t i = 0; i < n; i++) p[i] = t[i];
}

template <class T> static INLINE vf rounded(vf v) {
    T t[VL];
    store(t, v);
    return load(t);
}
template <> INLINE vf rounded<float>(vf v) { return v; }
template <> INLINE vf rounded<bf16>(vf v) { return widen_bf16(narrow_bf16(v)); }
template <> INLINE vf rounded<f16>(vf v) { return widen_f16(narrow_f16(v)); }

// ---- stores past the caches, for what a kernel writes while weights stream in
//
// Where more weights go through than a core's cache holds, a line written has left it by its next use, and to
// fetch it for writing holds up the weights for as long as 14 lines of them take (Granite Rapids, moe_ffn: 14.4
// GB/s with plain stores, 17.0 so; to ask for the lines early gave nothing).

enum : int64_t { CACHE = 2 << 20 };  // bytes of weights in one launch, from which on that is so

static INLINE void stream(float *p, vf v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#else
    store(p, v);
#endif
}
static INLINE void stream(vh *p, vh v) {
#if defined(__AVX512F__)
    _mm256_stream_si256((__m256i *)p, (__m256i)v);
#elif defined(__AVX2__)
    _mm_stream_si128((__m128i *)p, (__m128i)v);
#else
    memcpy(p, &v, sizeof v);
#endif
}
static INLINE void stream(bf16 *p, vf v) { stream((vh *)p, narrow_bf16(v)); }
static INLINE void stream(f16 *p, vf v) { stream((vh *)p, narrow_f16(v)); }

// What was streamed may be read by other threads behind this and a barrier.
static INLINE void end_stream() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// Whether rows of `stride` elements from p on may be streamed: every vector stands at a multiple of its size.
template <class T> static INLINE bool can_stream(const T *p, int64_t stride) {
    return stride % VL == 0 && reinterpret_cast<uintptr_t>(p) % (VL * sizeof(T)) == 0;
}

template <class T> static INLINE void put(T *p, vf v, bool past) {
    if (past)
        stream(p, v);
    else
        store(p, v);
}

// ---- exp and log, within about one unit in the last place

static INLINE vf vexp(vf x) {
    x = x < splat(-104.0f) ? splat(-104.0f) : x;
    x = x > splat(89.0f) ? splat(89.0f) : x;
    vf shifted = fma(x, splat(1.44269504088896341f), splat(12582912.0f));
    vf n = shifted - 12582912.0f;
    vf r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = fma(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // Two steps, so that results below the normal range come out right.
    vi e = (vi)shifted - (vi)splat(12582912.0f), half = e >> 1;
    return p * (vf)((half + 127) << 23) * (vf)((e - half + 127) << 23);
#endif
}

// ln((1 + r) * 2^e) for r in [sqrt(1/2) - 1, sqrt(2) - 1]
static INLINE vf log_of(vf r, vf e) {
    vf z = r * r;
    vf p = fma(r, splat(7.0376836292e-2f), splat(-1.1514610310e-1f));
    p = fma(p, r, splat(1.1676998740e-1f));
    p = fma(p, r, splat(-1.2420140846e-1f));
    p = fma(p, r, splat(1.4249322787e-1f));
    p = fma(p, r, splat(-1.6668057665e-1f));
    p = fma(p, r, splat(2.0000714765e-1f));
    p = fma(p, r, splat(-2.4999993993e-1f));
    p = fma(p, r, splat(3.3333331174e-1f));
    vf y = fma(e, splat(-2.12194440e-4f), p * r * z);
    y = fma(z, splat(-0.5f), y);
    return fma(e, splat(0.693359375f), r + y);
}

// Positive normal numbers only.
static INLINE vf vlog(vf x) {
    vi bits = (vi)x;
    vi shifted = bits - 0x3f3504f3;  // sqrt(1/2) and up keep their exponent
    vi e = shifted >> 23;
    vf m = (vf)(bits - (e << 23));
    return log_of(m - 1.0f, __builtin_convertvector(e, vf));
}

static INLINE float exp1(float x) { return vexp(splat(x))[0]; }
static INLINE float log1(float x) { return vlog(splat(x))[0]; }
static INLINE vf sigmoid(vf x) { return 1.0f / (vexp(-x) + 1.0f); }
static INLINE vf silu(vf x) { return x / (vexp(-x) + 1.0f); }
