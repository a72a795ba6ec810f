// Sweeps over the logits of one row; see row_pass.h.
//
// A row's end shorter than a vector is taken from the last whole vector's worth of the row, whose first lanes are then written twice
// (with the same values) or masked. It is read before anything is written, so every sweep works in place.

#pragma once

#include "row_pass.h"
#include "simd.h"

namespace specs {
namespace SPECS_ISA {

// The last `rest` of `count` numbers in the last lanes of a vector. Before them: the numbers before, or `fill` where there are none.
template <class F>
SPECS_INLINE Vec<F> load_end(const F* p, int64_t count, int64_t rest, F fill) {
  constexpr int L = kLanes<F>;
  if (count >= L) return load(p + count - L);
  alignas(kVectorBytes) F lanes[L];
  for (int i = 0; i < L; ++i) lanes[i] = fill;
  for (int64_t i = 0; i < rest; ++i) lanes[L - rest + i] = p[count - rest + i];
  return load(lanes);
}

template <class F>
SPECS_INLINE void store_end(F* p, int64_t count, int64_t rest, Vec<F> v) {
  constexpr int L = kLanes<F>;
  if (count >= L) return store(p + count - L, v);
  alignas(kVectorBytes) F lanes[L];
  store(lanes, v);
  for (int64_t i = 0; i < rest; ++i) p[count - rest + i] = lanes[L - rest + i];
}

// v in the last `rest` lanes, 0 in the others.
template <class F>
SPECS_INLINE Vec<F> only_end(Vec<F> v, int64_t rest) {
  typename Simd<F>::Int lane;
  for (int i = 0; i < kLanes<F>; ++i) lane[i] = i;
  decltype(+lane[0]) first = kLanes<F> - rest;
  return lane >= first ? v : Vec<F>{};
}

template <class F>
F maximum(const F* z, int64_t count) {
  constexpr int L = kLanes<F>;
  const F lowest = -(F)__builtin_inff();
  Vec<F> a = splat<F>(lowest), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
    a = larger<F>(a, load(z + i));
    b = larger<F>(b, load(z + i + L));
    c = larger<F>(c, load(z + i + 2 * L));
    d = larger<F>(d, load(z + i + 3 * L));
  }
  for (; i + L <= count; i += L) a = larger<F>(a, load(z + i));
  if (i < count) b = larger<F>(b, load_end(z, count, count - i, lowest));
  return max_lane<F>(larger<F>(larger<F>(a, b), larger<F>(c, d)));
}

template <class F>
F scores(const F* x, F inverse, int64_t count, F* z) {
  constexpr int L = kLanes<F>;
  const F lowest = -(F)__builtin_inff();
  const int64_t rest = count % L, whole = count - rest;
  Vec<F> top = splat<F>(lowest), end = top;
  if (rest) end = load_end(x, count, rest, lowest) * inverse;
  for (int64_t i = 0; i < whole; i += L) {
    const Vec<F> v = load(x + i) * inverse;
    top = larger<F>(top, v);
    store(z + i, v);
  }
  if (rest) {
    store_end(z, count, rest, end);
    top = larger<F>(top, end);
  }
  return max_lane<F>(top);
}

// In one fixed order: vectors alternate between two accumulators, the row's end comes last.
template <class F, bool WEIGHTED>
SPECS_INLINE ScoreSums<F> sums_of(const F* z, int64_t count, F maximum) {
  constexpr int L = kLanes<F>;
  Vec<F> s[2] = {}, t[2] = {};
  const int64_t rest = count % L, whole = count - rest;
  const auto take = [&](Vec<F> v, Vec<F>& total, Vec<F>& weighted) __attribute__((always_inline)) {
    const Vec<F> d = v - maximum, e = vexp_bounded(d);
    total += e;
    if (WEIGHTED) weighted += rounded<F>(e * larger<F>(splat<F>(kFloor), d));
  };
  int64_t i = 0;
  for (; i + 2 * L <= whole; i += 2 * L) {
    take(load(z + i), s[0], t[0]);
    take(load(z + i + L), s[1], t[1]);
  }
  if (i < whole) take(load(z + i), s[0], t[0]);
  if (rest) {
    Vec<F> total{}, weighted{};
    take(load_end(z, count, rest, -(F)__builtin_inff()), total, weighted);
    s[1] += only_end<F>(total, rest);
    t[1] += only_end<F>(weighted, rest);
  }
  return {sum_lanes<F>(s[0] + s[1]), WEIGHTED ? sum_lanes<F>(t[0] + t[1]) : F(0)};
}

template <class F>
ScoreSums<F> sums(const F* z, int64_t count, F maximum, bool weighted) {
  return weighted ? sums_of<F, true>(z, count, maximum) : sums_of<F, false>(z, count, maximum);
}

template <class F, bool ENTROPY>
SPECS_INLINE void gradient_of(const F* z, int64_t count, const RowGradient<F>& given, F* dx) {
  constexpr int L = kLanes<F>;
  const RowGradient<F> row = given;
  const auto map = [&](Vec<F> v) __attribute__((always_inline)) {
    const Vec<F> d = v - row.maximum;
    Vec<F> factor = splat<F>(row.base);
    if (ENTROPY) factor -= row.entropy * larger<F>(splat<F>(kFloor), d);
    return vexp_bounded(d) * factor;
  };
  const int64_t rest = count % L, whole = count - rest;
  Vec<F> end{};
  if (rest) end = map(load_end(z, count, rest, F(0)));
  for (int64_t i = 0; i < whole; i += L) store(dx + i, (Vec<F>)map(load(z + i)));
  if (rest) store_end(dx, count, rest, end);
}

template <class F>
void gradient(const F* z, int64_t count, const RowGradient<F>& row, F* dx) {
  if (row.has_entropy) gradient_of<F, true>(z, count, row, dx);
  else gradient_of<F, false>(z, count, row, dx);
}

// Half precision, one number at a time: branch-free, so the compiler makes vectors of it.

SPECS_INLINE uint32_t bits(float x) { return __builtin_bit_cast(uint32_t, x); }
SPECS_INLINE float number(uint32_t x) { return __builtin_bit_cast(float, x); }

inline void from_bfloat16(const uint16_t* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = number((uint32_t)x[i] << 16);
}

inline void to_bfloat16(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t u = bits(x[i]);
    const uint32_t nearest = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    out[i] = (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 | (u >> 16) : nearest);
  }
}

inline void from_float16(const uint16_t* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t sign = (uint32_t)(x[i] & 0x8000) << 16, rest = (uint32_t)(x[i] & 0x7fff) << 13;
    // Exponents of fp16 are 112 below those of fp32; multiplying by 2^112 is exact, for subnormal numbers too.
    const uint32_t scaled = bits(number(rest) * 0x1p112f);
    out[i] = number(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : scaled));
  }
}

inline void to_float16(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t u = bits(x[i]), size = u & 0x7fffffff, sign = (u >> 16) & 0x8000;
    // Below 2^-14 the unit is 2^-24: adding 0.5 rounds to it. Above, round the 13 bits that go, ties to even.
    const uint32_t small = bits(number(size) + 0.5f) - 0x3f000000;
    const uint32_t normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
    uint32_t h = size < 0x38800000 ? small : normal;
    h = size >= 0x477ff000 ? 0x7c00 : h;  // 65520 and above
    h = size > 0x7f800000 ? 0x7e00 : h;
    out[i] = (uint16_t)(sign | h);
  }
}

extern const RowPassKernels<float> row_pass_kernels_float;
extern const RowPassKernels<double> row_pass_kernels_double;
extern const HalfKernels half_kernels;
const RowPassKernels<float> row_pass_kernels_float = {maximum<float>, scores<float>, sums<float>, gradient<float>};
const RowPassKernels<double> row_pass_kernels_double = {maximum<double>, scores<double>, sums<double>, gradient<double>};
const HalfKernels half_kernels = {from_bfloat16, to_bfloat16, from_float16, to_float16};

}  // namespace SPECS_ISA
}  // namespace specs
