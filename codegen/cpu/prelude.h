// What emitted kernels need: the argument union and conversions between storage and arithmetic.
#pragma once
#define EXPORT extern "C" __attribute__((visibility("default")))
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

union Arg {
  void *p;
  int64_t i;
  double f;
};

struct bf16 {
  uint16_t bits;
};
struct f16 {
  _Float16 number;
};

static inline float ld(const float *p) { return *p; }
static inline double ld(const double *p) { return *p; }
static inline int64_t ld(const int64_t *p) { return *p; }
static inline int64_t ld(const int32_t *p) { return *p; }
static inline int64_t ld(const int16_t *p) { return *p; }
static inline int64_t ld(const int8_t *p) { return *p; }
static inline int64_t ld(const uint8_t *p) { return *p; }
static inline bool ld(const bool *p) { return *p; }
static inline float ld(const f16 *p) { return (float)p->number; }
static inline float ld(const bf16 *p) {
  uint32_t word = (uint32_t)p->bits << 16;
  float out;
  std::memcpy(&out, &word, 4);
  return out;
}

template <class T, class V> static inline void st(T *p, V v) { *p = (T)v; }
template <class V> static inline void st(f16 *p, V v) { p->number = (_Float16)(float)v; }
template <class V> static inline void st(bf16 *p, V v) {
  float f = (float)v;
  uint32_t word;
  std::memcpy(&word, &f, 4);
  if (f != f)
    p->bits = (uint16_t)((word >> 16) | 0x40);
  else
    p->bits = (uint16_t)((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
}
template <class T> static inline float rounded(float v) {
  T cell;
  st(&cell, v);
  return ld(&cell);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
static inline float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)); }
static inline float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
static inline int64_t floor_div(int64_t a, int64_t b) {
  int64_t q = a / b;
  return (a % b != 0 && ((a < 0) != (b < 0))) ? q - 1 : q;
}
static inline float floor_div(float a, float b) { return std::floor(a / b); }
static inline int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }
static inline float floor_mod(float a, float b) {
  float m = std::fmod(a, b);
  return (m != 0 && ((m < 0) != (b < 0))) ? m + b : m;
}
// NaN wins, as in torch.
template <class T> static inline T least(T a, T b) { return (a < b || a != a) ? a : b; }
template <class T> static inline T most(T a, T b) { return (a > b || a != a) ? a : b; }
