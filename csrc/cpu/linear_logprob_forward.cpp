// Statistics of log-probs from hidden states and a head on CPU; with them, where asked for, a cache of the scores or the frozen head's sums.
//
// A task is one segment of the vocabulary for one group of panels: a block of the weight is fetched once for the whole group, its products
// with one panel are formed in the first-level cache and taken into the panel's statistics there. No score goes to memory unless it is
// kept. Segments are merged in their order, so nothing depends on the number of threads or on which rows come together.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "linear_logprob_factors.h"

namespace specs {
namespace {

constexpr int64_t kGroupRows = 512;
constexpr int64_t kRoomBytes = 64 << 20;      // for packed rows and the sums of all segments; more rows go in chunks
constexpr int64_t kSmallRoomBytes = 8 << 20;  // for packed rows alone: they stay in the shared cache

template <class F>
struct Outputs {
  F *maximum, *total, *weighted, *target;
  // Kept scores of the first `cached` rows.
  char* cache;
  ScalarType cache_dtype;
  int64_t cached;
  F* offsets;
  int64_t offsets_stride;
  // Sums of exp(z - m) slope W over all columns but the target's, and of that times z - m; [M, width].
  F *sums, *second;
  int64_t width;
};

template <class F>
class Forward {
 public:
  Forward(const Tensor& like, std::vector<Factors<F>> factors, const Head<F>& head, const int64_t* target, int64_t rows, const Outputs<F>& out)
      : like_(like), kernel_(linear_kernels<F>()), P_(kernel_.lanes), factors_(std::move(factors)), head_(head), target_(target), rows_(rows), out_(out),
        segments_(factors_[0].V) {
    for (const auto& f : factors_) {
      terms_ += f.K;
      packed_terms_ += f.packed();
      paired_ |= f.paired();
    }
  }

  void run() {
    const int64_t per_row = std::max<int64_t>(1, terms_) * sizeof(F) * (1 + (out_.sums ? segments_.count * (out_.second ? 2 : 1) : 0));
    const int64_t chunk = std::max<int64_t>(128, (out_.sums ? kRoomBytes : kSmallRoomBytes) / per_row / P_ * P_);
    const int64_t lanes = divide_up(std::min(chunk, rows_), P_) * P_, all_sums = segments_.count * lanes * terms_;
    const Workspace<F> packed(like_, lanes * packed_terms_), state(like_, segments_.count * 3 * lanes);
    const Workspace<F> sums(like_, out_.sums ? all_sums : 0), second(like_, out_.second ? all_sums : 0);
    packed_ = packed.data();
    state_ = state.data();
    sums_ = out_.sums ? sums.data() : nullptr;
    second_ = out_.second ? second.data() : nullptr;
    for (int64_t first = 0; first < rows_; first += chunk) run_chunk(first, std::min(chunk, rows_ - first));
  }

 private:
  void run_chunk(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    panels_ = divide_up(count, P_);
    run_tasks(panels_, [&] {
      return [&](int64_t panel) {
        F* to = packed_ + panel * packed_terms_ * P_;
        for (const auto& f : factors_) {
          f.pack(first_ + panel * P_, std::min(P_, count_ - panel * P_), to);
          to += f.packed() * P_;
        }
      };
    });
    const int64_t group = std::min(panels_, std::max<int64_t>(1, kGroupRows / P_)), groups = divide_up(panels_, group);
    run_tasks(segments_.count * groups, [&] {
      std::vector<Buffer<F>> rooms;
      for (const auto& f : factors_) rooms.emplace_back(f.room());
      Buffer<F> tile(Tile<F>::size(P_, paired_)), other(Tile<F>::size(P_, paired_));
      return [&, group, groups, rooms = std::move(rooms), tile = std::move(tile), other = std::move(other)](int64_t task) {
        const int64_t segment = task / groups, begin = task % groups * group;
        run_segment(segment, begin, std::min(panels_, begin + group), rooms, tile.data(), other.data());
      };
    });
    run_tasks(panels_, [&] { return [&](int64_t panel) { merge(panel); }; });
  }

  PanelState<F> state(int64_t segment, int64_t panel) const {
    F* at = state_ + (segment * panels_ + panel) * 3 * P_;
    return {at, at + P_, out_.weighted || out_.sums ? at + 2 * P_ : nullptr};
  }
  F* sums(F* all, int64_t segment, int64_t panel) const { return all ? all + (segment * panels_ + panel) * terms_ * P_ : nullptr; }

  void run_segment(int64_t segment, int64_t begin, int64_t end, const std::vector<Buffer<F>>& rooms, F* tile, F* other) {
    alignas(64) F inverse[kMaxLanes], tanh_scale[kMaxLanes], lane[kMaxLanes];
    for (int64_t index = segments_.first_block(segment); index < segments_.end_block(segment); ++index) {
      const Columns c = segments_.block(index);
      const bool fresh = index == segments_.first_block(segment);
      typename Factors<F>::Block blocks[2] = {};
      for (size_t i = 0; i < factors_.size(); ++i) blocks[i] = factors_[i].block(c, sums_ != nullptr, rooms[i].data());
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t row = first_ + panel * P_, count = std::min(P_, rows_ - row);
        const bool kept = row < out_.cached, as_products = kept && out_.cache_dtype == kDtype<F>;
        const int64_t place = CacheLayout::at(segments_.V, P_, row, c.first);
        F* x = as_products ? reinterpret_cast<F*>(out_.cache) + place : tile;
        const F* rows = packed_ + panel * packed_terms_ * P_;
        for (size_t i = 0; i < factors_.size(); rows += factors_[i++].packed() * P_) factors_[i].products(c.count, blocks[i], rows, x, i > 0);
        F* z = x;
        if (!head_.plain()) {
          for (int64_t i = 0; i < P_; ++i) inverse[i] = i < count ? head_.inverse_of(row + i) : F(0);
          z = tile;
          kernel_.scores(x, c.count, head_.scores(c, inverse), z);
        }
        for (int64_t i = 0; i < count; ++i) {
          const int64_t column = target_[row + i] - c.first;
          if (column >= 0 && column < c.count) out_.target[row + i] = z[column * P_ + i];
        }
        if (kept && !as_products) keep(index, place, row, c.count, z, other, lane);
        if (!sums_) {
          kernel_.stats(z, c.count, fresh, state(segment, panel));
          continue;
        }
        if (head_.cap > 0)
          for (int64_t i = 0; i < P_; ++i) tanh_scale[i] = i < count ? head_.tanh_scale(row + i) : F(0);
        kernel_.weights(z, c.count, fresh, state(segment, panel), head_.cap > 0 ? tanh_scale : nullptr, tile, second_ ? other : nullptr, lane);
        add_sums(segment, panel, c, fresh, blocks, tile, other, lane);
      }
    }
  }

  // Scores around the maximum of their own tile, where rounding is finest.
  void keep(int64_t index, int64_t place, int64_t row, int64_t n, const F* z, F* other, F* top) {
    if constexpr (std::is_same_v<F, float>) {
      kernel_.maximum(z, n, top);
      kernel_.subtract(z, n, top, other);
      narrow(out_.cache_dtype, other, n * P_, out_.cache + place * 2);
      std::copy(top, top + std::min(P_, out_.cached - row), out_.offsets + index * out_.offsets_stride + row);
    }
  }

  void add_sums(int64_t segment, int64_t panel, Columns c, bool fresh, const typename Factors<F>::Block* blocks, F* weights, F* weighted, const F* change) {
    const int64_t row = first_ + panel * P_, count = std::min(P_, rows_ - row);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = target_[row + i] - c.first;
      if (column < 0 || column >= c.count) continue;
      weights[column * P_ + i] = 0;
      if (second_) weighted[column * P_ + i] = 0;
    }
    F *first = sums(sums_, segment, panel), *second = sums(second_, segment, panel);
    if (!fresh && std::any_of(change, change + P_, [](F x) { return x != 0; })) kernel_.rescale(first, second, terms_, change);
    const Tile<F> tile = Tile<F>::at(weights, P_, paired_), other = Tile<F>::at(weighted, P_, paired_);
    tile.pair_columns(c.count, P_);
    if (second) other.pair_columns(c.count, P_);
    for (size_t i = 0; i < factors_.size(); ++i) {
      factors_[i].over_columns(c.count, blocks[i], tile, first, !fresh);
      if (second) factors_[i].over_columns(c.count, blocks[i], other, second, !fresh);
      first += factors_[i].K * P_;
      if (second) second += factors_[i].K * P_;
    }
  }

  void merge(int64_t panel) {
    alignas(64) F maximum[kMaxLanes], change[kMaxLanes];
    const int64_t row = first_ + panel * P_, count = std::min(P_, rows_ - row);
    for (int64_t i = 0; i < P_; ++i) {
      maximum[i] = state(0, panel).maximum[i];
      for (int64_t s = 1; s < segments_.count; ++s) maximum[i] = std::max(maximum[i], state(s, panel).maximum[i]);
    }
    for (int64_t i = 0; i < count; ++i) {
      F total = 0, weighted = 0;
      for (int64_t s = 0; s < segments_.count; ++s) {
        const PanelState<F> part = state(s, panel);
        const F step = part.maximum[i] - maximum[i], scale = std::exp(step);
        if (part.weighted) weighted += scale * (part.weighted[i] + std::max<F>(step, kFloor) * part.total[i]);
        total += scale * part.total[i];
      }
      const bool skip = target_[row + i] == kSkipRow;  // what is left of it enters a logarithm as a number
      out_.maximum[row + i] = skip ? F(0) : maximum[i];
      out_.total[row + i] = skip ? F(1) : total;
      if (out_.weighted) out_.weighted[row + i] = skip ? F(0) : weighted;
      if (skip) out_.target[row + i] = 0;
    }
    if (!sums_) return;
    for (int64_t s = 0; s < segments_.count; ++s) {
      for (int64_t i = 0; i < P_; ++i) change[i] = state(s, panel).maximum[i] - maximum[i];
      kernel_.rescale(sums(sums_, s, panel), sums(second_, s, panel), terms_, change);
      if (s == 0) continue;
      kernel_.add(sums(sums_, s, panel), terms_ * P_, sums(sums_, 0, panel));
      if (second_) kernel_.add(sums(second_, s, panel), terms_ * P_, sums(second_, 0, panel));
    }
    transpose(sums(sums_, 0, panel), P_, terms_, count, out_.sums + row * out_.width, out_.width);
    if (second_) transpose(sums(second_, 0, panel), P_, terms_, count, out_.second + row * out_.width, out_.width);
  }

  const Tensor like_;
  const LinearKernels<F>& kernel_;
  const int64_t P_;
  std::vector<Factors<F>> factors_;
  const Head<F> head_;
  const int64_t* target_;
  const int64_t rows_;
  const Outputs<F> out_;
  const Segments segments_;
  bool paired_ = false;
  int64_t terms_ = 0, packed_terms_ = 0, first_ = 0, count_ = 0, panels_ = 0;
  F *packed_ = nullptr, *state_ = nullptr, *sums_ = nullptr, *second_ = nullptr;
};

void linear_forward(
    Tensor hidden, Tensor weight, MaybeTensor low, MaybeTensor lora, Tensor target, double factor, MaybeTensor bias, double softcap,
    MaybeTensor inverse_temperature, double inverse, Tensor maximum, Tensor total, MaybeTensor weighted, Tensor target_score, MaybeTensor cache,
    int64_t cached, MaybeTensor offsets, MaybeTensor sums, MaybeTensor second) {
  const int64_t M = target.size(0), V = weight.size(0);
  const auto run = [&](auto zero) {
    using F = decltype(zero);
    const int64_t P = linear_kernels<F>().lanes;
    std::vector<Factors<F>> factors = factors_of<F>(hidden, weight, low, lora, target);
    for (const MaybeTensor& x : {MaybeTensor(maximum), MaybeTensor(total), weighted, MaybeTensor(target_score)}) check_vector(x, M, kDtype<F>, "the state");
    const int64_t width = hidden.size(1) + (low ? low->size(1) : 0);
    for (const MaybeTensor& x : {sums, second}) {
      check_matrix(x, M, width, "the sums");
      STD_TORCH_CHECK(!x || (x->scalar_type() == kDtype<F> && x->is_contiguous()), "native linear_logprob: the sums have the wrong dtype or strides");
    }
    STD_TORCH_CHECK(!second || sums, "native linear_logprob: second needs sums");
    ScalarType kept = kDtype<F>;
    if (cached > 0) {
      STD_TORCH_CHECK(cached <= M && (cached == M || cached % P == 0), "native linear_logprob: a part of the rows in the cache must fill its panels");
      check_cache<F>(cache, offsets, V, cached - 1);
      kept = cache->scalar_type();
    }
    const Outputs<F> out{
        write<F>(maximum), write<F>(total), write<F>(weighted), write<F>(target_score),
        write<char>(cache), kept, cached, write<F>(offsets), offsets ? offsets->stride(0) : 0, write<F>(sums), write<F>(second), width};
    if (M > 0 && V > 0) Forward<F>(hidden, std::move(factors), Head<F>(V, M, factor, bias, softcap, inverse_temperature, inverse), read<int64_t>(target), M, out).run();
  };
  if (maximum.scalar_type() == ScalarType::Double) run(0.0);
  else run(0.0f);
}

int64_t linear_block() { return kBlockColumns; }

}  // namespace
}  // namespace specs

STABLE_TORCH_LIBRARY_FRAGMENT(specs_kernels, m) {
  m.def(
      "linear_forward(Tensor hidden, Tensor weight, Tensor? low, Tensor? lora, Tensor target, float factor, Tensor? bias, float softcap, "
      "Tensor? inverse_temperature, float inverse, Tensor(a!) maximum, Tensor(b!) total, Tensor(c!)? weighted, Tensor(d!) target_score, "
      "Tensor(e!)? cache, int cached, Tensor(f!)? offsets, Tensor(g!)? sums, Tensor(h!)? second) -> ()");
  m.def("linear_block() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(specs_kernels, CPU, m) { m.impl("linear_forward", TORCH_BOX(&specs::linear_forward)); }

STABLE_TORCH_LIBRARY_IMPL(specs_kernels, CompositeExplicitAutograd, m) { m.impl("linear_block", TORCH_BOX(&specs::linear_block)); }
