// RMSNorm and SwiGLU, one pass over memory each way; see layers.h.
//
// RMSNorm backward, with n = x * scale and u = weight * grad: grad_x = scale (u - n mean(u n)), grad_weight = sum over rows of grad * n.
// SwiGLU backward, with s = sigmoid(gate): grad_up = grad * gate s, grad_gate = grad * up s (1 + gate (1 - s)).
// Tails shorter than a vector go through a zero-padded copy, so every element takes the same arithmetic.

#pragma once

#include "layers.h"
#include "simd.h"

namespace specs {
namespace SPECS_ISA {

template <class F>
SPECS_INLINE Vec<F> load_some(const F* p, int64_t count) {
  alignas(kVectorBytes) F lanes[kLanes<F>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class F>
SPECS_INLINE void store_some(F* p, Vec<F> v, int64_t count) {
  alignas(kVectorBytes) F lanes[kLanes<F>];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// Calls visit(offset, read, write) for each vector of [begin, end); read(p) and write(p, v) handle the tail.
template <class F, class Visit>
SPECS_INLINE void for_each_vector(int64_t begin, int64_t end, const Visit& visit) {
  int64_t i = begin;
  for (; i + kLanes<F> <= end; i += kLanes<F>)
    visit(
        i, [&](const F* p) __attribute__((always_inline)) { return load(p + i); },
        [&](F* p, Vec<F> v) __attribute__((always_inline)) { store(p + i, v); });
  if (i < end) {
    const int64_t rest = end - i;
    visit(
        i, [&](const F* p) __attribute__((always_inline)) { return load_some(p + i, rest); },
        [&](F* p, Vec<F> v) __attribute__((always_inline)) { store_some(p + i, v, rest); });
  }
}

template <class F>
void rms_norm(const F* x, const F* weight, F eps, int64_t dim, int64_t begin, int64_t end, F* out, F* scale) {
  for (int64_t row = begin; row < end; ++row) {
    const F* from = x + row * dim;
    F* to = out + row * dim;
    Vec<F> squares{};
    for_each_vector<F>(0, dim, [&](int64_t, auto read, auto) __attribute__((always_inline)) {
      const Vec<F> v = read(from);
      squares += v * v;
    });
    const F mean = sum_lanes<F>(squares) / (F)dim;
    const F factor = (F)(1 / __builtin_sqrt((double)(mean + eps)));
    scale[row] = factor;
    for_each_vector<F>(0, dim, [&](int64_t, auto read, auto write) __attribute__((always_inline)) {
      write(to, read(weight) * (read(from) * factor));
    });
  }
}

template <class F>
void rms_norm_backward(const F* grad, const F* x, const F* weight, const F* scale, int64_t dim, int64_t begin, int64_t end, F* grad_x, F* grad_weight) {
  for (int64_t row = begin; row < end; ++row) {
    const F *g = grad + row * dim, *from = x + row * dim;
    F* to = grad_x + row * dim;
    const F factor = scale[row];
    Vec<F> product{};
    for_each_vector<F>(0, dim, [&](int64_t, auto read, auto write) __attribute__((always_inline)) {
      const Vec<F> n = read(from) * factor, upstream = read(g);
      product += upstream * read(weight) * n;
      write(grad_weight, read(grad_weight) + upstream * n);
    });
    const F mean = sum_lanes<F>(product) / (F)dim;
    for_each_vector<F>(0, dim, [&](int64_t, auto read, auto write) __attribute__((always_inline)) {
      write(to, (read(g) * read(weight) - read(from) * factor * mean) * factor);
    });
  }
}

template <class F>
SPECS_INLINE Vec<F> sigmoid(Vec<F> x) {
  return 1 / (1 + vexp(-x));
}

template <class F>
void swiglu(const F* gate, const F* up, int64_t begin, int64_t end, F* out) {
  for_each_vector<F>(begin, end, [&](int64_t, auto read, auto write) __attribute__((always_inline)) {
    const Vec<F> g = read(gate);
    write(out, g * sigmoid<F>(g) * read(up));
  });
}

template <class F>
void swiglu_backward(const F* grad, const F* gate, const F* up, int64_t begin, int64_t end, F* grad_gate, F* grad_up) {
  for_each_vector<F>(begin, end, [&](int64_t, auto read, auto write) __attribute__((always_inline)) {
    const Vec<F> g = read(gate), upstream = read(grad), s = sigmoid<F>(g);
    write(grad_up, upstream * (g * s));
    write(grad_gate, upstream * read(up) * (s * (1 + g * (1 - s))));
  });
}

extern const LayerKernels<float> layer_kernels_float;
extern const LayerKernels<double> layer_kernels_double;
const LayerKernels<float> layer_kernels_float = {rms_norm<float>, rms_norm_backward<float>, swiglu<float>, swiglu_backward<float>};
const LayerKernels<double> layer_kernels_double = {rms_norm<double>, rms_norm_backward<double>, swiglu<double>, swiglu_backward<double>};

}  // namespace SPECS_ISA
}  // namespace specs
