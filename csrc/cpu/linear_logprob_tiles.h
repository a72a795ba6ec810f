// What the drivers of linear_logprob on CPU share: operands cut into blocks and panels, numbers per lane, and the plan of a call.

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

// The columns [first, first + count) of the vocabulary that one block, one task or one call takes.
struct Columns {
  int64_t first, count;
};

// [V, K] of any float dtype whose rows are had as F side by side. They are copied where they are not so, and where so many rows fall
// on one set of the cache that a micro-kernel would evict what it reads next.
template <class F>
class Weight {
 public:
  Weight(const Tensor& w, const char* name)
      : data_(static_cast<const char*>(w.const_data_ptr())), row_(w.stride(0)), dtype_(w.scalar_type()), V(w.size(0)), K(w.size(1)) {
    check_float<F>(w, name);
    check_matrix(w, V, K, name);
    direct_ = dtype_ == kDtype<F> && row_ * static_cast<int64_t>(sizeof(F)) % 2048 != 0;
    stride_ = direct_ ? row_ : divide_up(K * sizeof(F), 64) * 64 / sizeof(F) + 64 / sizeof(F) * (K * sizeof(F) % 128 == 0);
  }

  int64_t room() const { return direct_ ? 0 : kBlockColumns * stride_; }
  int64_t stride() const { return stride_; }

  const F* block(Columns c, F* room) const {
    if (direct_) return reinterpret_cast<const F*>(data_) + c.first * row_;
    for (int64_t i = 0; i < c.count; ++i) {
      const char* from = data_ + (c.first + i) * row_ * bytes_of(dtype_);
      if (dtype_ == kDtype<F>) std::memcpy(room + i * stride_, from, K * sizeof(F));
      else if constexpr (std::is_same_v<F, float>) widen(dtype_, from, K, room + i * stride_);
    }
    return room;
  }

 private:
  const char* data_;
  int64_t row_, stride_ = 0;
  ScalarType dtype_;
  bool direct_ = false;

 public:
  const int64_t V, K;
};

// A pair of factors of the products: rows [M, K] (hidden, or hidden A^T) and a weight [V, K] (the head's, or B).
template <class F>
struct Factors {
  const F* x;
  int64_t stride, K;
  Weight<F> weight;

  Factors(const Tensor& rows, const Tensor& w, const char* name) : x(read<F>(rows)), stride(rows.stride(0)), K(w.size(1)), weight(w, name) {
    STD_TORCH_CHECK(rows.scalar_type() == kDtype<F>, "native linear_logprob: rows must have the dtype of the statistics");
    check_matrix(rows, rows.size(0), K, "rows");
  }
};

// out[j * out_stride + i] = x[i * stride + j] for 4 x 4 numbers.
template <class F>
inline void transpose_4x4(const F* x, int64_t stride, F* out, int64_t out_stride) {
  if constexpr (sizeof(F) == 4) {
    typedef float Four __attribute__((vector_size(16)));
    typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
    typedef int32_t Index __attribute__((vector_size(16)));
    Four r[4];
    for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const Unaligned*>(x + i * stride);
    const Four a = __builtin_shuffle(r[0], r[1], Index{0, 4, 1, 5}), b = __builtin_shuffle(r[0], r[1], Index{2, 6, 3, 7});
    const Four c = __builtin_shuffle(r[2], r[3], Index{0, 4, 1, 5}), d = __builtin_shuffle(r[2], r[3], Index{2, 6, 3, 7});
    const Four t[4] = {
        __builtin_shuffle(a, c, Index{0, 1, 4, 5}), __builtin_shuffle(a, c, Index{2, 3, 6, 7}), __builtin_shuffle(b, d, Index{0, 1, 4, 5}),
        __builtin_shuffle(b, d, Index{2, 3, 6, 7})};
    for (int j = 0; j < 4; ++j) *reinterpret_cast<Unaligned*>(out + j * out_stride) = t[j];
  } else {
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 4; ++i) out[j * out_stride + i] = x[i * stride + j];
  }
}

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

// Lane by lane: panel[k][lane] of rows [first, first + count), zeros in the lanes behind.
template <class F>
void pack_lanes(const F* x, int64_t stride, int64_t K, int64_t first, int64_t count, int64_t lanes, F* panel) {
  if (count < lanes) std::fill(panel, panel + K * lanes, F(0));
  transpose(x + first * stride, stride, count, K, panel, lanes);
}

// The other way: out[row][k] = panel[k][row].
template <class F>
void unpack_lanes(const F* panel, int64_t K, int64_t count, int64_t lanes, F* out, int64_t stride) {
  transpose(panel, lanes, K, count, out, stride);
}

// The same rows for products over rows: slabs of `lanes` terms, slab[j][m][i] = x[m][j * lanes + i]; zeros behind the last term and row.
template <class F>
void pack_slabs(const F* x, int64_t stride, int64_t K, int64_t first, int64_t count, int64_t lanes, int64_t padded_rows, int64_t at, F* slabs) {
  for (int64_t j = 0; j * lanes < K; ++j)
    for (int64_t row = 0; row < lanes; ++row) {
      F* to = slabs + (j * padded_rows + at + row) * lanes;
      const int64_t terms = row < count ? std::min(lanes, K - j * lanes) : 0;
      if (terms > 0) std::memcpy(to, x + (first + row) * stride + j * lanes, terms * sizeof(F));
      std::fill(to + terms, to + lanes, F(0));
    }
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

// Products of one panel and one block in a tile.
template <class F>
void form_products(const LinearKernels<F>& kernel, int64_t n, const Factors<F>& factors, const F* block, const F* panel, F* tile, bool add) {
  kernel.products(n, factors.K, block, factors.weight.stride(), panel, tile, add);
}

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
