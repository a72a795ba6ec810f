// Vectors of float and double, as wide as the instruction set this file is compiled for.
//
// Included by every kernel header, once per instruction set: each *_<isa>.cpp defines SPECS_ISA and is compiled with that set's flags,
// so everything here lives in namespace specs::<isa>. Nothing from the C++ standard library is used in these files: an inline function of
// it, compiled here with wide instructions, could be picked by the linker for the whole library and fail on a smaller processor.
//
// GCC and Clang vector extensions only, no intrinsics: the portable build runs on any processor they know.

#pragma once

#include <stdint.h>

#ifndef SPECS_ISA
#error "define SPECS_ISA before including kernel headers"
#endif

#define SPECS_INLINE inline __attribute__((always_inline))

namespace specs {
namespace SPECS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class F>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <class F>
using Vec = typename Simd<F>::Vec;

template <class F>
constexpr int kLanes = kVectorBytes / sizeof(F);

template <class F>
SPECS_INLINE Vec<F> load(const F* p) {
  return (Vec<F>)*reinterpret_cast<const typename Simd<F>::Unaligned*>(p);
}

template <class F>
SPECS_INLINE void store(F* p, Vec<F> v) {
  *reinterpret_cast<typename Simd<F>::Unaligned*>(p) = (typename Simd<F>::Unaligned)v;
}

template <class F>
SPECS_INLINE Vec<F> splat(F x) {
  return x - Vec<F>{};  // x - 0 is x for every x, -0 included
}

template <class F>
SPECS_INLINE Vec<F> larger(Vec<F> a, Vec<F> b) {
  return a > b ? a : b;
}

// v, rounded: what is added to it does not become part of one fused multiply-add, whatever else the compiler sees done with v.
template <class F>
SPECS_INLINE Vec<F> rounded(Vec<F> v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

// Largest lane; lanes that are NaN may or may not be seen.
template <class F>
SPECS_INLINE F max_lane(Vec<F> v) {
  alignas(kVectorBytes) F lanes[kLanes<F>];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kLanes<F> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// Sum of the lanes, halves first: a fixed order.
template <class F>
SPECS_INLINE F sum_lanes(Vec<F> v) {
  alignas(kVectorBytes) F lanes[kLanes<F>];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kLanes<F> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// exp of numbers that are not above 88.3, within 1.5 ulp. exp(-inf) = 0, NaN stays NaN; below -87.3 the result is 0, not a denormal.
// x = n ln2 + r with |r| <= ln2 / 2; exp(r) by a polynomial of degree 7 (Taylor: its error is below 2^-26), times 2^n.
SPECS_INLINE Vec<float> vexp_bounded(Vec<float> x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low mantissa bits
  Vec<float> shifted = x * 1.44269504088896341f + kRound;
  Vec<float> n = shifted - kRound;
  Vec<float> r = x - n * 0.693359375f;  // ln2 in two parts, the first exact in n * part
  r = r + n * 2.12194440054690583e-4f;
  Vec<float> p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  typedef Simd<float>::Bits Bits;
  Vec<float> power = (Vec<float>)(((Bits)shifted << 23) + 0x3f800000u);
  p = p * power;
  return x < -87.3365447f ? Vec<float>{} : p;
}

// The same for every number: +inf above 88.3.
SPECS_INLINE Vec<float> vexp(Vec<float> x) { return x > 88.3762626f ? splat(__builtin_inff()) : vexp_bounded(x); }

SPECS_INLINE Vec<double> vexp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

SPECS_INLINE Vec<double> vexp_bounded(Vec<double> x) { return vexp(x); }

// tanh within 2 ulp: an odd polynomial near 0 (Cephes tanhf), 1 - 2 / (exp(2|x|) + 1) elsewhere.
SPECS_INLINE Vec<float> vtanh(Vec<float> x) {
  Vec<float> size = x < 0.0f ? -x : x;
  Vec<float> far = 1.0f - 2.0f / (vexp(size + size) + 1.0f);
  far = x < 0.0f ? -far : far;
  Vec<float> z = x * x;
  Vec<float> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  Vec<float> near = p * z * x + x;
  return size < 0.625f ? near : far;  // NaN takes the second
}

SPECS_INLINE Vec<double> vtanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

}  // namespace SPECS_ISA
}  // namespace specs
