// Flash attention of one tile of queries over a packed forest, forward and backward; see packed_attention.h for the terms.
//
// Forward, per block of keys: S = (scale Q) K^T, running maximum m and sum l, O = O exp(m_old - m_new) + exp(S - m_new) V.
// Backward, per block: P = exp(S - lse), dV += P^T dO, dS = P (dO V^T - delta), dQ += scale dS K, dK += dS^T (scale Q), with
// delta_i = dO_i . out_i - dlse_i. A row of a tile is a (token, query head) pair, token-major; all G heads of a key head share its tile.
// Keys are visited in one fixed order: own run, then the runs above it, each from its start.

#pragma once

#include "packed_attention.h"
#include "simd.h"
#include "small_gemm.h"

namespace specs {
namespace SPECS_ISA {

template <class F>
constexpr F kInfinity = (F)__builtin_inff();

SPECS_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Panels of one head of one run: blocks of kBlockKeys keys, each [D][width], width padded to kPad with zeros.
template <class F>
void pack(const Rows<const F>& rows, int64_t head, const Run& run, int64_t head_dim, F* panels) {
  for (int64_t first = run.start; first < run.end; first += kBlockKeys) {
    const int64_t count = run.end - first < kBlockKeys ? run.end - first : kBlockKeys;
    const int64_t width = round_up(count, kPad);
    for (int64_t j = 0; j < count; ++j) {
      const F* row = rows.at(first + j, head);
      for (int64_t d = 0; d < head_dim; ++d) panels[d * width + j] = row[d];
    }
    for (int64_t d = 0; d < head_dim; ++d)
      for (int64_t j = count; j < width; ++j) panels[d * width + j] = 0;
    panels += width * head_dim;
  }
}

// One block of keys against one tile.
struct KeyBlock {
  int64_t first, count, width;  // tokens [first, first + count), padded to width
  int64_t panel;                // column of its panel within the head
  bool own;                     // in the tile's own run: visible_from decides
  int64_t hidden_until;         // with a window, keys below hidden_until + (i - tile.begin) are out of sight of query i
};

// Calls visit for every block of keys that some query of the tile sees.
template <class F, class Visit>
SPECS_INLINE void for_each_block(const Attention<F>& p, const Tile& tile, const Visit& visit) {
  const Run& own = p.runs[tile.run];
  int64_t own_end = tile.end;  // a bidirectional span may reach past the tile
  while (own_end < own.end && p.visible_from[own_end] < tile.end) ++own_end;
  const int64_t first_position = own.position + (tile.begin - own.start);
  int64_t below = 0;  // position of the run that this one was reached from
  for (int64_t r = tile.run; r >= 0; r = p.runs[r].parent) {
    const Run& run = p.runs[r];
    const int64_t end = r == tile.run ? own_end : run.start + (below - run.position);
    below = run.position;
    // Key j of this run has position run.position + (j - run.start); query i sees it iff position_i - position_j < window.
    const int64_t hidden_until = p.window > 0 ? run.start + (first_position - p.window + 1) - run.position : run.start;
    int64_t block = hidden_until > run.start ? (hidden_until - run.start) / kBlockKeys : 0;
    for (int64_t first = run.start + block * kBlockKeys; first < end; first += kBlockKeys) {
      const int64_t stored = run.end - first < kBlockKeys ? run.end - first : kBlockKeys;
      const int64_t count = end - first < stored ? end - first : stored;
      visit(KeyBlock{first, count, round_up(stored, kPad), p.panel_offsets[r] + (first - run.start), r == tile.run, hidden_until});
    }
  }
}

// Columns of the block that any row needs: the width of the multiplied part.
SPECS_INLINE int64_t used_width(const KeyBlock& block) { return round_up(block.count, kPad); }

// S = Q K^T in the first used_width columns, softcapped and masked with -inf; slope = d score / d (scale q.k) with a softcap.
template <class F>
SPECS_INLINE void block_scores(const Attention<F>& p, const Tile& tile, int64_t kv_head, const KeyBlock& block, int64_t M, const F* query, F* scores, F* slope) {
  const int64_t width = used_width(block), D = p.head_dim;
  const F* panel = p.key_panels + (kv_head * p.panel_columns + block.panel) * D;
  small_gemm<F, false>(M, width, D, query, D, 1, panel, block.width, scores, kBlockKeys, false);
  if (p.softcap > 0) {
    const F inverse = 1 / p.softcap;
    for (int64_t m = 0; m < M; ++m)
      for (int64_t j = 0; j < width; j += kLanes<F>) {
        F* at = scores + m * kBlockKeys + j;
        const Vec<F> t = vtanh(load(at) * inverse);
        store(at, t * p.softcap);
        if (slope) store(slope + m * kBlockKeys + j, 1 - t * t);
      }
  }
  const bool windowed = p.window > 0 && block.hidden_until + (tile.end - tile.begin - 1) > block.first;
  const bool causal = block.own && block.first + block.count > tile.begin + 1;
  if (!windowed && !causal && block.count == width) return;
  for (int64_t i = tile.begin; i < tile.end; ++i) {
    int64_t low = windowed ? block.hidden_until + (i - tile.begin) - block.first : 0;
    low = low < 0 ? 0 : low < block.count ? low : block.count;
    for (int64_t g = 0; g < p.fold; ++g) {
      F* row = scores + ((i - tile.begin) * p.fold + g) * kBlockKeys;
      for (int64_t j = 0; j < low; ++j) row[j] = -kInfinity<F>;
      if (causal) {
        const int32_t* from = p.visible_from + block.first;
        const int32_t token = static_cast<int32_t>(i);
        for (int64_t j = low; j < block.count; ++j) row[j] = from[j] <= token ? row[j] : -kInfinity<F>;
      }
      for (int64_t j = block.count; j < width; ++j) row[j] = -kInfinity<F>;
    }
  }
}

template <class F>
SPECS_INLINE void load_query(const Attention<F>& p, const Tile& tile, int64_t kv_head, F* query) {
  for (int64_t i = tile.begin; i < tile.end; ++i)
    for (int64_t g = 0; g < p.fold; ++g, query += p.head_dim) {
      const F* row = p.query.at(i, kv_head * p.fold + g);
      for (int64_t d = 0; d < p.head_dim; d += kLanes<F>) store(query + d, load(row + d) * p.scale);
    }
}

template <class F>
SPECS_INLINE void fill(F* data, int64_t count, F value) {
  for (int64_t i = 0; i < count; ++i) data[i] = value;
}

// Largest of: forward query, out, scores, max, vector sums; backward query, grad_out, grad_query, scores, dscores, slope, lse, delta.
template <class F>
int64_t scratch_size(int64_t rows, int64_t head_dim) {
  return rows * (3 * head_dim + 3 * kBlockKeys + 2 + kLanes<F>) + 3 * kPad;
}

// Takes a block of scores, VECTORS wide, into the running softmax of its rows: scores become exp(score - maximum), out is rescaled.
template <class F, int VECTORS>
__attribute__((noinline)) void softmax_block(int64_t M, int64_t D, F* scores, F* maximum, F* total, F* out) {
  for (int64_t m = 0; m < M; ++m) {
    F* row = scores + m * kBlockKeys;
    Vec<F> score[VECTORS];
    for (int n = 0; n < VECTORS; ++n) score[n] = load(row + n * kLanes<F>);
    Vec<F> top = score[0];
    for (int n = 1; n < VECTORS; ++n) top = larger<F>(score[n], top);
    const F old = maximum[m], block_top = max_lane<F>(top);
    const F now = block_top > old ? block_top : old;
    const F subtract = now == -kInfinity<F> ? 0 : now;  // a row that has seen nothing yet
    Vec<F> sum = load(total + m * kLanes<F>);
    if (old == -kInfinity<F>) {  // nothing to rescale yet
      maximum[m] = now;
    } else if (now != old) {
      const F shrink = vexp_bounded(splat<F>(old - now))[0];
      sum = sum * shrink;
      F* out_row = out + m * D;
      for (int64_t d = 0; d < D; d += kLanes<F>) store(out_row + d, load(out_row + d) * shrink);
      maximum[m] = now;
    }
    for (int n = 0; n < VECTORS; ++n) {
      const Vec<F> prob = vexp_bounded(score[n] - subtract);
      store(row + n * kLanes<F>, prob);
      sum += prob;
    }
    store(total + m * kLanes<F>, sum);
  }
}

template <class F, int VECTORS>
SPECS_INLINE void softmax_rows(int64_t vectors, int64_t M, int64_t D, F* scores, F* maximum, F* total, F* out) {
  if constexpr (VECTORS > 0) {
    if (vectors == VECTORS)
      softmax_block<F, VECTORS>(M, D, scores, maximum, total, out);
    else
      softmax_rows<F, VECTORS - 1>(vectors, M, D, scores, maximum, total, out);
  }
}

template <class F>
void forward_tile(const Attention<F>& p, const Tile& tile, int64_t kv_head, const ForwardResult<F>& result, F* scratch) {
  const int64_t M = (tile.end - tile.begin) * p.fold, D = p.head_dim;
  F* query = scratch;
  F* out = query + M * D;
  F* scores = out + M * D;
  F* total = scores + M * kBlockKeys;  // [M][lanes]
  F* maximum = total + M * kLanes<F>;
  load_query(p, tile, kv_head, query);
  fill<F>(out, M * D, 0);
  fill<F>(total, M * kLanes<F>, 0);
  fill<F>(maximum, M, -kInfinity<F>);
  for_each_block(p, tile, [&](const KeyBlock& block) __attribute__((always_inline)) {
    const int64_t width = used_width(block);
    block_scores<F>(p, tile, kv_head, block, M, query, scores, nullptr);
    softmax_rows<F, kBlockKeys / kLanes<F>>(width / kLanes<F>, M, D, scores, maximum, total, out);
    small_gemm<F, false>(M, D, block.count, scores, kBlockKeys, 1, p.value.at(block.first, kv_head), p.value.token_stride, out, D, true);
  });
  for (int64_t m = 0; m < M; ++m) {
    const int64_t token = tile.begin + m / p.fold, head = kv_head * p.fold + m % p.fold;
    const F sum = sum_lanes<F>(load(total + m * kLanes<F>));
    const F inverse = 1 / sum;
    F* row = result.out.at(token, head);
    for (int64_t d = 0; d < D; d += kLanes<F>) store(row + d, load(out + m * D + d) * inverse);
    result.lse[token * p.num_heads + head] = maximum[m] + (F)__builtin_log((double)sum);
  }
}

template <class F>
void backward_tile(const Attention<F>& p, const Tile& tile, int64_t kv_head, const Upstream<F>& up, const Gradients<F>& grads, F* scratch) {
  const int64_t M = (tile.end - tile.begin) * p.fold, D = p.head_dim;
  F* query = scratch;
  F* grad_out = query + M * D;
  F* grad_query = grad_out + M * D;
  F* probs = grad_query + M * D;
  F* dscores = probs + M * kBlockKeys;
  F* slope = dscores + M * kBlockKeys;
  F* lse = slope + M * kBlockKeys;
  F* delta = lse + M;
  load_query(p, tile, kv_head, query);
  fill<F>(grad_query, M * D, 0);
  for (int64_t m = 0; m < M; ++m) {
    const int64_t token = tile.begin + m / p.fold, head = kv_head * p.fold + m % p.fold;
    const F* from = up.grad_out.at(token, head);
    const F* out = up.out.at(token, head);
    Vec<F> dot{};
    for (int64_t d = 0; d < D; d += kLanes<F>) {
      const Vec<F> g = load(from + d);
      store(grad_out + m * D + d, g);
      dot += g * load(out + d);
    }
    const int64_t at = token * p.num_heads + head;
    lse[m] = up.lse[at];
    delta[m] = sum_lanes<F>(dot) - (up.grad_lse ? up.grad_lse[at] : 0);
  }
  for_each_block(p, tile, [&](const KeyBlock& block) __attribute__((always_inline)) {
    const int64_t width = used_width(block);
    const bool capped = p.softcap > 0;
    block_scores<F>(p, tile, kv_head, block, M, query, probs, capped ? slope : nullptr);
    const F* value_panel = p.value_panels + (kv_head * p.panel_columns + block.panel) * D;
    small_gemm<F, false>(M, width, D, grad_out, D, 1, value_panel, block.width, dscores, kBlockKeys, false);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t j = 0; j < width; j += kLanes<F>) {
        const int64_t at = m * kBlockKeys + j;
        const Vec<F> prob = vexp_bounded(load(probs + at) - lse[m]);
        store(probs + at, prob);
        Vec<F> ds = prob * (load(dscores + at) - delta[m]);
        if (capped) ds = ds * load(slope + at);
        store(dscores + at, ds);
      }
    const int64_t row = (block.first - grads.first_token) * grads.token_stride;
    small_gemm<F, true>(block.count, D, M, probs, 1, kBlockKeys, grad_out, D, grads.value + row, grads.token_stride, true);
    small_gemm<F, true>(block.count, D, M, dscores, 1, kBlockKeys, query, D, grads.key + row, grads.token_stride, true);
    small_gemm<F, false>(M, D, block.count, dscores, kBlockKeys, 1, p.key.at(block.first, kv_head), p.key.token_stride, grad_query, D, true);
  });
  for (int64_t m = 0; m < M; ++m) {
    F* row = grads.query.at(tile.begin + m / p.fold, kv_head * p.fold + m % p.fold);
    for (int64_t d = 0; d < D; d += kLanes<F>) store(row + d, load(grad_query + m * D + d) * p.scale);
  }
}

extern const AttentionKernels<float> attention_kernels_float;
extern const AttentionKernels<double> attention_kernels_double;
const AttentionKernels<float> attention_kernels_float = {scratch_size<float>, pack<float>, forward_tile<float>, backward_tile<float>};
const AttentionKernels<double> attention_kernels_double = {scratch_size<double>, pack<double>, forward_tile<double>, backward_tile<double>};

}  // namespace SPECS_ISA
}  // namespace specs
