// The micro-kernel of the GEMMs of linear_logprob, for numbers and for pairs of half-precision numbers; see linear_logprob.h.

#pragma once

#include "linear_logprob.h"
#include "simd.h"

namespace specs {
namespace SPECS_ISA {

// Two vectors of a panel times this many scalars are accumulators; with them the operands fill the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMicroRows = 14;
#else
constexpr int kMicroRows = 6;
#endif

template <class F>
constexpr int kPanel = 2 * kLanes<F>;

// How terms are held and multiplied: one number each. A Word is what the scalar side reads at a time.
template <class F>
struct Numbers {
  using Word = F;
  using Sum = F;
  static SPECS_INLINE Vec<F> load(const F* x) { return SPECS_ISA::load(x); }
  static SPECS_INLINE Vec<F> multiply_add(Vec<F> sum, F a, Vec<F> x) { return sum + a * x; }
};

// C[r][lane] (+)= sum over o < outer, k < K of A(r, o, k) B[o * K + k][lane]. A(r, o, k) = A[o * jump + r * stride + k], or
// A[k * stride + r] where TRANSPOSED. Each sum runs in one order of terms and meets what C held at its end.
template <class Terms, int ROWS, bool TRANSPOSED>
SPECS_INLINE void micro(
    int64_t outer, int64_t K, const typename Terms::Word* A, int64_t stride, int64_t jump, const typename Terms::Word* B, typename Terms::Sum* C,
    int64_t ldc, bool add) {
  using F = typename Terms::Sum;
  constexpr int L = kLanes<F>;
  Vec<F> sum[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = Vec<F>{};
  for (int64_t o = 0; o < outer; ++o, A += jump)
    for (int64_t k = 0; k < K; ++k, B += 2 * L) {
      const auto low = Terms::load(B), high = Terms::load(B + L);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const auto a = TRANSPOSED ? A[k * stride + r] : A[r * stride + k];
        sum[r][0] = Terms::multiply_add(sum[r][0], a, low);
        sum[r][1] = Terms::multiply_add(sum[r][1], a, high);
      }
    }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    F* at = C + r * ldc;
    store(at, add ? load(at) + sum[r][0] : sum[r][0]);
    store(at + L, add ? load(at + L) + sum[r][1] : sum[r][1]);
  }
}

template <class Terms, int ROWS, bool TRANSPOSED>
__attribute__((noinline)) void micro_rest(
    int64_t rows, int64_t outer, int64_t K, const typename Terms::Word* A, int64_t stride, int64_t jump, const typename Terms::Word* B,
    typename Terms::Sum* C, int64_t ldc, bool add) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) micro<Terms, ROWS, TRANSPOSED>(outer, K, A, stride, jump, B, C, ldc, add);
    else micro_rest<Terms, ROWS - 1, TRANSPOSED>(rows, outer, K, A, stride, jump, B, C, ldc, add);
  }
}

template <class Terms, bool TRANSPOSED>
__attribute__((noinline)) void multiply(
    int64_t rows, int64_t outer, int64_t K, const typename Terms::Word* A, int64_t stride, int64_t jump, const typename Terms::Word* B,
    typename Terms::Sum* C, int64_t ldc, bool add) {
  int64_t r = 0;
  for (; r + kMicroRows <= rows; r += kMicroRows)
    micro<Terms, kMicroRows, TRANSPOSED>(outer, K, A + (TRANSPOSED ? r : r * stride), stride, jump, B, C + r * ldc, ldc, add);
  micro_rest<Terms, kMicroRows - 1, TRANSPOSED>(rows - r, outer, K, A + (TRANSPOSED ? r : r * stride), stride, jump, B, C + r * ldc, ldc, add);
}

// Terms of a long sum are added up in stretches: the error grows with their number and that of the stretches, not with all terms.
constexpr int64_t kStretch = 128;

template <class Terms>
void products_of(int64_t rows, int64_t K, const typename Terms::Word* A, int64_t stride, const typename Terms::Word* panel, typename Terms::Sum* out, bool add) {
  constexpr int64_t P = kPanel<typename Terms::Sum>;
  int64_t k = 0;
  do {  // once at least: no terms give 0
    multiply<Terms, false>(rows, 1, K - k < kStretch ? K - k : kStretch, A + k, stride, 0, panel + k * P, out, P, add || k > 0);
    k += kStretch;
  } while (k < K);
}

}  // namespace SPECS_ISA
}  // namespace specs
