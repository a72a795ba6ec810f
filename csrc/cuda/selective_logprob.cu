// selective_logprob from logits that exist: one read forward, one read and one write backward. The same quantities, in the same
// units, as kernels/specs_kernels/selective_logprob/triton.py; a candidate to replace it where it measures faster.
//
// One block per row. A thread takes runs of 16 bytes, UNROLL of them at a time, and keeps an online softmax (m, s, t) of
// its own: one rescale per UNROLL runs, and threads meet once per row. Which column a thread takes depends on the column
// only, never on where the row lies in memory, and partial results merge in a fixed order: results are deterministic and
// a row's bits do not depend on the batch. Rows that are not aligned to 16 bytes (an odd vocabulary) load the same runs
// element by element.
//
// Nothing here needs PyTorch: the entry points are C functions on device pointers.

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr float kLowest = -3.402823466e38f;  // a maximum starts here: not 0 (rows far below 0), not -inf (NaN differences)
constexpr float kFloor = -1e5f;  // bounds z - m where it meets exp(z - m) = 0: their product is 0, not NaN
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void from_float(float x, float& out) { out = x; }
__device__ void from_float(float x, __half& out) { out = __float2half_rn(x); }
__device__ void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// 16 bytes of logits.
template <typename T>
struct alignas(16) Run {
  static constexpr int kSize = 16 / sizeof(T);
  T data[kSize];
};

// x[0..kSize) from columns [column, column + kSize) of a row, -inf past its end.
template <typename T, bool kAligned>
__device__ void load_run(const T* row, int64_t column, int64_t vocab, float (&x)[Run<T>::kSize]) {
  if (kAligned && column + Run<T>::kSize <= vocab) {
    const Run<T> run = *reinterpret_cast<const Run<T>*>(row + column);
#pragma unroll
    for (int i = 0; i < Run<T>::kSize; ++i) x[i] = to_float(run.data[i]);
  } else {
#pragma unroll
    for (int i = 0; i < Run<T>::kSize; ++i) x[i] = column + i < vocab ? to_float(row[column + i]) : -INFINITY;
  }
}

template <typename T, bool kAligned>
__device__ void store_run(T* row, int64_t column, int64_t vocab, const float (&x)[Run<T>::kSize]) {
  Run<T> run;
#pragma unroll
  for (int i = 0; i < Run<T>::kSize; ++i) from_float(x[i], run.data[i]);
  if (kAligned && column + Run<T>::kSize <= vocab) {
    *reinterpret_cast<Run<T>*>(row + column) = run;
  } else {
#pragma unroll
    for (int i = 0; i < Run<T>::kSize; ++i) {
      if (column + i < vocab) row[column + i] = run.data[i];
    }
  }
}

// m = max x, s = sum 2^((x - m) scale), t = sum 2^((x - m) scale) (x - m), with scale = log2(e) / temperature.
struct State {
  float m = kLowest, s = 0.0f, t = 0.0f;
};

__device__ State merge(State a, State b, float scale) {
  State out;
  out.m = fmaxf(a.m, b.m);
  const float da = a.m - out.m, db = b.m - out.m;
  const float fa = exp2f(da * scale), fb = exp2f(db * scale);
  out.t = fa * (a.t + fmaxf(da, kFloor) * a.s) + fb * (b.t + fmaxf(db, kFloor) * b.s);
  out.s = fa * a.s + fb * b.s;
  return out;
}

// The state of the whole block, in every thread.
__device__ State merge_block(State state, float scale) {
  __shared__ State warps[kThreads / 32];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    State other;
    other.m = __shfl_down_sync(0xffffffffu, state.m, lane);
    other.s = __shfl_down_sync(0xffffffffu, state.s, lane);
    other.t = __shfl_down_sync(0xffffffffu, state.t, lane);
    state = merge(state, other, scale);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = state;
  __syncthreads();
  state = warps[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) state = merge(state, warps[warp], scale);
  return state;
}

// 1 / temperature; NaN unless the temperature is a finite number above 0, so that the row reports itself.
__device__ float inverse_temperature(const float* temperature, int64_t stride, int64_t row) {
  if (temperature == nullptr) return 1.0f;
  const float value = temperature[row * stride];
  return value > 0.0f && value < INFINITY ? 1.0f / value : NAN;
}

struct Forward {
  const void* logits;
  int64_t stride, vocab;
  const int64_t* target;
  const float* temperature;
  int64_t temperature_stride, ignore_index;
  float *logp, *entropy, *lse, *maximum, *log_total, *mean;
};

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) forward_kernel(Forward p) {
  const int64_t row = blockIdx.x;
  const int64_t label = p.target[row];
  if (label == p.ignore_index) {
    if (threadIdx.x == 0) {
      p.logp[row] = p.lse[row] = p.maximum[row] = p.log_total[row] = 0.0f;
      if (p.entropy != nullptr) p.entropy[row] = p.mean[row] = 0.0f;
    }
    return;
  }
  constexpr int kSize = Run<T>::kSize;
  const T* logits = static_cast<const T*>(p.logits) + row * p.stride;
  const float inverse = inverse_temperature(p.temperature, p.temperature_stride, row);
  const float scale = inverse * kLog2E;
  State state;
  for (int64_t start = 0; start < p.vocab; start += int64_t{kThreads} * kSize * kUnroll) {
    float x[kUnroll][kSize];
    float top = state.m;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      load_run<T, kAligned>(logits, start + (int64_t{u} * kThreads + threadIdx.x) * kSize, p.vocab, x[u]);
#pragma unroll
      for (int i = 0; i < kSize; ++i) top = fmaxf(top, x[u][i]);
    }
    const float change = state.m - top;
    const float factor = exp2f(change * scale);
    state.t = factor * (state.t + fmaxf(change, kFloor) * state.s);
    state.s *= factor;
    state.m = top;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float shifted = x[u][i] - top;
        const float power = exp2f(shifted * scale);
        state.s += power;
        state.t += power * fmaxf(shifted, kFloor);
      }
    }
  }
  state = merge_block(state, scale);
  if (threadIdx.x != 0) return;
  const float log_s = log2f(state.s) * kLn2;
  const bool known = label >= 0 && label < p.vocab;
  const float x_target = known ? to_float(logits[label]) : NAN;
  p.logp[row] = (x_target - state.m) * inverse - log_s;
  p.lse[row] = state.m * inverse + log_s;
  p.maximum[row] = state.m;
  p.log_total[row] = log_s;
  if (p.entropy != nullptr) {
    const float mean = state.t / state.s * inverse;
    p.entropy[row] = log_s - mean;
    p.mean[row] = mean;
  }
}

struct Backward {
  const void* logits;
  void* grad_logits;
  int64_t stride, grad_stride, vocab;
  const int64_t* target;
  const float* temperature;
  int64_t temperature_stride, ignore_index;
  const float *maximum, *log_total, *mean;
  const float *grad_logp, *grad_entropy, *grad_lse;
};

// dx_j = (p_j [(r - g) - q (z_j - E)] + g 1[j = target]) / temperature; grad_logits may be logits.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) backward_kernel(Backward p) {
  const int64_t row = blockIdx.x;
  const int64_t label = p.target[row];
  constexpr int kSize = Run<T>::kSize;
  const T* logits = static_cast<const T*>(p.logits) + row * p.stride;
  T* grad_logits = static_cast<T*>(p.grad_logits) + row * p.grad_stride;
  const float inverse = inverse_temperature(p.temperature, p.temperature_stride, row);
  const bool known = label >= 0 && label < p.vocab;
  const float g = known ? (p.grad_logp == nullptr ? 0.0f : p.grad_logp[row] * inverse) : NAN;
  const float q = p.grad_entropy == nullptr ? 0.0f : p.grad_entropy[row] * inverse;
  const float r = p.grad_lse == nullptr ? 0.0f : p.grad_lse[row] * inverse;
  const bool live = label != p.ignore_index && (g != 0.0f || q != 0.0f || r != 0.0f);
  const float scale = inverse * kLog2E;
  const float m = p.maximum[row];
  const float log2_s = p.log_total[row] * kLog2E;
  const float common = r - g + (p.grad_entropy == nullptr ? 0.0f : q * p.mean[row]);
  for (int64_t column = int64_t{threadIdx.x} * kSize; column < p.vocab; column += int64_t{kThreads} * kSize) {
    float x[kSize] = {};
    if (live) {
      load_run<T, kAligned>(logits, column, p.vocab, x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float shifted = x[i] - m;
        const float power = exp2f(shifted * scale - log2_s);
        x[i] = power * (common - q * (fmaxf(shifted, kFloor) * inverse));
        if (column + i == label) x[i] += g;
      }
    }
    store_run<T, kAligned>(grad_logits, column, p.vocab, x);
  }
}

bool aligned(const void* data, int64_t stride, size_t itemsize) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * static_cast<int64_t>(itemsize) % 16 == 0;
}

template <typename T>
cudaError_t run_forward(const Forward& p, int64_t rows, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(rows);
  if (aligned(p.logits, p.stride, sizeof(T))) {
    forward_kernel<T, true><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    forward_kernel<T, false><<<blocks, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t run_backward(const Backward& p, int64_t rows, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(rows);
  if (aligned(p.logits, p.stride, sizeof(T)) && aligned(p.grad_logits, p.grad_stride, sizeof(T))) {
    backward_kernel<T, true><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    backward_kernel<T, false><<<blocks, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

enum Dtype { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace

// dtype: 0 fp32, 1 fp16, 2 bf16. logits [rows, vocab], unit column stride, any row stride. target int64 [rows]. temperature: fp32
// with its stride (0 for one number), or null for 1. Outputs fp32 [rows]; entropy and mean both null, or neither; maximum (in
// units of the logits), log_total and mean are for the backward. Returns a cudaError_t.
extern "C" int specs_selective_logprob_forward(int dtype, const void* logits, int64_t stride, int64_t rows,
                                               int64_t vocab, const int64_t* target, const float* temperature,
                                               int64_t temperature_stride, int64_t ignore_index, float* logp,
                                               float* entropy, float* lse, float* maximum, float* log_total,
                                               float* mean, void* stream) {
  if (rows == 0) return cudaSuccess;
  if (rows < 0 || rows > 0x7fffffff || vocab <= 0 || (entropy == nullptr) != (mean == nullptr)) {
    return cudaErrorInvalidValue;
  }
  const Forward p{logits, stride,  vocab, target,  temperature, temperature_stride, ignore_index,
                  logp,   entropy, lse,   maximum, log_total,   mean};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case kFloat32: return run_forward<float>(p, rows, on);
    case kFloat16: return run_forward<__half>(p, rows, on);
    case kBFloat16: return run_forward<__nv_bfloat16>(p, rows, on);
    default: return cudaErrorInvalidValue;
  }
}

// grad_logits [rows, vocab] may be logits. Upstream gradients fp32 [rows], each null when there is none; grad_entropy needs mean.
extern "C" int specs_selective_logprob_backward(int dtype, const void* logits, int64_t stride, void* grad_logits,
                                                int64_t grad_stride, int64_t rows, int64_t vocab,
                                                const int64_t* target, const float* temperature,
                                                int64_t temperature_stride, int64_t ignore_index,
                                                const float* maximum, const float* log_total, const float* mean,
                                                const float* grad_logp, const float* grad_entropy,
                                                const float* grad_lse, void* stream) {
  if (rows == 0) return cudaSuccess;
  if (rows < 0 || rows > 0x7fffffff || vocab <= 0 || (grad_entropy != nullptr && mean == nullptr)) {
    return cudaErrorInvalidValue;
  }
  const Backward p{logits,       grad_logits, stride,    grad_stride, vocab,     target,       temperature, temperature_stride,
                   ignore_index, maximum,     log_total, mean,        grad_logp, grad_entropy, grad_lse};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case kFloat32: return run_backward<float>(p, rows, on);
    case kFloat16: return run_backward<__half>(p, rows, on);
    case kBFloat16: return run_backward<__nv_bfloat16>(p, rows, on);
    default: return cudaErrorInvalidValue;
  }
}
