// The gradient of a weight, block by block, on CPU.

#pragma once

#include "linear_logprob_tiles.h"

namespace specs {

// A gradient [V, K] that is filled block by block.
template <class F>
class WeightGradient {
 public:
  WeightGradient(const MaybeTensor& out, int64_t V, int64_t K, int64_t lanes, bool accumulate)
      : data_(write<char>(out)), row_(out ? out->stride(0) : 0), V_(V), K_(K), padded_(divide_up(K, lanes) * lanes), accumulate_(accumulate) {
    if (!out) return;
    check_matrix(out, V, K, "a gradient");
    check_float<F>(*out, "a gradient");
    dtype_ = out->scalar_type();
    STD_TORCH_CHECK(!accumulate || dtype_ == kDtype<F>, "native linear_logprob: gradients in half precision cannot accumulate");
    direct_ = dtype_ == kDtype<F> && padded_ == K;
  }

  bool wanted() const { return data_; }
  // Whether every part of it must be complete before it is written: it is rounded once.
  bool whole() const { return data_ && dtype_ != kDtype<F>; }
  int64_t padded() const { return padded_; }
  int64_t room(int64_t shares) const { return data_ && (shares > 1 || !direct_) ? kBlockColumns * padded_ : 0; }

  // Makes room for sums that are rounded at the end: one for every share of the rows, or for all where chunks of rows follow each other.
  void share(const Tensor& like, int64_t shares, bool chunks) {
    if (data_ && (shares > 1 || (whole() && chunks))) copies_.emplace(like, shares * V_ * padded_);
  }

  // Where a block's products go, with the stride of its rows, and whether they join what is there.
  struct Place {
    F* data;
    int64_t stride;
    bool add;
  };
  Place place(int64_t share, Columns c, F* room, bool first_rows, bool first_group) const {
    if (copies_) return {copies_->data() + (share * V_ + c.first) * padded_, padded_, !(first_rows && first_group)};
    if (direct_) return {reinterpret_cast<F*>(data_) + c.first * row_, row_, accumulate_ || !(first_rows && first_group)};
    return {room, padded_, !first_group};
  }
  // After the last group of rows: what is in the room is rounded into place.
  void finish(Columns c, const F* room, bool first_rows) const {
    if (!copies_ && !direct_) round(c, room, accumulate_ || !first_rows);
  }
  // After the last row: the shares are added up.
  void reduce(const LinearKernels<F>& kernel, int64_t shares, Columns c) const {
    if (!copies_) return;
    F* sum = copies_->data() + c.first * padded_;
    for (int64_t s = 1; s < shares; ++s) kernel.add(sum + s * V_ * padded_, c.count * padded_, sum);
    round(c, sum, accumulate_);
  }

 private:
  void round(Columns c, const F* values, bool add) const {
    for (int64_t i = 0; i < c.count; ++i) {
      const F* from = values + i * padded_;
      char* to = data_ + (c.first + i) * row_ * bytes_of(dtype_);
      if (dtype_ == kDtype<F>) {
        F* out = reinterpret_cast<F*>(to);
        for (int64_t k = 0; k < K_; ++k) out[k] = add ? out[k] + from[k] : from[k];
      } else if constexpr (std::is_same_v<F, float>) {
        narrow(dtype_, from, K_, to);
      }
    }
  }

  char* data_;
  int64_t row_, V_, K_, padded_;
  bool accumulate_, direct_ = false;
  ScalarType dtype_ = kDtype<F>;
  std::optional<Workspace<F>> copies_;
};

}  // namespace specs
