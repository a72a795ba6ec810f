// The row passes of selective_logprob on CPU: checks, threads, and how a row is cut.
//
// A task is a few rows. A row goes through the first-level cache in pieces of kPieceColumns, merged in order, so a row's result depends on
// its values only. Rows in half precision or with a stride between columns are widened piece by piece into a buffer of the worker, which
// also holds scores where they differ from the logits.

#include "row_pass.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>

#include "dispatch.h"
#include "workers.h"

namespace specs {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kPieceColumns = 2048;
constexpr int64_t kElementsPerTask = 1 << 15;

template <class F>
const RowPassKernels<F>& kernels() {
  if constexpr (sizeof(F) == 4) return SPECS_BY_ISA(row_pass_kernels_float);
  else return SPECS_BY_ISA(row_pass_kernels_double);
}

const HalfKernels& halves() { return SPECS_BY_ISA(half_kernels); }

int64_t size_of(ScalarType dtype) { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }

// A matrix of any float dtype and strides whose pieces of rows are read or written as F, through a buffer where need be.
template <class F>
class Matrix {
 public:
  Matrix(const Tensor& x, bool writable)
      : data_(writable ? static_cast<char*>(x.mutable_data_ptr()) : static_cast<char*>(const_cast<void*>(x.const_data_ptr()))),
        stride_row_(x.stride(0)),
        stride_column_(x.size(1) == 1 ? 1 : x.stride(1)),
        dtype_(x.scalar_type()),
        direct_(size_of(dtype_) == sizeof(F) && stride_column_ == 1) {}

  F* at(int64_t row, int64_t column) const { return reinterpret_cast<F*>(raw(row, column)); }

  const F* read(int64_t row, int64_t column, int64_t count, F* buffer) const {
    if (direct_) return at(row, column);
    const char* from = raw(row, column);
    if (size_of(dtype_) == sizeof(F)) {
      const F* x = reinterpret_cast<const F*>(from);
      for (int64_t i = 0; i < count; ++i) buffer[i] = x[i * stride_column_];
    } else if constexpr (std::is_same_v<F, float>) {
      // Chunks small enough for the stack hold a strided row's numbers side by side.
      const uint16_t* x = reinterpret_cast<const uint16_t*>(from);
      const auto widen = dtype_ == ScalarType::Half ? halves().from_float16 : halves().from_bfloat16;
      if (stride_column_ == 1) {
        widen(x, count, buffer);
      } else {
        uint16_t some[kChunk];
        for (int64_t begin = 0; begin < count; begin += kChunk) {
          const int64_t end = std::min(count, begin + kChunk);
          for (int64_t i = begin; i < end; ++i) some[i - begin] = x[i * stride_column_];
          widen(some, end - begin, buffer + begin);
        }
      }
    }
    return buffer;
  }

  // values: what read() or room() gave, or a buffer.
  void write(int64_t row, int64_t column, int64_t count, const F* values) const {
    char* to = raw(row, column);
    if (size_of(dtype_) == sizeof(F)) {
      F* x = reinterpret_cast<F*>(to);
      if (x == values) return;
      for (int64_t i = 0; i < count; ++i) x[i * stride_column_] = values[i];
    } else if constexpr (std::is_same_v<F, float>) {
      uint16_t* x = reinterpret_cast<uint16_t*>(to);
      const auto narrow = dtype_ == ScalarType::Half ? halves().to_float16 : halves().to_bfloat16;
      if (stride_column_ == 1) {
        narrow(values, count, x);
      } else {
        uint16_t some[kChunk];
        for (int64_t begin = 0; begin < count; begin += kChunk) {
          const int64_t end = std::min(count, begin + kChunk);
          narrow(values + begin, end - begin, some);
          for (int64_t i = begin; i < end; ++i) x[i * stride_column_] = some[i - begin];
        }
      }
    }
  }

  // Where to form a piece before write(): its own place, or the buffer.
  F* room(int64_t row, int64_t column, F* buffer) const { return direct_ ? at(row, column) : buffer; }

  void zero(int64_t row, int64_t count, F* buffer) const {
    for (int64_t begin = 0; begin < count; begin += kPieceColumns) {
      const int64_t piece = std::min(count - begin, kPieceColumns);
      F* values = room(row, begin, buffer);
      std::fill(values, values + piece, F(0));
      write(row, begin, piece, values);
    }
  }

 private:
  static constexpr int64_t kChunk = 512;
  char* raw(int64_t row, int64_t column) const { return data_ + (row * stride_row_ + column * stride_column_) * size_of(dtype_); }

  char* data_;
  int64_t stride_row_, stride_column_;
  ScalarType dtype_;
  bool direct_;
};

// [R] numbers of any stride, or one for all rows.
template <class T>
struct Vector {
  const T* data = nullptr;
  int64_t stride = 0;
  T common{};

  Vector(const MaybeTensor& x, T otherwise) : common(otherwise) {
    if (!x) return;
    data = static_cast<const T*>(x->const_data_ptr());
    stride = x->stride(0);
  }
  T operator[](int64_t row) const { return data ? data[row * stride] : common; }
};

template <class F>
F* data(const Tensor& x) {
  return static_cast<F*>(x.mutable_data_ptr());
}

bool is_float(const Tensor& x) {
  const ScalarType t = x.scalar_type();
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16;
}

// The Python side passes what row_pass.py promises; these hold what memory safety needs.
void check_matrix(const Tensor& x, int64_t rows, int64_t columns, ScalarType arithmetic, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns && is_float(x), "native row pass: ", name, " must be a float matrix like x");
  STD_TORCH_CHECK(
      x.scalar_type() == arithmetic || (arithmetic == ScalarType::Float && x.scalar_type() != ScalarType::Double), "native row pass: ", name,
      " must have the dtype of the statistics, or half precision where they are float32");
}

void check_vector(const MaybeTensor& x, int64_t count, ScalarType dtype, const char* name, bool contiguous = false) {
  STD_TORCH_CHECK(
      !x || (x->dim() == 1 && x->size(0) == count && x->scalar_type() == dtype && (!contiguous || x->is_contiguous())), "native row pass: ", name,
      " has the wrong length, dtype or strides");
}

void check_rows(const Tensor& x, const Tensor& target, const MaybeTensor& inverse, ScalarType arithmetic) {
  STD_TORCH_CHECK(arithmetic == ScalarType::Float || arithmetic == ScalarType::Double, "native row pass: statistics must be float32 or float64");
  STD_TORCH_CHECK(x.dim() == 2, "native row pass: x must be a matrix");
  check_matrix(x, x.size(0), x.size(1), arithmetic, "x");
  check_vector(target, x.size(0), ScalarType::Long, "target");
  check_vector(inverse, x.size(0), arithmetic, "inverse_temperature");
}

template <class F>
struct State {
  F *maximum, *total, *weighted, *target;
};

// Sums of some columns around `top`, the maximum with them, join the state, which is empty where `fresh`.
template <class F>
void merge(const State<F>& state, int64_t row, bool fresh, F top, ScoreSums<F> sums) {
  if (!fresh) {
    const F shift = state.maximum[row] - top, scale = std::exp(shift);
    if (state.weighted) sums.weighted += scale * (state.weighted[row] + (shift < kFloor ? kFloor : shift) * state.total[row]);
    sums.total += scale * state.total[row];
  }
  state.maximum[row] = top;
  state.total[row] = sums.total;
  if (state.weighted) state.weighted[row] = sums.weighted;
}

// Whether logits are scores as they are.
template <class F>
bool plain(const Vector<F>& inverse) {
  return !inverse.data && inverse.common == 1;
}

template <class F>
void stats(const Tensor& x, const Vector<int64_t>& target, const Vector<F>& inverse, const State<F>& state) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const Matrix<F> from(x, false);
  const int64_t step = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, columns));
  const RowPassKernels<F>& kernel = kernels<F>();
  run_tasks((rows + step - 1) / step, [&] {
    Buffer<F> buffer(std::min(columns, kPieceColumns));
    return [&, buffer = std::move(buffer)](int64_t task) {
      for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
        if (target[row] == kSkipRow) {
          // What is left of it enters a logarithm as a number.
          state.maximum[row] = state.target[row] = 0;
          state.total[row] = 1;
          if (state.weighted) state.weighted[row] = 0;
          continue;
        }
        for (int64_t begin = 0; begin < columns; begin += kPieceColumns) {
          const int64_t count = std::min(columns - begin, kPieceColumns), place = target[row] - begin;
          const F* z = from.read(row, begin, count, buffer.data());
          F top;
          if (plain(inverse)) {
            top = kernel.maximum(z, count);
          } else {
            top = kernel.scores(z, inverse[row], count, buffer.data());
            z = buffer.data();
          }
          if (top < std::numeric_limits<F>::lowest()) top = std::numeric_limits<F>::lowest();
          if (place >= 0 && place < count) state.target[row] = z[place];
          const F old = begin == 0 ? top : state.maximum[row], all = old > top || std::isnan(old) ? old : top;
          merge(state, row, begin == 0, all, kernel.sums(z, count, all, state.weighted != nullptr));
        }
      }
    };
  });
}

template <class F>
struct Upstream {
  Vector<F> maximum, log_total, base, entropy, target;
};

template <class F>
void gradients(const Tensor& x, const Vector<int64_t>& target, const Vector<F>& inverse, const Upstream<F>& upstream, const Tensor& dx) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const Matrix<F> from(x, false), to(dx, true);
  const int64_t step = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, columns));
  const RowPassKernels<F>& kernel = kernels<F>();
  run_tasks((rows + step - 1) / step, [&] {
    Buffer<F> buffer(std::min(columns, kPieceColumns));
    return [&, buffer = std::move(buffer)](int64_t task) {
      for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
        const F q = upstream.entropy[row], g = upstream.target[row];
        if (target[row] == kSkipRow || (upstream.base[row] == 0 && q == 0 && g == 0)) {
          to.zero(row, columns, buffer.data());
          continue;
        }
        const F scale = inverse[row] * std::exp(-upstream.log_total[row]);
        const RowGradient<F> gradient{upstream.maximum[row], upstream.base[row] * scale, q * scale, upstream.entropy.data != nullptr};
        for (int64_t begin = 0; begin < columns; begin += kPieceColumns) {
          const int64_t count = std::min(columns - begin, kPieceColumns), place = target[row] - begin;
          const F* z = from.read(row, begin, count, buffer.data());
          if (!plain(inverse)) {
            kernel.scores(z, inverse[row], count, buffer.data());
            z = buffer.data();
          }
          F* out = to.room(row, begin, buffer.data());
          kernel.gradient(z, count, gradient, out);
          if (place >= 0 && place < count) out[place] += g * inverse[row];
          to.write(row, begin, count, out);
        }
      }
    };
  });
}

void row_pass_stats(
    Tensor x, Tensor target, MaybeTensor inverse_temperature, double inverse, Tensor maximum, Tensor total, MaybeTensor weighted, Tensor target_score) {
  const ScalarType arithmetic = maximum.scalar_type();
  check_rows(x, target, inverse_temperature, arithmetic);
  for (const MaybeTensor& vector : {MaybeTensor(maximum), MaybeTensor(total), weighted, MaybeTensor(target_score)})
    check_vector(vector, x.size(0), arithmetic, "the state", true);
  const auto run = [&](auto zero) {
    using F = decltype(zero);
    stats<F>(
        x, Vector<int64_t>(target, 0), Vector<F>(inverse_temperature, static_cast<F>(inverse)),
        State<F>{data<F>(maximum), data<F>(total), weighted ? data<F>(*weighted) : nullptr, data<F>(target_score)});
  };
  if (arithmetic == ScalarType::Double) run(0.0);
  else run(0.0f);
}

void row_pass_gradients(
    Tensor x, Tensor target, MaybeTensor inverse_temperature, double inverse, Tensor maximum, Tensor log_total, Tensor base, MaybeTensor entropy,
    MaybeTensor target_gradient, Tensor dx) {
  const ScalarType arithmetic = maximum.scalar_type();
  check_rows(x, target, inverse_temperature, arithmetic);
  for (const MaybeTensor& vector : {MaybeTensor(maximum), MaybeTensor(log_total), MaybeTensor(base), entropy, target_gradient})
    check_vector(vector, x.size(0), arithmetic, "the gradients");
  check_matrix(dx, x.size(0), x.size(1), arithmetic, "dx");
  const auto run = [&](auto zero) {
    using F = decltype(zero);
    gradients<F>(
        x, Vector<int64_t>(target, 0), Vector<F>(inverse_temperature, static_cast<F>(inverse)),
        Upstream<F>{{maximum, F(0)}, {log_total, F(0)}, {base, F(0)}, {entropy, F(0)}, {target_gradient, F(0)}}, dx);
  };
  if (arithmetic == ScalarType::Double) run(0.0);
  else run(0.0f);
}

}  // namespace
}  // namespace specs

STABLE_TORCH_LIBRARY_FRAGMENT(specs_kernels, m) {
  m.def(
      "row_pass_stats(Tensor x, Tensor target, Tensor? inverse_temperature, float inverse, Tensor(a!) maximum, Tensor(b!) total, "
      "Tensor(c!)? weighted, Tensor(d!) target_score) -> ()");
  m.def(
      "row_pass_gradients(Tensor x, Tensor target, Tensor? inverse_temperature, float inverse, Tensor maximum, Tensor log_total, Tensor base, "
      "Tensor? entropy, Tensor? target_gradient, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(specs_kernels, CPU, m) {
  m.impl("row_pass_stats", TORCH_BOX(&specs::row_pass_stats));
  m.impl("row_pass_gradients", TORCH_BOX(&specs::row_pass_gradients));
}
