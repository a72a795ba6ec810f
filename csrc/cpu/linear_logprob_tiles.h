// What the drivers of linear_logprob on CPU share: checks, conversions, transposes, how columns are cut.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>

#include "dispatch.h"
#include "linear_logprob.h"
#include "row_pass.h"
#include "workers.h"

namespace specs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <class F>
const LinearKernels<F>& linear_kernels() {
  if constexpr (sizeof(F) == 4) return SPECS_BY_ISA(linear_kernels_float);
  else return SPECS_BY_ISA(linear_kernels_double);
}

// Null where the processor, or the limit set for tests, has no such instruction.
inline const Bfloat16Kernels* bfloat16_gemms() {
#if defined(SPECS_X86)
  if (current_isa() == Isa::avx512_bf16) return &avx512bf16::bfloat16_kernels;
#endif
  return nullptr;
}

inline const HalfKernels& half_conversions() { return SPECS_BY_ISA(half_kernels); }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t bytes_of(ScalarType dtype) { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }

inline void widen(ScalarType dtype, const void* x, int64_t count, float* out) {
  const auto* bits = static_cast<const uint16_t*>(x);
  dtype == ScalarType::Half ? half_conversions().from_float16(bits, count, out) : half_conversions().from_bfloat16(bits, count, out);
}

inline void narrow(ScalarType dtype, const float* x, int64_t count, void* out) {
  auto* bits = static_cast<uint16_t*>(out);
  dtype == ScalarType::Half ? half_conversions().to_float16(x, count, bits) : half_conversions().to_bfloat16(x, count, bits);
}

template <class F>
constexpr ScalarType kDtype = sizeof(F) == 4 ? ScalarType::Float : ScalarType::Double;

// Whether a tensor can be read or written as F: F itself, or half precision where F is float.
template <class F>
void check_float(const Tensor& x, const char* name) {
  const ScalarType dtype = x.scalar_type();
  const bool half = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(dtype == kDtype<F> || (half && sizeof(F) == 4), "native linear_logprob: ", name, " has a dtype that does not go with the statistics");
}

inline void check_matrix(const MaybeTensor& x, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(
      !x || (x->dim() == 2 && x->size(0) == rows && x->size(1) == columns && (x->stride(1) == 1 || columns <= 1)), "native linear_logprob: ", name,
      " must be a matrix of the right shape with contiguous rows");
}

inline void check_vector(const MaybeTensor& x, int64_t count, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(
      !x || (x->dim() == 1 && x->size(0) == count && x->scalar_type() == dtype && (count <= 1 || x->stride(0) == 1)), "native linear_logprob: ", name,
      " must be a contiguous vector of the right length and dtype");
}

template <class T>
const T* read(const MaybeTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

template <class T>
T* write(const MaybeTensor& x) {
  return x ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
}

// Workspace of a call, from PyTorch's allocator, whose records then show it; not initialised.
template <class F>
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t count) : tensor_(torch::stable::new_empty(like, {count}, kDtype<F>)), data_(static_cast<F*>(tensor_.mutable_data_ptr())) {}
  F* data() const { return data_; }

 private:
  Tensor tensor_;
  F* data_;
};

// The columns [first, first + count) of the vocabulary that one block, one task or one call takes.
struct Columns {
  int64_t first, count;
};

// Four of the eight numbers of two vectors.
#if defined(__clang__) || __GNUC__ >= 12
#define SPECS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t ShuffleIndex __attribute__((vector_size(16)));
#define SPECS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ShuffleIndex{__VA_ARGS__})
#endif

// out[j * out_stride + i] = x[i * stride + j] for 4 x 4 numbers.
template <class F>
inline void transpose_4x4(const F* x, int64_t stride, F* out, int64_t out_stride) {
  if constexpr (sizeof(F) == 4) {
    typedef float Four __attribute__((vector_size(16)));
    typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
    Four r[4];
    for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const Unaligned*>(x + i * stride);
    const Four a = SPECS_SHUFFLE(r[0], r[1], 0, 4, 1, 5), b = SPECS_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
    const Four c = SPECS_SHUFFLE(r[2], r[3], 0, 4, 1, 5), d = SPECS_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
    const Four t[4] = {
        SPECS_SHUFFLE(a, c, 0, 1, 4, 5), SPECS_SHUFFLE(a, c, 2, 3, 6, 7), SPECS_SHUFFLE(b, d, 0, 1, 4, 5),
        SPECS_SHUFFLE(b, d, 2, 3, 6, 7)};
    for (int j = 0; j < 4; ++j) *reinterpret_cast<Unaligned*>(out + j * out_stride) = t[j];
  } else {
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 4; ++i) out[j * out_stride + i] = x[i * stride + j];
  }
}
#undef SPECS_SHUFFLE

// out[j * out_stride + i] = x[i * stride + j] for i < rows, j < columns.
template <class F>
void transpose(const F* x, int64_t stride, int64_t rows, int64_t columns, F* out, int64_t out_stride) {
  int64_t j = 0;
  for (; j + 4 <= columns; j += 4) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) transpose_4x4(x + i * stride + j, stride, out + j * out_stride + i, out_stride);
    for (; i < rows; ++i)
      for (int64_t k = j; k < j + 4; ++k) out[k * out_stride + i] = x[i * stride + k];
  }
  for (; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) out[j * out_stride + i] = x[i * stride + j];
}

// How scores follow from products, for all rows.
template <class F>
struct Head {
  F factor, cap, inverse;
  const F *bias, *inverses;

  Head(int64_t V, int64_t M, double factor_, const MaybeTensor& bias_, double softcap, const MaybeTensor& inverses_, double inverse_)
      : factor(static_cast<F>(factor_)), cap(static_cast<F>(softcap)), inverse(static_cast<F>(inverse_)), bias(read<F>(bias_)), inverses(read<F>(inverses_)) {
    check_vector(bias_, V, kDtype<F>, "bias");
    check_vector(inverses_, M, kDtype<F>, "inverse_temperature");
    STD_TORCH_CHECK(softcap >= 0, "native linear_logprob: softcap must be at least 0 (0: none)");
  }

  bool plain() const { return factor == 1 && cap == 0 && !bias && !inverses && inverse == 1; }
  F inverse_of(int64_t row) const { return inverses ? inverses[row] : inverse; }
  F tanh_scale(int64_t row) const { return cap > 0 ? 1 / (cap * inverse_of(row)) : F(0); }
  PanelScores<F> scores(Columns c, const F* inverse_lanes) const { return {factor, bias ? bias + c.first : nullptr, cap, inverse_lanes}; }
};

// What was kept of the scores of the first rows, [panel][V][lanes]: products where its dtype is that of the statistics, otherwise
// scores minus an offset per row and block, offsets [blocks][rows of the offsets].
struct CacheLayout {
  static int64_t at(int64_t V, int64_t lanes, int64_t row, int64_t column) { return (row / lanes * V + column) * lanes + row % lanes; }
};

// Columns in consecutive segments of whole blocks. Depends on the vocabulary only.
struct Segments {
  int64_t V, blocks, per_segment, count;

  explicit Segments(int64_t vocab, int64_t most = 32, int64_t fewest_blocks = 4) : V(vocab), blocks(divide_up(vocab, kBlockColumns)) {
    per_segment = std::max(std::min(fewest_blocks, blocks), divide_up(blocks, most));
    count = divide_up(blocks, per_segment);
  }
  int64_t first_block(int64_t segment) const { return segment * per_segment; }
  int64_t end_block(int64_t segment) const { return std::min(blocks, (segment + 1) * per_segment); }
  Columns block(int64_t index) const { return {index * kBlockColumns, std::min(kBlockColumns, V - index * kBlockColumns)}; }
};

}  // namespace specs
