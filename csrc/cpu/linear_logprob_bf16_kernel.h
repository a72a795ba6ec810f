// GEMMs of linear_logprob in bfloat16 with fp32 sums, two terms to an instruction; see linear_logprob.h. Intrinsics, for want of a type
// in the vector extensions.

#pragma once

#include <immintrin.h>

#include "linear_logprob_micro.h"

namespace specs {
namespace SPECS_ISA {

// Two numbers each: the products of both join the sum.
struct Pairs {
  using Word = uint32_t;
  using Sum = float;
  static SPECS_INLINE __m512i load(const uint32_t* x) { return _mm512_loadu_si512(x); }
  static SPECS_INLINE Vec<float> multiply_add(Vec<float> sum, uint32_t a, __m512i x) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32((int)a));
  }
};

void products_bf16(int64_t rows, int64_t pairs, const uint32_t* A, int64_t stride, const uint32_t* panel, float* out, bool add) {
  products_of<Pairs>(rows, pairs, A, stride, panel, out, add);
}

void over_rows_bf16(int64_t n, int64_t panels, const uint32_t* tiles, int64_t panel_stride, const uint32_t* rows, float* C, int64_t stride, bool add) {
  multiply<Pairs, false>(n, panels, kPanel<float> / 2, tiles, kPanel<float> / 2, panel_stride, rows, C, stride, add);
}

void over_columns_bf16(int64_t D, int64_t pairs, const uint32_t* W, int64_t stride, const uint32_t* tile, float* out, bool add) {
  multiply<Pairs, true>(D, 1, pairs, W, stride, 0, tile, out, kPanel<float>, add);
}

SPECS_INLINE uint32_t bfloat16_bits(float x) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x), nearest = u + 0x7fff + ((u >> 16) & 1);
  return (u & 0x7fffffff) > 0x7f800000 ? u | 0x400000 : nearest;
}

void pair_bf16(const float* low, const float* high, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = bfloat16_bits(low[i]) >> 16 | (high ? bfloat16_bits(high[i]) & 0xffff0000u : 0);
}

void zip_bf16(const uint16_t* low, const uint16_t* high, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = (uint32_t)low[i] | (high ? (uint32_t)high[i] << 16 : 0);
}

extern const Bfloat16Kernels bfloat16_kernels;
const Bfloat16Kernels bfloat16_kernels = {products_bf16, over_rows_bf16, over_columns_bf16, pair_bf16, zip_bf16};

}  // namespace SPECS_ISA
}  // namespace specs
