// The GEMMs of linear_logprob and the sweeps between them on CPU: what the drivers (linear_logprob_*.cpp) and the kernels of each instruction
// set agree on.
//
// Rows (targets) go in panels of `lanes`: one vector lane each, zero lanes behind the last row. A block is kBlockColumns columns of the
// vocabulary. The scores of a block for one panel are a tile [columns][lanes] that stays in the first-level cache, and every sweep over it
// works on lanes side by side: nothing that a row computes depends on another row, or on its place.
//
// Letters: K terms of a sum, n columns of a tile, F float or double.

#pragma once

#include <stdint.h>

namespace specs {

constexpr int64_t kBlockColumns = 84;  // whole groups of rows of every micro-kernel (14 and 6); with D = 1024 its weights stay in 512 KiB
constexpr int kMaxLanes = 32;

// From products to scores: z = softcap(factor * x + bias) * inverse.
template <class F>
struct PanelScores {
  F factor;
  const F* bias;     // [n] or null
  F cap;             // 0: none
  const F* inverse;  // [lanes]
};

// Running statistics of a panel, [lanes] each: m, s = sum exp(z - m), t = sum exp(z - m) (z - m) (null where not wanted).
template <class F>
struct PanelState {
  F *maximum, *total, *weighted;
};

// dx = exp(z - maximum) (base - entropy (z - maximum)) slope, slope = 1 - (z tanh_scale)^2; 0 in lanes where live is 0. [lanes] each.
template <class F>
struct PanelGradient {
  const F *maximum, *base, *entropy, *tanh_scale, *live;  // entropy, tanh_scale: null where there is none
};

template <class F>
struct LinearKernels {
  int64_t lanes;
  // out[r][lane] (+)= sum_k A[r * stride + k] panel[k][lane], r < rows; the sum in order of k whatever rows is.
  void (*products)(int64_t rows, int64_t K, const F* A, int64_t stride, const F* panel, F* out, bool add);
  // C[r][j] (+)= sum over panels p and lanes l of tiles[p][r][l] rows[p * lanes + l][j], j < lanes; tiles lie panel_stride apart.
  void (*over_rows)(int64_t n, int64_t panels, const F* tiles, int64_t panel_stride, const F* rows, F* C, int64_t stride, bool add);
  // out[d][lane] (+)= sum_c W[c * stride + d] tile[c][lane], d < D.
  void (*over_columns)(int64_t D, int64_t n, const F* W, int64_t stride, const F* tile, F* out, bool add);
  // z may be x.
  void (*scores)(const F* x, int64_t n, const PanelScores<F>& scores, F* z);
  // Largest number of each lane, at least the lowest finite one.
  void (*maximum)(const F* z, int64_t n, F* top);
  // out = z - reference, which is [lanes]; out may be z.
  void (*subtract)(const F* z, int64_t n, const F* reference, F* out);
  // Takes a tile into the state. fresh: the state is empty.
  void (*stats)(const F* z, int64_t n, bool fresh, const PanelState<F>& state);
  // The same, and exp(z - m) slope -> weights (may be z), that times (z - m) -> weighted (may be null); change = old m - new m.
  void (*weights)(const F* z, int64_t n, bool fresh, const PanelState<F>& state, const F* tanh_scale, F* weights, F* weighted, F* change);
  // sums[d][lane] *= exp(change); where second is not null, second = exp(change) (second + change sums) before it.
  void (*rescale)(F* sums, F* second, int64_t D, const F* change);
  // dx may be z.
  void (*gradient)(const F* z, int64_t n, const PanelGradient<F>& gradient, F* dx);
  void (*scale)(F* x, int64_t count, F factor);
  // out[c] += sum of the lanes of tile[c].
  void (*lane_sums)(const F* tile, int64_t n, F* out);
  // y += x
  void (*add)(const F* x, int64_t count, F* y);
};

// The GEMMs where both sides are bfloat16 and the processor multiplies pairs of them into fp32. A word holds two consecutive terms, the
// first in its low half.
struct Bfloat16Kernels {
  void (*products)(int64_t rows, int64_t pairs, const uint32_t* A, int64_t stride, const uint32_t* panel, float* out, bool add);
  // Pairs of rows: tiles [p][n][lanes / 2], rows [p * lanes / 2 + l][j].
  void (*over_rows)(int64_t n, int64_t panels, const uint32_t* tiles, int64_t panel_stride, const uint32_t* rows, float* C, int64_t stride, bool add);
  // Pairs of columns.
  void (*over_columns)(int64_t D, int64_t pairs, const uint32_t* W, int64_t stride, const uint32_t* tile, float* out, bool add);
  // out[i] = low[i] and high[i] as bfloat16, rounded to nearest even; high may be null: 0.
  void (*pair)(const float* low, const float* high, int64_t count, uint32_t* out);
  void (*zip)(const uint16_t* low, const uint16_t* high, int64_t count, uint32_t* out);
};

#define SPECS_DECLARE_LINEAR(isa)                        \
  namespace isa {                                        \
  extern const LinearKernels<float> linear_kernels_float;   \
  extern const LinearKernels<double> linear_kernels_double; \
  }
SPECS_DECLARE_LINEAR(portable)
SPECS_DECLARE_LINEAR(avx2)
SPECS_DECLARE_LINEAR(avx512)
#undef SPECS_DECLARE_LINEAR
namespace avx512bf16 {
extern const Bfloat16Kernels bfloat16_kernels;
}

}  // namespace specs
