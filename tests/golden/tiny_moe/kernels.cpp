#include "prelude.h"

EXPORT void pointwise_index(const Arg *a) {
  auto *const b0 = (int64_t *)a[0].p;
  auto *const b1 = (int64_t *)a[1].p;
  auto *const b2 = (int64_t *)a[2].p;
  auto *const b3 = (int64_t *)a[3].p;
  const int64_t R = a[4].i, B = a[5].i;
  (void)R, (void)B;
  // index: i64[R] = index.Tensor(canvas, [row_seq, row_pos])
  #pragma omp parallel for if (R > 32768)
  for (int64_t i0 = 0; i0 < R; ++i0)
    { st(b3 + i0, ld(b2 + (ld(b0 + i0) * 64 + ld(b1 + i0)))); }
}

EXPORT void pointwise_index_eq(const Arg *a) {
  auto *const b0 = (int64_t *)a[0].p;
  auto *const b1 = (int64_t *)a[1].p;
  auto *const b2 = (int64_t *)a[2].p;
  auto *const b3 = (int64_t *)a[3].p;
  auto *const b4 = (bool *)a[4].p;
  const int64_t R = a[5].i, B = a[6].i;
  (void)R, (void)B;
  // index_2: i64[B, 8] = index.Tensor(canvas, [reshape_default_12, block_pos])
  #pragma omp parallel for if (B * 8 > 32768)
  for (int64_t i0 = 0; i0 < B; ++i0)
    for (int64_t i1 = 0; i1 < 8; ++i1)
      { st(b3 + (i0 * 8 + i1), ld(b2 + (ld(b0 + (i0 * 1 + 0)) * 64 + ld(b1 + (i0 * 8 + i1))))); }
  // eq_75: bool[B, 8] = eq.Scalar(index_2, 129)
  #pragma omp parallel for if (B * 8 > 32768)
  for (int64_t i0 = 0; i0 < B; ++i0)
    for (int64_t i1 = 0; i1 < 8; ++i1)
      { st(b4 + (i0 * 8 + i1), (((int64_t)(ld(b3 + (i0 * 8 + i1)))) == ((int64_t)(INT64_C(129))))); }
}

EXPORT void commit(const Arg *a) {
  auto *const b0 = (float *)a[0].p;
  auto *const b1 = (float *)a[1].p;
  auto *const b2 = (bool *)a[2].p;
  auto *const b3 = (bool *)a[3].p;
  auto *const b4 = (float *)a[4].p;
  auto *const b5 = (bool *)a[5].p;
  auto *const b6 = (int64_t *)a[6].p;
  auto *const b7 = (int64_t *)a[7].p;
  auto *const b8 = (bool *)a[8].p;
  auto *const b9 = (bool *)a[9].p;
  auto *const b10 = (int64_t *)a[10].p;
  auto *const b11 = (int64_t *)a[11].p;
  auto *const b12 = (int64_t *)a[12].p;
  auto *const b13 = (bool *)a[13].p;
  auto *const b14 = (int64_t *)a[14].p;
  auto *const b15 = (int64_t *)a[15].p;
  const int64_t R = a[16].i, B = a[17].i;
  (void)R, (void)B;
  // and_15: bool[B, 8] = __and__.Tensor(ge, eq_75)
  #pragma omp parallel for if (B * 8 > 32768)
  for (int64_t i0 = 0; i0 < B; ++i0)
    for (int64_t i1 = 0; i1 < 8; ++i1)
      { st(b3 + (i0 * 8 + i1), (((bool)((((float)(ld(b0 + (i0 * 8 + i1)))) >= ((float)(ld(b1 + (i0 * 1 + 0))))))) & ((bool)(ld(b2 + (i0 * 8 + i1)))))); }
  // amax: f32[B] = amax.default(where, [-1])
  #pragma omp parallel for if (B * 8 > 32768)
  for (int64_t i0 = 0; i0 < B; ++i0)
    { using T = float; T acc = -std::numeric_limits<T>::infinity(); for (int64_t r1 = 0; r1 < 8; ++r1) { acc = most<T>((ld(b2 + (i0 * 8 + r1)) ? (float)(ld(b0 + (i0 * 8 + r1))) : (-std::numeric_limits<float>::infinity())), acc); } st(b4 + i0, acc); }
  // and_16: bool[B, 8] = __and__.Tensor(eq_75, ge_1)
  #pragma omp parallel for if (B * 8 > 32768)
  for (int64_t i0 = 0; i0 < B; ++i0)
    for (int64_t i1 = 0; i1 < 8; ++i1)
      { st(b5 + (i0 * 8 + i1), (((bool)(ld(b2 + (i0 * 8 + i1)))) & ((bool)((((float)(ld(b0 + (i0 * 8 + i1)))) >= ((float)(ld(b4 + (i0 * 1 + 0))))))))); }
  // amin: i64[B] = amin.default(where_1, [-1])
  #pragma omp parallel for if (B * 8 > 32768)
  for (int64_t i0 = 0; i0 < B; ++i0)
    { using T = int64_t; T acc = std::numeric_limits<T>::max(); for (int64_t r1 = 0; r1 < 8; ++r1) { acc = least<T>((ld(b5 + (i0 * 8 + r1)) ? (int64_t)(ld(b6 + (i0 * 8 + r1))) : (int64_t)(INT64_C(4611686018427387904))), acc); } st(b7 + i0, acc); }
  // any_1: bool[B] = any.dim(and_18, -1)
  #pragma omp parallel for if (B * 8 > 32768)
  for (int64_t i0 = 0; i0 < B; ++i0)
    { using T = bool; T acc = false; for (int64_t r1 = 0; r1 < 8; ++r1) { acc |= (bool)((((bool)(ld(b3 + (i0 * 8 + r1)))) & ((bool)(ld(b2 + (i0 * 8 + r1)))))); } st(b8 + i0, acc); }
  // or_1: bool[B, 8] = __or__.Tensor(and_15, and_19)
  #pragma omp parallel for if (B * 8 > 32768)
  for (int64_t i0 = 0; i0 < B; ++i0)
    for (int64_t i1 = 0; i1 < 8; ++i1)
      { st(b9 + (i0 * 8 + i1), (((bool)(ld(b3 + (i0 * 8 + i1)))) | ((bool)((((bool)((((bool)(ld(b5 + (i0 * 8 + i1)))) & ((bool)((((int64_t)(ld(b6 + (i0 * 8 + i1)))) == ((int64_t)(ld(b7 + (i0 * 1 + 0)))))))))) & ((bool)(!(ld(b8 + i0))))))))); }
  // where_2: i64[B, 8] = where.self(or_1, getitem_2, index_2)
  #pragma omp parallel for if (B * 8 > 32768)
  for (int64_t i0 = 0; i0 < B; ++i0)
    for (int64_t i1 = 0; i1 < 8; ++i1)
      { st(b12 + (i0 * 8 + i1), (ld(b9 + (i0 * 8 + i1)) ? (int64_t)(ld(b10 + (i0 * 8 + i1))) : (int64_t)(ld(b11 + (i0 * 8 + i1))))); }
  // all_1: bool[B] = all.dim(ne, -1)
  #pragma omp parallel for if (B * 8 > 32768)
  for (int64_t i0 = 0; i0 < B; ++i0)
    { using T = bool; T acc = true; for (int64_t r1 = 0; r1 < 8; ++r1) { acc &= (bool)((((int64_t)(ld(b12 + (i0 * 8 + r1)))) != ((int64_t)(INT64_C(129))))); } st(b13 + i0, acc); }
  // index_put: i64[2, 64] = index_put.default(canvas, [reshape_default_12, block_pos], where_2)
  #pragma omp parallel for if (B * 8 > 32768)
  for (int64_t i0 = 0; i0 < B; ++i0)
    for (int64_t i1 = 0; i1 < 8; ++i1)
      { st(b15 + (ld(b14 + (i0 * 1 + 0)) * 64 + ld(b6 + (i0 * 8 + i1))), ld(b12 + (i0 * 8 + i1))); }
}

EXPORT const char dc_abi[] =
    "pointwise_index  b0:i64[R]<2 b1:i64[R]<64 b2:i64[2,64] >b3:i64[R]=b2 R B\n"
    "pointwise_index_eq  b0:i64[B]<2 b1:i64[B,8]<64 b2:i64[2,64] >b3:i64[B,8]=b2 >b4:bool[B,8] R B\n"
    "commit  b0:f32[B,8] b1:f32[B] b2:bool[B,8] >b3:bool[B,8] >b4:f32[B] >b5:bool[B,8] b6:i64[B,8]<64 >b7:i64[B] >b8:bool[B] >b9:bool[B,8] b10:i64[B,8] b11:i64[B,8] >b12:i64[B,8] >b13:bool[B] b14:i64[B]<2 *b15:i64[2,64] R B\n";
