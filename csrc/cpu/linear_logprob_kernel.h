// GEMMs of numbers and sweeps over tiles of scores; see linear_logprob.h.

#pragma once

#include "linear_logprob_micro.h"
#include "row_pass.h"  // kFloor

namespace specs {
namespace SPECS_ISA {

template <class F>
void products(int64_t rows, int64_t K, const F* A, int64_t stride, const F* panel, F* out, bool add) {
  products_of<Numbers<F>>(rows, K, A, stride, panel, out, add);
}

template <class F>
void over_rows(int64_t n, int64_t panels, const F* tiles, int64_t panel_stride, const F* rows, F* C, int64_t stride, bool add) {
  constexpr int64_t step = kStretch / kPanel<F>;
  for (int64_t p = 0; p < panels; p += step)
    multiply<Numbers<F>, false>(
        n, panels - p < step ? panels - p : step, kPanel<F>, tiles + p * panel_stride, kPanel<F>, panel_stride, rows + p * kPanel<F> * kPanel<F>, C, stride,
        add || p > 0);
}

template <class F>
void over_columns(int64_t D, int64_t n, const F* W, int64_t stride, const F* tile, F* out, bool add) {
  multiply<Numbers<F>, true>(D, 1, n, W, stride, 0, tile, out, kPanel<F>, add);
}

// One half of a panel at a time: f(offset of its first lane).
template <class F, class Body>
SPECS_INLINE void halves(const Body& body) {
  body(0);
  body(kLanes<F>);
}

template <class F, bool CAP>
SPECS_INLINE void scores_of(const F* x, int64_t n, const PanelScores<F>& given, F* z) {
  const F factor = given.factor, scale = CAP ? 1 / given.cap : 1;
  halves<F>([&](int half) __attribute__((always_inline)) {
    const Vec<F> inverse = load(given.inverse + half) * (CAP ? given.cap : 1);
    for (int64_t c = 0; c < n; ++c) {
      Vec<F> y = load(x + c * kPanel<F> + half) * factor;
      if (given.bias) y += given.bias[c];
      store(z + c * kPanel<F> + half, (CAP ? vtanh(y * scale) : y) * inverse);
    }
  });
}

template <class F>
void scores(const F* x, int64_t n, const PanelScores<F>& given, F* z) {
  given.cap > 0 ? scores_of<F, true>(x, n, given, z) : scores_of<F, false>(x, n, given, z);
}

template <class F>
constexpr F kLowest = sizeof(F) == 4 ? (F)-__FLT_MAX__ : (F)-__DBL_MAX__;

template <class F>
SPECS_INLINE Vec<F> top_of(const F* z, int64_t n) {
  Vec<F> a = splat<F>(kLowest<F>), b = a;
  int64_t c = 0;
  for (; c + 2 <= n; c += 2) {
    a = larger<F>(a, load(z + c * kPanel<F>));
    b = larger<F>(b, load(z + (c + 1) * kPanel<F>));
  }
  if (c < n) a = larger<F>(a, load(z + c * kPanel<F>));
  // A NaN seen last in one of them stays out of the maximum if it may, but never becomes a number: the sum holds it.
  return larger<F>(larger<F>(a, b), splat<F>(kLowest<F>));
}

template <class F>
void maximum(const F* z, int64_t n, F* top) {
  halves<F>([&](int half) __attribute__((always_inline)) { store(top + half, top_of(z + half, n)); });
}

template <class F>
void subtract(const F* z, int64_t n, const F* reference, F* out) {
  halves<F>([&](int half) __attribute__((always_inline)) {
    const Vec<F> below = load(reference + half);
    for (int64_t c = 0; c < n; ++c) store(out + c * kPanel<F> + half, load(z + c * kPanel<F> + half) - below);
  });
}

// visit(c, z, e, e d) with e = exp(d), d = z - m, in order of the columns; sums and state follow.
template <class F, bool WEIGHTED, class Visit>
SPECS_INLINE void take(const F* z, int64_t n, bool fresh, const PanelState<F>& state, int half, F* change, const Visit& visit) {
  const Vec<F> top = top_of(z + half, n), old = fresh ? top : load(state.maximum + half);
  const Vec<F> m = larger<F>(old, top), step = old - m;
  Vec<F> s{}, t{};
  for (int64_t c = 0; c < n; ++c) {
    const Vec<F> v = load(z + c * kPanel<F> + half), d = v - m, e = vexp_bounded(d);
    s += e;
    Vec<F> w{};
    if (WEIGHTED) {
      w = rounded<F>(e * larger<F>(splat<F>(kFloor), d));  // the same sum whether or not w is stored
      t += w;
    }
    visit(c, v, e, w);
  }
  if (!fresh) {
    const Vec<F> scale = vexp_bounded(step);
    if (state.weighted) t += scale * (load(state.weighted + half) + larger<F>(splat<F>(kFloor), step) * load(state.total + half));
    s += scale * load(state.total + half);
  }
  store(state.maximum + half, m);
  store(state.total + half, s);
  if (state.weighted) store(state.weighted + half, t);
  if (change) store(change + half, step);
}

template <class F>
void stats(const F* z, int64_t n, bool fresh, const PanelState<F>& state) {
  const auto nothing = [](int64_t, Vec<F>, Vec<F>, Vec<F>) __attribute__((always_inline)) {};
  halves<F>([&](int half) __attribute__((always_inline)) {
    if (state.weighted) take<F, true>(z, n, fresh, state, half, (F*)nullptr, nothing);
    else take<F, false>(z, n, fresh, state, half, (F*)nullptr, nothing);
  });
}

template <class F, bool CAP>
SPECS_INLINE void weights_of(const F* z, int64_t n, bool fresh, const PanelState<F>& state, const F* tanh_scale, F* out, F* weighted, F* change) {
  halves<F>([&](int half) __attribute__((always_inline)) {
    const Vec<F> scale = CAP ? load(tanh_scale + half) : Vec<F>{};
    take<F, true>(z, n, fresh, state, half, change, [&](int64_t c, Vec<F> v, Vec<F> e, Vec<F> w) __attribute__((always_inline)) {
      if (CAP) {
        const Vec<F> tanh = v * scale, slope = 1 - tanh * tanh;
        e *= slope;
        w *= slope;
      }
      store(out + c * kPanel<F> + half, e);
      if (weighted) store(weighted + c * kPanel<F> + half, w);
    });
  });
}

template <class F>
void weights(const F* z, int64_t n, bool fresh, const PanelState<F>& state, const F* tanh_scale, F* out, F* weighted, F* change) {
  if (tanh_scale) weights_of<F, true>(z, n, fresh, state, tanh_scale, out, weighted, change);
  else weights_of<F, false>(z, n, fresh, state, tanh_scale, out, weighted, change);
}

template <class F>
void rescale(F* sums, F* second, int64_t D, const F* change) {
  halves<F>([&](int half) __attribute__((always_inline)) {
    const Vec<F> given = load(change + half), step = larger<F>(splat<F>(kFloor), given), scale = vexp_bounded(given);
    for (int64_t d = 0; d < D; ++d) {
      F *at = sums + d * kPanel<F> + half, *at2 = second ? second + d * kPanel<F> + half : nullptr;
      const Vec<F> sum = load(at);
      if (at2) store(at2, scale * (load(at2) + step * sum));
      store(at, scale * sum);
    }
  });
}

template <class F, bool ENTROPY, bool CAP>
SPECS_INLINE void gradient_of(const F* z, int64_t n, const PanelGradient<F>& given, F* dx) {
  halves<F>([&](int half) __attribute__((always_inline)) {
    const Vec<F> m = load(given.maximum + half), base = load(given.base + half), live = load(given.live + half);
    const Vec<F> q = ENTROPY ? load(given.entropy + half) : Vec<F>{}, scale = CAP ? load(given.tanh_scale + half) : Vec<F>{};
    for (int64_t c = 0; c < n; ++c) {
      const Vec<F> v = load(z + c * kPanel<F> + half), d = v - m;
      Vec<F> factor = base;
      if (ENTROPY) factor -= q * larger<F>(splat<F>(kFloor), d);
      if (CAP) {
        const Vec<F> tanh = v * scale;
        factor *= 1 - tanh * tanh;
      }
      const Vec<F> g = vexp_bounded(d) * factor;
      store(dx + c * kPanel<F> + half, live != 0 ? g : Vec<F>{});
    }
  });
}

template <class F>
void gradient(const F* z, int64_t n, const PanelGradient<F>& given, F* dx) {
  if (given.tanh_scale) given.entropy ? gradient_of<F, true, true>(z, n, given, dx) : gradient_of<F, false, true>(z, n, given, dx);
  else given.entropy ? gradient_of<F, true, false>(z, n, given, dx) : gradient_of<F, false, false>(z, n, given, dx);
}

template <class F>
void scale(F* x, int64_t count, F factor) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

template <class F>
void lane_sums(const F* tile, int64_t n, F* out) {
  for (int64_t c = 0; c < n; ++c) out[c] += sum_lanes<F>(load(tile + c * kPanel<F>) + load(tile + c * kPanel<F> + kLanes<F>));
}

template <class F>
void add(const F* x, int64_t count, F* y) {
  for (int64_t i = 0; i < count; ++i) y[i] += x[i];
}

#define SPECS_LINEAR_TABLE(F)                                                                                                             \
  {kPanel<F>,   products<F>, over_rows<F>, over_columns<F>, scores<F>, maximum<F>,   subtract<F>, stats<F>, weights<F>, rescale<F>, gradient<F>, \
   scale<F>, lane_sums<F>, add<F>}
extern const LinearKernels<float> linear_kernels_float;
extern const LinearKernels<double> linear_kernels_double;
const LinearKernels<float> linear_kernels_float = SPECS_LINEAR_TABLE(float);
const LinearKernels<double> linear_kernels_double = SPECS_LINEAR_TABLE(double);
#undef SPECS_LINEAR_TABLE

}  // namespace SPECS_ISA
}  // namespace specs
