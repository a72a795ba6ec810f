// RMSNorm and SwiGLU on CPU: checks, threads, and the order of the sums over rows.

#include "layers.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>

#include "dispatch.h"
#include "workers.h"

namespace specs {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerTask = 1 << 14;
constexpr int64_t kMaxSums = 64;  // partial sums of a weight's gradient

template <class F>
const LayerKernels<F>& kernels() {
  constexpr bool single = sizeof(F) == 4;
#if defined(SPECS_X86)
  if (current_isa() >= Isa::avx512) {
    if constexpr (single) return avx512::layer_kernels_float;
    else return avx512::layer_kernels_double;
  }
  if (current_isa() == Isa::avx2) {
    if constexpr (single) return avx2::layer_kernels_float;
    else return avx2::layer_kernels_double;
  }
#endif
  if constexpr (single) return portable::layer_kernels_float;
  else return portable::layer_kernels_double;
}

template <class F>
const F* data(const Tensor& x) {
  return static_cast<const F*>(x.const_data_ptr());
}

template <class F>
F* mutable_data(const Tensor& x) {
  return static_cast<F*>(x.mutable_data_ptr());
}

bool same_kind(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.dim() != b.dim() || !a.is_contiguous() || !b.is_contiguous()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

void check_dtype(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, "native layers: float32 or float64");
}

void check_norm(const Tensor& x, const Tensor& weight) {
  check_dtype(x);
  STD_TORCH_CHECK(
      x.dim() == 2 && x.is_contiguous() && weight.dim() == 1 && weight.is_contiguous() && weight.size(0) == x.size(1) && x.size(1) > 0 &&
          weight.scalar_type() == x.scalar_type(),
      "rms_norm native: x [N, D] and weight [D], contiguous, one dtype, D >= 1");
}

std::tuple<Tensor, Tensor> rms_norm_forward(Tensor x, Tensor weight, double eps) {
  check_norm(x, weight);
  const int64_t rows = x.size(0), dim = x.size(1);
  Tensor out = torch::stable::new_empty(x, {rows, dim});
  Tensor scale = torch::stable::new_empty(x, {rows});
  const auto run = [&](auto zero) {
    using F = decltype(zero);
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kElementsPerTask / dim), [&](int64_t begin, int64_t end) {
      kernels<F>().rms_norm(data<F>(x), data<F>(weight), static_cast<F>(eps), dim, begin, end, mutable_data<F>(out), mutable_data<F>(scale));
    });
  };
  if (x.scalar_type() == ScalarType::Double) run(0.0);
  else run(0.0f);
  return {out, scale};
}

// The rows are cut into at most kMaxSums pieces by their number alone, so grad_weight does not depend on the number of threads.
std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) {
  check_norm(x, weight);
  STD_TORCH_CHECK(
      same_kind(grad, x) && scale.dim() == 1 && scale.size(0) == x.size(0) && scale.is_contiguous() && scale.scalar_type() == x.scalar_type(),
      "rms_norm native: grad must be like x, scale [N]");
  const int64_t rows = x.size(0), dim = x.size(1);
  Tensor grad_x = torch::stable::new_empty(x, {rows, dim});
  Tensor grad_weight = torch::stable::new_zeros(x, {dim});
  const auto run = [&](auto zero) {
    using F = decltype(zero);
    const int64_t step = std::max<int64_t>({1, kElementsPerTask / dim, (rows + kMaxSums - 1) / kMaxSums});
    const int64_t pieces = (rows + step - 1) / step;
    const Buffer<F> sums(pieces * dim);
    run_tasks(pieces, [&] {
      return [&](int64_t piece) {
        F* sum = sums.data() + piece * dim;
        std::fill(sum, sum + dim, F(0));
        kernels<F>().rms_norm_backward(
            data<F>(grad), data<F>(x), data<F>(weight), data<F>(scale), dim, piece * step, std::min(rows, (piece + 1) * step),
            mutable_data<F>(grad_x), sum);
      };
    });
    F* total = mutable_data<F>(grad_weight);
    for (int64_t piece = 0; piece < pieces; ++piece)
      for (int64_t d = 0; d < dim; ++d) total[d] += sums.data()[piece * dim + d];
  };
  if (x.scalar_type() == ScalarType::Double) run(0.0);
  else run(0.0f);
  return {grad_x, grad_weight};
}

Tensor swiglu_forward(Tensor gate, Tensor up) {
  check_dtype(gate);
  STD_TORCH_CHECK(same_kind(gate, up), "swiglu native: gate and up must be contiguous and alike");
  Tensor out = torch::stable::empty_like(gate);
  const auto run = [&](auto zero) {
    using F = decltype(zero);
    torch::stable::parallel_for(0, gate.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      kernels<F>().swiglu(data<F>(gate), data<F>(up), begin, end, mutable_data<F>(out));
    });
  };
  if (gate.scalar_type() == ScalarType::Double) run(0.0);
  else run(0.0f);
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad, Tensor gate, Tensor up) {
  check_dtype(gate);
  STD_TORCH_CHECK(same_kind(gate, up) && same_kind(gate, grad), "swiglu native: grad, gate and up must be contiguous and alike");
  Tensor grad_gate = torch::stable::empty_like(gate), grad_up = torch::stable::empty_like(gate);
  const auto run = [&](auto zero) {
    using F = decltype(zero);
    torch::stable::parallel_for(0, gate.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      kernels<F>().swiglu_backward(data<F>(grad), data<F>(gate), data<F>(up), begin, end, mutable_data<F>(grad_gate), mutable_data<F>(grad_up));
    });
  };
  if (gate.scalar_type() == ScalarType::Double) run(0.0);
  else run(0.0f);
  return {grad_gate, grad_up};
}

}  // namespace
}  // namespace specs

STABLE_TORCH_LIBRARY_FRAGMENT(specs_kernels, m) {
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)");
  m.def("swiglu_forward(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(specs_kernels, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&specs::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&specs::rms_norm_backward));
  m.impl("swiglu_forward", TORCH_BOX(&specs::swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&specs::swiglu_backward));
}
