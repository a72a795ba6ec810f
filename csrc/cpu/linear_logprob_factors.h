// The GEMMs of linear_logprob on CPU as its drivers see them: one pair of factors, in numbers or in pairs of bfloat16.

#pragma once

#include <vector>

#include "linear_logprob_tiles.h"

namespace specs {

// dx (or the weights of a sum) of one panel and one block: numbers [n][lanes], and where factors are bfloat16 the same as pairs of lanes
// [n][lanes / 2] and pairs of columns [ceil(n / 2)][lanes].
template <class F>
struct Tile {
  F* numbers;
  uint32_t *by_rows, *by_columns;

  // Numbers of 4 bytes that a tile takes.
  static int64_t size(int64_t lanes, bool paired) { return kBlockColumns * lanes * (paired ? 2 : 1); }
  static Tile at(F* data, int64_t lanes, bool paired) {
    auto* words = reinterpret_cast<uint32_t*>(data + kBlockColumns * lanes);
    return {data, paired ? words : nullptr, paired ? words + kBlockColumns * lanes / 2 : nullptr};
  }

  void pair_lanes(int64_t n, int64_t lanes) const {
    if constexpr (sizeof(F) == 4)
      if (by_rows) narrow(ScalarType::BFloat16, numbers, n * lanes, by_rows);
  }
  void pair_columns(int64_t n, int64_t lanes) const {
    if constexpr (sizeof(F) == 4)
      if (by_columns)
        for (int64_t c = 0; c < n; c += 2)
          bfloat16_gemms()->pair(numbers + c * lanes, c + 1 < n ? numbers + (c + 1) * lanes : nullptr, lanes, by_columns + c / 2 * lanes);
  }
};

// Rows [M, K] (hidden, or hidden A^T) and a weight [V, K] of any float dtype (the head's, or B). Where both hold bfloat16 and the
// processor multiplies its pairs, so do the GEMMs; otherwise a weight in half precision is widened block by block.
template <class F>
class Factors {
 public:
  // exact: rows hold numbers of the weight's dtype, widened.
  Factors(const Tensor& rows, const Tensor& w, const char* name, bool exact)
      : V(w.size(0)), K(w.size(1)), x_(read<F>(rows)), x_stride_(rows.stride(0)), data_(static_cast<const char*>(w.const_data_ptr())), row_(w.stride(0)),
        dtype_(w.scalar_type()), lanes_(linear_kernels<F>().lanes), kernel_(&linear_kernels<F>()) {
    STD_TORCH_CHECK(rows.scalar_type() == kDtype<F>, "native linear_logprob: rows must have the dtype of the statistics");
    check_matrix(rows, rows.size(0), K, "rows");
    check_float<F>(w, name);
    check_matrix(w, V, K, name);
    if (exact && dtype_ == ScalarType::BFloat16 && K % 2 == 0 && row_ % 2 == 0 && K > 0) pairs_ = bfloat16_gemms();
    // So many rows of some widths fall on one set of the cache that a micro-kernel would evict what it reads next: these are copied.
    direct_ = (dtype_ == kDtype<F> || pairs_) && row_ * bytes_of(dtype_) % 2048 != 0;
    const int64_t terms = packed();
    stride_ = direct_ ? (pairs_ ? row_ / 2 : row_) : divide_up(terms * sizeof(F), 64) * 64 / sizeof(F) + (terms * sizeof(F) % 128 == 0 ? 64 / sizeof(F) : 0);
  }

  const int64_t V, K;
  bool paired() const { return pairs_; }

  // Terms, or pairs of them, of a lane of a packed panel.
  int64_t packed() const { return pairs_ ? K / 2 : K; }
  // panel[k][lane] of rows [first, first + count), zeros in the lanes behind.
  void pack(int64_t first, int64_t count, F* panel) const {
    if (count < lanes_) std::fill(panel, panel + packed() * lanes_, F(0));
    const F* rows = x_ + first * x_stride_;
    if constexpr (sizeof(F) == 4)
      if (pairs_) {
        const Buffer<F> halves(count * packed());
        for (int64_t i = 0; i < count; ++i) narrow(ScalarType::BFloat16, rows + i * x_stride_, K, halves.data() + i * packed());
        return transpose(halves.data(), packed(), count, packed(), panel, lanes_);
      }
    transpose(rows, x_stride_, count, K, panel, lanes_);
  }

  // The same rows for sums over rows, in slabs of `lanes` terms: slab[j][m][i] = x[m][j * lanes + i], zeros behind the last term and row.
  // Where paired, slab[j][m / 2][i] holds rows m and m + 1.
  int64_t slabs() const { return divide_up(K, lanes_); }
  int64_t slab_rows(int64_t rows) const { return pairs_ ? rows / 2 : rows; }
  void pack_slabs(int64_t first, int64_t count, int64_t padded_rows, int64_t at, F* slabs_data) const {
    for (int64_t j = 0; j < slabs(); ++j) {
      F* to = slabs_data + (j * slab_rows(padded_rows) + slab_rows(at)) * lanes_;
      const int64_t terms = std::min(lanes_, K - j * lanes_), step = pairs_ ? 2 : 1;
      for (int64_t row = 0; row < lanes_; row += step, to += lanes_) {
        const F* from = x_ + (first + row) * x_stride_ + j * lanes_;
        const int64_t filled = row < count ? terms : 0;
        if constexpr (sizeof(F) == 4)
          if (pairs_ && filled) pairs_->pair(from, row + 1 < count ? from + x_stride_ : nullptr, terms, reinterpret_cast<uint32_t*>(to));
        if (!pairs_ && filled) std::memcpy(to, from, terms * sizeof(F));
        std::fill(to + filled, to + lanes_, F(0));
      }
    }
  }

  // The rows of the weight that belong to some columns: where they lie, or in a worker's room.
  struct Block {
    const F* rows;         // [n][terms or pairs], `stride` apart
    const uint32_t* pairs;  // [ceil(n / 2)][K], pairs of columns, where they are wanted
  };
  int64_t stride() const { return stride_; }
  int64_t room() const { return (direct_ ? 0 : kBlockColumns * stride_) + (pairs_ ? divide_up(kBlockColumns, 2) * K : 0); }
  Block block(Columns c, bool pair_columns, F* room) const {
    const char* from = data_ + c.first * row_ * bytes_of(dtype_);
    const F* rows = reinterpret_cast<const F*>(from);
    if (!direct_) {
      for (int64_t i = 0; i < c.count; ++i) {
        const char* row = from + i * row_ * bytes_of(dtype_);
        if (pairs_ || dtype_ == kDtype<F>) std::memcpy(room + i * stride_, row, K * bytes_of(dtype_));
        else if constexpr (std::is_same_v<F, float>) widen(dtype_, row, K, room + i * stride_);
      }
      rows = room;
      room += kBlockColumns * stride_;
    }
    if (!pairs_ || !pair_columns) return {rows, nullptr};
    auto* zipped = reinterpret_cast<uint32_t*>(room);
    const auto* bits = reinterpret_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < c.count; i += 2) pairs_->zip(bits + i * row_, i + 1 < c.count ? bits + (i + 1) * row_ : nullptr, K, zipped + i / 2 * K);
    return {rows, zipped};
  }

  // tile[c][lane] (+)= products of the block and a packed panel
  void products(int64_t n, const Block& block, const F* panel, F* tile, bool add) const {
    if constexpr (sizeof(F) == 4)
      if (pairs_) return pairs_->products(n, packed(), words(block.rows), stride_, words(panel), tile, add);
    kernel_->products(n, K, block.rows, stride_, panel, tile, add);
  }
  // out[k][lane] (+)= sum over the columns of weight[c][k] tile[c][lane]
  void over_columns(int64_t n, const Block& block, const Tile<F>& tile, F* out, bool add) const {
    if constexpr (sizeof(F) == 4)
      if (pairs_) return pairs_->over_columns(K, divide_up(n, 2), block.pairs, K, tile.by_columns, out, add);
    kernel_->over_columns(K, n, block.rows, stride_, tile.numbers, out, add);
  }
  // C[c][j] (+)= sum over panels and lanes of tile[c][lane] x[row][j], for the `lanes` terms of one slab from panel `first` on
  void over_rows(int64_t n, int64_t panels, const Tile<F>& tiles, int64_t tile_stride, const F* slab, int64_t first, F* C, int64_t stride, bool add) const {
    const F* rows = slab + slab_rows(first * lanes_) * lanes_;
    if constexpr (sizeof(F) == 4)
      if (pairs_) return pairs_->over_rows(n, panels, tiles.by_rows, tile_stride, words(rows), C, stride, add);
    kernel_->over_rows(n, panels, tiles.numbers, tile_stride, rows, C, stride, add);
  }

 private:
  static const uint32_t* words(const F* x) { return reinterpret_cast<const uint32_t*>(x); }

  const F* x_;
  int64_t x_stride_;
  const char* data_;
  int64_t row_, stride_ = 0;
  ScalarType dtype_;
  int64_t lanes_;
  const LinearKernels<F>* kernel_;
  const Bfloat16Kernels* pairs_ = nullptr;
  bool direct_ = false;
};

// The factors of a call: hidden and the head's weight, and where there is a low-rank addition its two.
template <class F>
std::vector<Factors<F>> factors_of(const Tensor& hidden, const Tensor& weight, const MaybeTensor& low, const MaybeTensor& lora, const Tensor& target) {
  const int64_t M = target.size(0), V = weight.size(0);
  STD_TORCH_CHECK(low.has_value() == lora.has_value(), "native linear_logprob: low and lora go together");
  std::vector<Factors<F>> factors;
  factors.emplace_back(hidden, weight, "weight", true);
  if (low) factors.emplace_back(*low, *lora, "lora_B", false);
  for (const auto& f : factors) STD_TORCH_CHECK(f.V == V, "native linear_logprob: lora_B must have a row per column");
  STD_TORCH_CHECK(hidden.size(0) == M && (!low || low->size(0) == M), "native linear_logprob: rows and targets differ in number");
  check_vector(target, M, ScalarType::Long, "target");
  return factors;
}

// A cache whose last row that is used is `last`, and its offsets where it holds shifted scores.
template <class F>
void check_cache(const MaybeTensor& cache, const MaybeTensor& offsets, int64_t V, int64_t last) {
  const int64_t P = linear_kernels<F>().lanes;
  STD_TORCH_CHECK(cache && cache->is_contiguous() && cache->numel() >= (last / P + 1) * P * V, "native linear_logprob: the cache is too small, or has strides");
  check_float<F>(*cache, "the cache");
  if (cache->scalar_type() == kDtype<F>) return;
  STD_TORCH_CHECK(offsets.has_value(), "native linear_logprob: a cache in half precision needs offsets");
  check_matrix(offsets, divide_up(V, kBlockColumns), offsets->size(1), "offsets");
  STD_TORCH_CHECK(offsets->scalar_type() == kDtype<F> && offsets->size(1) > last, "native linear_logprob: offsets have the wrong dtype or length");
}

}  // namespace specs
