// C[M, N] (+)= A[M, K] B[K, N] for operands that sit in cache: M, K of a few dozen, N a multiple of the vector width.
//
// A is read one scalar at a time at A[m * am + k * ak], so it may be a transpose; B and C have contiguous rows. Every element of C is one
// sum over k in order, whatever M and N are, and meets what C held at its end: over many calls the error grows with their number, not
// with the number of terms.

#pragma once

#include "simd.h"

namespace specs {
namespace SPECS_ISA {

// Rows x vectors of accumulators that fit the registers: 32 with AVX-512, 16 elsewhere.
constexpr int kMaxVectors = kVectorBytes == 64 ? 4 : 2;
constexpr int max_rows(int vectors) { return kVectorBytes == 64 ? (vectors == 4 ? 6 : 8) : (vectors == 2 ? 6 : 8); }

template <class F, int ROWS, int VECTORS, bool UNIT>
SPECS_INLINE void multiply_block(int64_t K, const F* A, int64_t am, int64_t ak, const F* B, int64_t ldb, F* C, int64_t ldc, bool add) {
  Vec<F> sum[ROWS][VECTORS];
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < VECTORS; ++n) sum[m][n] = Vec<F>{};
  for (int64_t k = 0; k < K; ++k) {
    Vec<F> row[VECTORS];
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) row[n] = load(B + k * ldb + n * kLanes<F>);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const F a = A[(UNIT ? m : m * am) + k * ak];
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; ++n) sum[m][n] += a * row[n];
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < VECTORS; ++n) {
      F* at = C + m * ldc + n * kLanes<F>;
      store(at, add ? load(at) + sum[m][n] : sum[m][n]);
    }
}

template <class F, int ROWS, int VECTORS, bool UNIT>
SPECS_INLINE void multiply_rest(int64_t rows, int64_t K, const F* A, int64_t am, int64_t ak, const F* B, int64_t ldb, F* C, int64_t ldc, bool add) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      multiply_block<F, ROWS, VECTORS, UNIT>(K, A, am, ak, B, ldb, C, ldc, add);
    else
      multiply_rest<F, ROWS - 1, VECTORS, UNIT>(rows, K, A, am, ak, B, ldb, C, ldc, add);
  }
}

template <class F, int VECTORS, bool UNIT>
__attribute__((noinline)) void multiply_columns(int64_t M, int64_t K, const F* A, int64_t am, int64_t ak, const F* B, int64_t ldb, F* C, int64_t ldc, bool add) {
  constexpr int rows = max_rows(VECTORS);
  int64_t m = 0;
  for (; m + rows <= M; m += rows) multiply_block<F, rows, VECTORS, UNIT>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, add);
  multiply_rest<F, rows - 1, VECTORS, UNIT>(M - m, K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, add);
}

template <class F, int VECTORS, bool UNIT>
SPECS_INLINE void multiply_rest_columns(int64_t vectors, int64_t M, int64_t K, const F* A, int64_t am, int64_t ak, const F* B, int64_t ldb, F* C, int64_t ldc, bool add) {
  if constexpr (VECTORS > 0) {
    if (vectors == VECTORS)
      multiply_columns<F, VECTORS, UNIT>(M, K, A, am, ak, B, ldb, C, ldc, add);
    else
      multiply_rest_columns<F, VECTORS - 1, UNIT>(vectors, M, K, A, am, ak, B, ldb, C, ldc, add);
  }
}

// UNIT promises am == 1 (A is a transpose with contiguous columns).
template <class F, bool UNIT>
SPECS_INLINE void small_gemm(int64_t M, int64_t N, int64_t K, const F* A, int64_t am, int64_t ak, const F* B, int64_t ldb, F* C, int64_t ldc, bool add) {
  constexpr int64_t step = kMaxVectors * kLanes<F>;
  int64_t n = 0;
  for (; n + step <= N; n += step) multiply_columns<F, kMaxVectors, UNIT>(M, K, A, am, ak, B + n, ldb, C + n, ldc, add);
  multiply_rest_columns<F, kMaxVectors - 1, UNIT>((N - n) / kLanes<F>, M, K, A, am, ak, B + n, ldb, C + n, ldc, add);
}

}  // namespace SPECS_ISA
}  // namespace specs
