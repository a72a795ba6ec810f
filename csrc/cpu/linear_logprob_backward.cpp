// Gradients of linear_logprob on CPU: scores of a block for some panels, formed again or read from a cache, become dx in the cache of a core
// and go from there into the gradients of hidden and of the weight.
//
// Tasks are a grid of segments of the vocabulary by shares of the panels. Every segment has sums of its own for the gradient of hidden, and
// where there are several shares, every share for that of the weight; they are added up in a fixed order. Both numbers follow from the
// shapes, not from the threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "linear_logprob_factors.h"
#include "linear_logprob_gradients.h"

namespace specs {
namespace {

constexpr int64_t kTasks = 32;              // at most
constexpr int64_t kScoresPerTask = 1 << 22;  // scores of one term: some 0.1 ms
constexpr int64_t kGroupRows = 512;         // rows of the dx that exist at a time
constexpr int64_t kRoomBytes = 64 << 20;    // for packed rows and sums of hidden's gradient; more rows go in chunks
constexpr int64_t kSmallRoomBytes = 8 << 20;  // the same where a chunk is shared out by rows: it stays in the shared cache
constexpr int64_t kWholeRoomBytes = 256 << 20;  // the same where all rows go at once; for copies of the weight's gradient

// Upstream of a row's products: row_pass.py.
template <class F>
struct Upstream {
  const F *maximum, *log_total, *base, *entropy, *target;
};

template <class F>
struct Kept {
  const char* data = nullptr;
  ScalarType dtype = kDtype<F>;
  int64_t rows = 0;             // the first rows of the call have their scores there
  const int64_t* place = nullptr;  // where; null: in order
  const F* offsets = nullptr;
  int64_t offsets_stride = 0;
};

template <class F>
class Backward {
 public:
  Backward(
      const Tensor& like, std::vector<Factors<F>> factors, const Head<F>& head, const int64_t* target, int64_t rows, const Upstream<F>& upstream, const Kept<F>& kept,
      std::vector<F*> into_rows, std::vector<WeightGradient<F>> into_weights, MaybeTensor into_bias, F early, bool accumulate)
      : like_(like), kernel_(linear_kernels<F>()), P_(kernel_.lanes), factors_(std::move(factors)), head_(head), target_(target), rows_(rows), upstream_(upstream),
        kept_(kept), into_rows_(std::move(into_rows)), into_weights_(std::move(into_weights)), into_bias_(std::move(into_bias)), early_(early),
        accumulate_(accumulate), V_(factors_[0].V), segments_(V_) {
    for (const auto& f : factors_) {
      terms_ += f.K;
      packed_terms_ += f.packed();
      paired_ |= f.paired();
    }
    for (F* into : into_rows_) wants_rows_ |= into != nullptr;
    for (const auto& into : into_weights_) wants_weights_ |= into.wanted();
  }

  void run() {
    int64_t chunk = plan();
    for (auto& into : into_weights_) into.share(like_, shares_, chunk < rows_);
    const int64_t panels = divide_up(std::min(chunk, rows_), P_), lanes = panels * P_;
    int64_t slab_numbers = 0;
    for (size_t i = 0; i < factors_.size(); ++i)
      if (into_weights_[i].wanted()) slab_numbers += factors_[i].slabs() * factors_[i].slab_rows(lanes) * P_;
    const Workspace<F> packed(like_, lanes * packed_terms_), slabs(like_, slab_numbers), numbers(like_, panels * kKinds * P_), live(like_, panels);
    const Workspace<F> sums(like_, wants_rows_ ? segments_.count * lanes * terms_ : 0);
    packed_ = packed.data();
    slabs_ = slabs.data();
    lanes_ = numbers.data();
    live_ = live.data();
    sums_ = sums.data();
    const int64_t bias_count = into_bias_ ? shares_ * V_ : 0;
    const Workspace<F> bias(like_, bias_count);
    bias_ = into_bias_ ? bias.data() : nullptr;
    std::fill(bias.data(), bias.data() + bias_count, F(0));
    for (int64_t first = 0; first < rows_; first += chunk) run_chunk(first, std::min(chunk, rows_ - first));
    run_tasks(segments_.blocks, [&] { return [&](int64_t block) { finish(segments_.block(block)); }; });
  }

 private:
  // Segments, shares and rows of a chunk: up to kTasks tasks, each worth its start, with the least room for sums.
  int64_t plan() {
    const int64_t panels = divide_up(rows_, P_), wide = static_cast<int64_t>(sizeof(F)) * (terms_ + 2 * P_);
    const int64_t tasks = std::clamp<int64_t>(rows_ * V_ * terms_ / kScoresPerTask, 1, kTasks);
    bool whole = false;
    for (const auto& into : into_weights_) whole |= into.whole();
    const int64_t copy = V_ * terms_ * static_cast<int64_t>(sizeof(F));
    segments_ = Segments(V_, tasks, 1);
    int64_t least = -1;
    for (int64_t wanted = std::min(tasks, segments_.blocks); wanted >= 1; --wanted) {
      const Segments cut(V_, wanted, 1);
      const int64_t shares = std::clamp<int64_t>(tasks / cut.count, 1, panels);
      const bool copies = wants_weights_ && shares > 1;
      // Without copies every share still fetches the weight for itself.
      const int64_t room = (wants_rows_ ? cut.count * rows_ : 0) + (shares > 1 ? shares * V_ : 0);
      if ((least >= 0 && room >= least) || (copies && shares * copy > kWholeRoomBytes)) continue;
      least = room;
      segments_ = cut;
      shares_ = shares;
    }
    if (whole && shares_ == 1) {  // all rows at once, with fewer segments; in chunks where a copy of the gradient in F takes less
      const int64_t most = std::max<int64_t>(4, kWholeRoomBytes / (rows_ * wide));
      if (most > 4 || rows_ * wide * (2 + most) <= copy) {
        if (segments_.count > most) segments_ = Segments(V_, most, 1);
        return rows_;
      }
    }
    const int64_t per_row = wide * (1 + (wants_rows_ ? segments_.count : 0) + (wants_weights_ ? 1 : 0));
    return std::max<int64_t>(std::max<int64_t>(128, shares_ * P_), (segments_.count > 1 ? kRoomBytes : kSmallRoomBytes) / per_row / P_ * P_);
  }

  // Numbers of a chunk's rows, [panel][kind][lane].
  enum Kind { kMaximum, kBase, kEntropy, kTanhScale, kLive, kInverse, kTarget, kKinds };
  F* lanes(int64_t panel, Kind kind) const { return lanes_ + (panel * kKinds + kind) * P_; }

  void run_chunk(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    panels_ = divide_up(count, P_);
    run_tasks(panels_, [&] { return [&](int64_t panel) { prepare(panel); }; });
    const int64_t group = std::min(panels_, std::max<int64_t>(1, kGroupRows / P_));
    run_tasks(segments_.count * shares_, [&] {
      std::vector<Buffer<F>> weights, sinks;
      for (const auto& f : factors_) weights.emplace_back(f.room());
      for (const auto& into : into_weights_) sinks.emplace_back(into.room(shares_));
      Buffer<F> tiles(group * Tile<F>::size(P_, paired_));
      return [&, group, weights = std::move(weights), sinks = std::move(sinks), tiles = std::move(tiles)](int64_t task) {
        run_task(task / shares_, task % shares_, group, weights, sinks, tiles.data());
      };
    });
    if (wants_rows_) run_tasks(panels_, [&] { return [&](int64_t panel) { collect(panel); }; });
  }

  void prepare(int64_t panel) {
    const int64_t row = first_ + panel * P_, count = std::min(P_, first_ + count_ - row);
    F *to = packed_ + panel * packed_terms_ * P_, *slab = slabs_;
    for (size_t i = 0; i < factors_.size(); ++i) {
      const Factors<F>& f = factors_[i];
      if (kept_.rows < row + count) f.pack(row, count, to);
      to += f.packed() * P_;
      if (!into_weights_[i].wanted()) continue;
      f.pack_slabs(row, count, panels_ * P_, panel * P_, slab);
      slab += f.slabs() * f.slab_rows(panels_ * P_) * P_;
    }
    F any = 0;
    for (int64_t i = 0; i < P_; ++i) {
      const int64_t r = row + i;
      const F q = i < count && upstream_.entropy ? upstream_.entropy[r] : F(0), g = i < count && upstream_.target ? upstream_.target[r] : F(0);
      const bool live = i < count && target_[r] != kSkipRow && !(upstream_.base[r] == 0 && q == 0 && g == 0);
      const F inverse = live ? head_.inverse_of(r) : F(0), scale = live ? inverse * std::exp(-upstream_.log_total[r]) : F(0);
      lanes(panel, kMaximum)[i] = live ? upstream_.maximum[r] : F(0);
      lanes(panel, kBase)[i] = live ? upstream_.base[r] * scale : F(0);
      lanes(panel, kEntropy)[i] = q * scale;
      lanes(panel, kTanhScale)[i] = live ? head_.tanh_scale(r) : F(0);
      lanes(panel, kLive)[i] = live;
      lanes(panel, kInverse)[i] = inverse;
      lanes(panel, kTarget)[i] = g * inverse;
      if (live) any = 1;
    }
    live_[panel] = any;
  }

  void run_task(int64_t segment, int64_t share, int64_t group, const std::vector<Buffer<F>>& weights, const std::vector<Buffer<F>>& sinks, F* tiles) {
    const int64_t begin = panels_ * share / shares_, end = panels_ * (share + 1) / shares_;  // none is empty in the first chunk
    if (begin == end) return;
    for (int64_t index = segments_.first_block(segment); index < segments_.end_block(segment); ++index) {
      const Columns c = segments_.block(index);
      const bool fresh = index == segments_.first_block(segment);
      typename Factors<F>::Block blocks[2] = {};
      for (size_t i = 0; i < factors_.size(); ++i) blocks[i] = factors_[i].block(c, into_rows_[i] != nullptr, weights[i].data());
      for (int64_t from = begin; from < end; from += group) {
        const int64_t to = std::min(end, from + group);
        for (int64_t panel = from; panel < to; ++panel) form_dx(panel, index, c, blocks, tile_at(tiles, panel - from), share);
        const F* slab = slabs_;
        for (size_t i = 0; i < factors_.size(); ++i) {
          const WeightGradient<F>& into = into_weights_[i];
          if (!into.wanted()) continue;
          const auto at = into.place(share, c, sinks[i].data(), first_ == 0, from == begin);
          for (int64_t j = 0; j < factors_[i].slabs(); ++j, slab += factors_[i].slab_rows(panels_ * P_) * P_)
            factors_[i].over_rows(c.count, to - from, tile_at(tiles, 0), Tile<F>::size(P_, paired_), slab, from, at.data + j * P_, at.stride, at.add);
        }
        if (!wants_rows_) continue;
        for (int64_t panel = from; panel < to; ++panel) {
          F* sum = sums_ + (segment * panels_ + panel) * terms_ * P_;
          if (live_[panel] == 0) {
            if (fresh) std::fill(sum, sum + terms_ * P_, F(0));
            continue;
          }
          for (size_t i = 0; i < factors_.size(); sum += factors_[i++].K * P_)
            if (into_rows_[i])
              factors_[i].over_columns(c.count, blocks[i], tile_at(tiles, panel - from), sum, !fresh);
        }
      }
      for (size_t i = 0; i < factors_.size(); ++i)
        if (into_weights_[i].wanted()) into_weights_[i].finish(c, sinks[i].data(), first_ == 0);
    }
  }

  Tile<F> tile_at(F* tiles, int64_t place) const { return Tile<F>::at(tiles + place * Tile<F>::size(P_, paired_), P_, paired_); }

  // Scores of one panel and block, then dx.
  void form_dx(int64_t panel, int64_t index, Columns c, const typename Factors<F>::Block* blocks, const Tile<F>& dx, int64_t share) {
    F* tile = dx.numbers;
    if (live_[panel] == 0) {
      std::fill(tile, tile + c.count * P_, F(0));
      if (wants_weights_) dx.pair_lanes(c.count, P_);
      return;
    }
    const int64_t row = first_ + panel * P_, count = std::min(P_, first_ + count_ - row), cached = std::clamp<int64_t>(kept_.rows - row, 0, count);
    const bool products = kept_.dtype == kDtype<F>;
    if (cached < count) {
      const F* rows = packed_ + panel * packed_terms_ * P_;
      for (size_t i = 0; i < factors_.size(); rows += factors_[i++].packed() * P_) factors_[i].products(c.count, blocks[i], rows, tile, i > 0);
    }
    if (cached > 0 && products) read_kept(row, index, c, cached, tile);
    if (!head_.plain() && !(cached == count && !products)) kernel_.scores(tile, c.count, head_.scores(c, lanes(panel, kInverse)), tile);
    if (cached > 0 && !products) read_kept(row, index, c, cached, tile);
    const F *tanh_scale = lanes(panel, kTanhScale), *live = lanes(panel, kLive);
    F own[kMaxLanes];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = target_[row + i] - c.first;
      if (column < 0 || column >= c.count) continue;
      const F tanh = head_.cap > 0 ? tile[column * P_ + i] * tanh_scale[i] : F(0);
      own[i] = lanes(panel, kTarget)[i] * (1 - tanh * tanh);
    }
    kernel_.gradient(
        tile, c.count,
        {lanes(panel, kMaximum), lanes(panel, kBase), upstream_.entropy ? lanes(panel, kEntropy) : nullptr, head_.cap > 0 ? tanh_scale : nullptr, live}, tile);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = target_[row + i] - c.first;
      if (column >= 0 && column < c.count && live[i] != 0) tile[column * P_ + i] += own[i];
    }
    if (bias_) kernel_.lane_sums(tile, c.count, bias_ + share * V_ + c.first);
    if (head_.factor != 1) kernel_.scale(tile, c.count * P_, head_.factor);
    if (wants_weights_) dx.pair_lanes(c.count, P_);
    if (wants_rows_) dx.pair_columns(c.count, P_);
  }

  // Products, or scores, of the first `count` lanes from the cache.
  void read_kept(int64_t row, int64_t index, Columns c, int64_t count, F* tile) {
    const bool products = kept_.dtype == kDtype<F>, in_order = !kept_.place && row % P_ == 0;
    const F* offsets = products ? nullptr : kept_.offsets + index * kept_.offsets_stride;
    if (in_order) {
      const char* from = kept_.data + CacheLayout::at(V_, P_, row, c.first) * bytes_of(kept_.dtype);
      if (count == P_ || count == rows_ - row) {
        if (products) std::memcpy(tile, from, c.count * P_ * sizeof(F));
        else if constexpr (std::is_same_v<F, float>) widen(kept_.dtype, from, c.count * P_, tile);
        if (offsets)
          for (int64_t i = 0; i < c.count; ++i)
            for (int64_t lane = 0; lane < count; ++lane) tile[i * P_ + lane] += offsets[row + lane];
        return;
      }
    }
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t place = kept_.place ? kept_.place[row + lane] : row + lane;
      const char* from = kept_.data + CacheLayout::at(V_, P_, place, c.first) * bytes_of(kept_.dtype);
      for (int64_t i = 0; i < c.count; ++i) {
        if (products) {
          tile[i * P_ + lane] = reinterpret_cast<const F*>(from)[i * P_];
        } else if constexpr (std::is_same_v<F, float>) {
          widen(kept_.dtype, from + i * P_ * 2, 1, tile + i * P_ + lane);
          tile[i * P_ + lane] += offsets[place];
        }
      }
    }
  }

  // The segments' sums for one panel, into the gradients of the rows.
  void collect(int64_t panel) {
    const int64_t row = first_ + panel * P_, count = std::min(P_, first_ + count_ - row);
    F* sum = sums_ + panel * terms_ * P_;
    for (int64_t s = 1; s < segments_.count; ++s) kernel_.add(sum + s * panels_ * terms_ * P_, terms_ * P_, sum);
    for (size_t i = 0; i < factors_.size(); sum += factors_[i++].K * P_)
      if (into_rows_[i]) transpose(sum, P_, factors_[i].K, count, into_rows_[i] + row * factors_[i].K, factors_[i].K);
  }

  void finish(Columns c) {
    for (const auto& into : into_weights_) into.reduce(kernel_, shares_, c);
    if (!bias_) return;
    for (int64_t v = c.first; v < c.first + c.count; ++v) {
      F sum = 0;
      for (int64_t s = 0; s < shares_; ++s) sum += bias_[s * V_ + v];
      sum *= early_;
      if (into_bias_->scalar_type() == kDtype<F>) {
        F* to = write<F>(into_bias_) + v;
        *to = accumulate_ ? *to + sum : sum;
      } else if constexpr (std::is_same_v<F, float>) {
        narrow(into_bias_->scalar_type(), &sum, 1, write<char>(into_bias_) + v * 2);
      }
    }
  }

  const Tensor like_;
  const LinearKernels<F>& kernel_;
  const int64_t P_;
  std::vector<Factors<F>> factors_;
  const Head<F> head_;
  const int64_t* target_;
  const int64_t rows_;
  const Upstream<F> upstream_;
  const Kept<F> kept_;
  std::vector<F*> into_rows_;
  std::vector<WeightGradient<F>> into_weights_;
  MaybeTensor into_bias_;
  const F early_;
  const bool accumulate_;
  const int64_t V_;
  Segments segments_;
  bool wants_rows_ = false, wants_weights_ = false, paired_ = false;
  int64_t terms_ = 0, packed_terms_ = 0, shares_ = 1, first_ = 0, count_ = 0, panels_ = 0;
  F *packed_ = nullptr, *slabs_ = nullptr, *lanes_ = nullptr, *live_ = nullptr, *sums_ = nullptr, *bias_ = nullptr;
};

void linear_backward(
    Tensor hidden, Tensor weight, MaybeTensor low, MaybeTensor lora, Tensor target, double factor, MaybeTensor bias, double softcap,
    MaybeTensor inverse_temperature, double inverse, Tensor maximum, Tensor log_total, Tensor base, MaybeTensor entropy, MaybeTensor target_gradient,
    MaybeTensor cache, int64_t cached, MaybeTensor cache_rows, MaybeTensor offsets, MaybeTensor d_hidden, MaybeTensor d_low, MaybeTensor d_weight,
    MaybeTensor d_lora, MaybeTensor d_bias, double early, bool accumulate) {
  const int64_t M = target.size(0), V = weight.size(0);
  const auto run = [&](auto zero) {
    using F = decltype(zero);
    const int64_t P = linear_kernels<F>().lanes;
    std::vector<Factors<F>> factors = factors_of<F>(hidden, weight, low, lora, target);
    for (const MaybeTensor& x : {MaybeTensor(maximum), MaybeTensor(log_total), MaybeTensor(base), entropy, target_gradient})
      check_vector(x, M, kDtype<F>, "the gradients");
    const MaybeTensor* into_rows[] = {&d_hidden, &d_low};
    const MaybeTensor* into_weights[] = {&d_weight, &d_lora};
    std::vector<F*> rows;
    std::vector<WeightGradient<F>> weights;
    for (size_t i = 0; i < factors.size(); ++i) {
      const MaybeTensor& x = *into_rows[i];
      check_matrix(x, M, factors[i].K, "a gradient of rows");
      STD_TORCH_CHECK(!x || (x->scalar_type() == kDtype<F> && x->is_contiguous()), "native linear_logprob: a gradient of rows has the wrong dtype or strides");
      rows.push_back(write<F>(x));
      weights.emplace_back(*into_weights[i], V, factors[i].K, P, accumulate);
    }
    STD_TORCH_CHECK(low || (!d_low && !d_lora), "native linear_logprob: d_low and d_lora need low and lora");
    if (d_bias) {
      check_vector(d_bias, V, d_bias->scalar_type(), "the gradient of bias");
      check_float<F>(*d_bias, "the gradient of bias");
      STD_TORCH_CHECK(!accumulate || d_bias->scalar_type() == kDtype<F>, "native linear_logprob: gradients in half precision cannot accumulate");
    }
    Kept<F> kept;
    if (cached > 0) {
      STD_TORCH_CHECK(cached <= M, "native linear_logprob: more cached rows than targets");
      check_vector(cache_rows, cached, ScalarType::Long, "cache_rows");
      int64_t last = cached - 1;
      for (int64_t i = 0; cache_rows && i < cached; ++i) {
        STD_TORCH_CHECK(read<int64_t>(cache_rows)[i] >= 0, "native linear_logprob: cache_rows must be at least 0");
        last = std::max(last, read<int64_t>(cache_rows)[i]);
      }
      check_cache<F>(cache, offsets, V, last);
      kept = {read<char>(cache), cache->scalar_type(), cached, read<int64_t>(cache_rows), nullptr, 0};
      if (kept.dtype != kDtype<F>) {
        kept.offsets = read<F>(offsets);
        kept.offsets_stride = offsets->stride(0);
      }
    }
    if (M == 0 || V == 0) return;
    const Upstream<F> upstream{read<F>(maximum), read<F>(log_total), read<F>(base), read<F>(entropy), read<F>(target_gradient)};
    const Head<F> how(V, M, factor, bias, softcap, inverse_temperature, inverse);
    Backward<F>(
        hidden, std::move(factors), how, read<int64_t>(target), M, upstream, kept, std::move(rows), std::move(weights), d_bias, static_cast<F>(early), accumulate)
        .run();
  };
  if (maximum.scalar_type() == ScalarType::Double) run(0.0);
  else run(0.0f);
}

}  // namespace
}  // namespace specs

STABLE_TORCH_LIBRARY_FRAGMENT(specs_kernels, m) {
  m.def(
      "linear_backward(Tensor hidden, Tensor weight, Tensor? low, Tensor? lora, Tensor target, float factor, Tensor? bias, float softcap, "
      "Tensor? inverse_temperature, float inverse, Tensor maximum, Tensor log_total, Tensor base, Tensor? entropy, Tensor? target_gradient, "
      "Tensor? cache, int cached, Tensor? cache_rows, Tensor? offsets, Tensor(a!)? d_hidden, Tensor(b!)? d_low, Tensor(c!)? d_weight, "
      "Tensor(d!)? d_lora, Tensor(e!)? d_bias, float early, bool accumulate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(specs_kernels, CPU, m) { m.impl("linear_backward", TORCH_BOX(&specs::linear_backward)); }
