// Sweeps over the logits of one row, for selective_logprob on CPU: what the driver (row_pass.cpp) and the kernels of each instruction set
// agree on. A driver hands over pieces of a row that stay in the first-level cache between two sweeps. linear_logprob shares the constants
// and the conversions of half precision.

#pragma once

#include <stdint.h>

namespace specs {

// Stands in for z - m = -inf where it meets a factor exp(z - m) = 0: their product is 0, not NaN.
constexpr float kFloor = -1e5f;

// In a target vector: the row does not count (row_pass.py).
constexpr int64_t kSkipRow = -2;

template <class F>
struct ScoreSums {
  F total;     // s = sum exp(z - m)
  F weighted;  // t = sum exp(z - m) (z - m)
};

// The gradient of a row's logits from its scores: dx = exp(z - maximum) (base - entropy (z - maximum)).
template <class F>
struct RowGradient {
  F maximum;
  F base;     // times inverse_temperature / s, both
  F entropy;  // 0 and has_entropy false where the entropy passes no gradient
  bool has_entropy;
};

template <class F>
struct RowPassKernels {
  // Largest of count >= 1 numbers; a NaN may or may not be seen.
  F (*maximum)(const F* z, int64_t count);
  // z = x inverse, which may be x. Returns their maximum.
  F (*scores)(const F* x, F inverse, int64_t count, F* z);
  ScoreSums<F> (*sums)(const F* z, int64_t count, F maximum, bool weighted);
  // dx may be z.
  void (*gradient)(const F* z, int64_t count, const RowGradient<F>& row, F* dx);
};

// Between fp32 and the bits of half-precision numbers, rounded to nearest even.
struct HalfKernels {
  void (*from_bfloat16)(const uint16_t* x, int64_t count, float* out);
  void (*to_bfloat16)(const float* x, int64_t count, uint16_t* out);
  void (*from_float16)(const uint16_t* x, int64_t count, float* out);
  void (*to_float16)(const float* x, int64_t count, uint16_t* out);
};

#define SPECS_DECLARE_ROW_PASS(isa)                          \
  namespace isa {                                            \
  extern const RowPassKernels<float> row_pass_kernels_float; \
  extern const RowPassKernels<double> row_pass_kernels_double; \
  extern const HalfKernels half_kernels;                     \
  }
SPECS_DECLARE_ROW_PASS(portable)
SPECS_DECLARE_ROW_PASS(avx2)
SPECS_DECLARE_ROW_PASS(avx512)
#undef SPECS_DECLARE_ROW_PASS

}  // namespace specs
