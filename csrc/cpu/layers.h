// RMSNorm and SwiGLU for CPU: what the driver (layers.cpp) and the kernels of each instruction set agree on. All arrays are contiguous.

#pragma once

#include <stdint.h>

namespace specs {

template <class F>
struct LayerKernels {
  // Rows [begin, end) of x [N, D]: out = weight * x * scale, scale = 1 / sqrt(mean x^2 + eps), kept per row.
  void (*rms_norm)(const F* x, const F* weight, F eps, int64_t dim, int64_t begin, int64_t end, F* out, F* scale);
  // grad_x of rows [begin, end); grad_weight [D] is added to.
  void (*rms_norm_backward)(const F* grad, const F* x, const F* weight, const F* scale, int64_t dim, int64_t begin, int64_t end, F* grad_x, F* grad_weight);
  // Elements [begin, end): out = silu(gate) * up.
  void (*swiglu)(const F* gate, const F* up, int64_t begin, int64_t end, F* out);
  void (*swiglu_backward)(const F* grad, const F* gate, const F* up, int64_t begin, int64_t end, F* grad_gate, F* grad_up);
};

#define SPECS_DECLARE_LAYERS(isa)                         \
  namespace isa {                                         \
  extern const LayerKernels<float> layer_kernels_float;   \
  extern const LayerKernels<double> layer_kernels_double; \
  }
SPECS_DECLARE_LAYERS(portable)
SPECS_DECLARE_LAYERS(avx2)
SPECS_DECLARE_LAYERS(avx512)
#undef SPECS_DECLARE_LAYERS

}  // namespace specs
