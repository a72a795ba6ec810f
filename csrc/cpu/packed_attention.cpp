// packed_attention on CPU: cuts the forest into tiles, hands them to threads, and owns the order in which sums are formed.
//
// Forward tasks are (tile, key head). Backward tasks are (part of a tree, key head): a task alone writes its keys' and values' gradients. A
// tree with many visible pairs is cut into parts, each after the first with a gradient buffer of its own, added in order at the end. How
// a tree is cut depends on the layout only, so results do not depend on the number of threads.

#include "packed_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "workers.h"

namespace specs {
namespace {

using torch::stable::Tensor;

constexpr int64_t kPairsPerPart = 1 << 18;
constexpr int64_t kMaxParts = 8;

template <class F>
const AttentionKernels<F>& kernels() {
  constexpr bool single = sizeof(F) == 4;
#if defined(SPECS_X86)
  if (current_isa() >= Isa::avx512) {
    if constexpr (single) return avx512::attention_kernels_float;
    else return avx512::attention_kernels_double;
  }
  if (current_isa() == Isa::avx2) {
    if constexpr (single) return avx2::attention_kernels_float;
    else return avx2::attention_kernels_double;
  }
#endif
  if constexpr (single) return portable::attention_kernels_float;
  else return portable::attention_kernels_double;
}

template <class F>
Rows<const F> rows_of(const Tensor& x) {
  return {static_cast<const F*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

template <class F>
Rows<F> mutable_rows_of(const Tensor& x) {
  return {static_cast<F*>(x.mutable_data_ptr()), x.stride(0), x.stride(1)};
}

struct CostedTile {
  Tile tile;
  int64_t pairs;
};

// A contiguous range of tiles of one tree. buffer: -1 writes the gradients themselves, else which private buffer.
struct Part {
  int64_t first_tile, last_tile, first_token, end_token, pairs, buffer_offset;
};

struct Plan {
  const Run* runs;
  int64_t num_runs;
  std::vector<int64_t> panel_offsets;
  int64_t panel_columns = 0;
  std::vector<CostedTile> tiles;  // in token order
  int64_t longest_tile = 0;       // tokens

  Plan(const Tensor& runs_tensor, int64_t fold, int64_t window)
      : runs(static_cast<const Run*>(runs_tensor.const_data_ptr())), num_runs(runs_tensor.size(0)) {
    const int64_t step = std::max<int64_t>(1, kTileRows / fold);
    panel_offsets.reserve(num_runs);
    for (int64_t r = 0; r < num_runs; ++r) {
      const Run& run = runs[r];
      panel_offsets.push_back(panel_columns);
      panel_columns += (run.end - run.start + kPad - 1) / kPad * kPad;
      const int64_t length = run.end - run.start, count = (length + step - 1) / step;
      for (int64_t i = 0; i < count; ++i) {  // of equal size, give or take a token
        const int64_t begin = run.start + length * i / count, end = run.start + length * (i + 1) / count;
        int64_t keys = run.position + (end - run.start);
        if (window > 0 && window < keys) keys = std::min(keys, window + (end - begin));
        tiles.push_back({{r, begin, end}, keys * (end - begin)});
        longest_tile = std::max(longest_tile, end - begin);
      }
    }
  }

  // Tiles of each tree, cut by visible pairs.
  std::vector<Part> parts(int64_t* buffer_tokens) const {
    std::vector<Part> result;
    *buffer_tokens = 0;
    std::size_t tile = 0;
    for (int64_t root = 0; root < num_runs;) {
      int64_t next = root + 1;
      while (next < num_runs && runs[next].parent >= 0) ++next;
      std::size_t last = tile;
      int64_t pairs = 0;
      for (; last < tiles.size() && tiles[last].tile.run < next; ++last) pairs += tiles[last].pairs;
      const int64_t count = std::clamp<int64_t>(pairs / kPairsPerPart, 1, kMaxParts);
      const int64_t begin = runs[root].start, end = runs[next - 1].end;
      int64_t done = 0;
      for (int64_t part = 0; part < count && tile < last; ++part) {
        const int64_t until = pairs / count * (part + 1);
        Part p{static_cast<int64_t>(tile), 0, begin, end, 0, -1};
        while (tile < last && (part + 1 == count || done < until || p.pairs == 0)) {
          p.pairs += tiles[tile].pairs;
          done += tiles[tile].pairs;
          ++tile;
        }
        p.last_tile = static_cast<int64_t>(tile);
        if (part > 0) {
          p.buffer_offset = *buffer_tokens;
          *buffer_tokens += end - begin;
        }
        result.push_back(p);
      }
      root = next;
    }
    return result;
  }
};

std::vector<int64_t> longest_first(std::vector<int64_t> cost) {
  std::vector<int64_t> order(cost.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
  return order;
}

template <class F>
void pack_panels(const Plan& plan, const Rows<const F>& rows, int64_t num_kv_heads, int64_t head_dim, F* panels) {
  run_tasks(plan.num_runs * num_kv_heads, [&] {
    return [&](int64_t task) {
      const int64_t head = task / plan.num_runs, run = task % plan.num_runs;
      const int64_t column = head * plan.panel_columns + plan.panel_offsets[run];
      kernels<F>().pack(rows, head, plan.runs[run], head_dim, panels + column * head_dim);
    };
  });
}

template <class F>
Attention<F> problem(
    const Plan& plan, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& visible_from, double scale, double softcap,
    int64_t window) {
  Attention<F> p;
  p.query = rows_of<F>(query);
  p.key = rows_of<F>(key);
  p.value = rows_of<F>(value);
  p.num_heads = query.size(1);
  p.num_kv_heads = key.size(1);
  p.fold = p.num_heads / p.num_kv_heads;
  p.head_dim = query.size(2);
  p.scale = static_cast<F>(scale);
  p.softcap = static_cast<F>(softcap);
  p.window = window;
  p.visible_from = static_cast<const int32_t*>(visible_from.const_data_ptr());
  p.runs = plan.runs;
  p.panel_offsets = plan.panel_offsets.data();
  p.panel_columns = plan.panel_columns;
  p.key_panels = p.value_panels = nullptr;
  return p;
}

template <class F>
void forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& visible_from, const Tensor& runs, double scale, double softcap,
    int64_t window, const Tensor& out, const Tensor& lse) {
  const Plan plan(runs, query.size(1) / key.size(1), window);
  Attention<F> p = problem<F>(plan, query, key, value, visible_from, scale, softcap, window);
  const Buffer<F> key_panels(p.num_kv_heads * plan.panel_columns * p.head_dim);
  pack_panels<F>(plan, p.key, p.num_kv_heads, p.head_dim, key_panels.data());
  p.key_panels = key_panels.data();
  const ForwardResult<F> result{mutable_rows_of<F>(out), static_cast<F*>(lse.mutable_data_ptr())};
  std::vector<int64_t> cost;
  for (const CostedTile& tile : plan.tiles) cost.push_back(tile.pairs);
  const std::vector<int64_t> order = longest_first(std::move(cost));
  const int64_t scratch = kernels<F>().scratch(plan.longest_tile * p.fold, p.head_dim);
  run_tasks(static_cast<int64_t>(order.size()) * p.num_kv_heads, [&] {
    return [&, buffer = Buffer<F>(scratch)](int64_t task) {
      const Tile& tile = plan.tiles[order[task / p.num_kv_heads]].tile;
      kernels<F>().forward(p, tile, task % p.num_kv_heads, result, buffer.data());
    };
  });
}

template <class F>
void backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const Tensor& visible_from, const Tensor& runs, double scale, double softcap, int64_t window, const Tensor& grad_query,
    const Tensor& grad_key, const Tensor& grad_value) {
  const Plan plan(runs, query.size(1) / key.size(1), window);
  Attention<F> p = problem<F>(plan, query, key, value, visible_from, scale, softcap, window);
  const int64_t panels = p.num_kv_heads * plan.panel_columns * p.head_dim;
  const Buffer<F> key_panels(panels), value_panels(panels);
  pack_panels<F>(plan, p.key, p.num_kv_heads, p.head_dim, key_panels.data());
  pack_panels<F>(plan, p.value, p.num_kv_heads, p.head_dim, value_panels.data());
  p.key_panels = key_panels.data();
  p.value_panels = value_panels.data();
  const Upstream<F> upstream{
      rows_of<F>(grad_out), grad_lse ? static_cast<const F*>(grad_lse->const_data_ptr()) : nullptr, rows_of<F>(out),
      static_cast<const F*>(lse.const_data_ptr())};

  int64_t buffer_tokens = 0;
  const std::vector<Part> parts = plan.parts(&buffer_tokens);
  const int64_t token_stride = p.num_kv_heads * p.head_dim;  // of the gradients and of the private buffers
  const Buffer<F> private_key(buffer_tokens * token_stride), private_value(buffer_tokens * token_stride);
  F* const key_data = static_cast<F*>(grad_key.mutable_data_ptr());
  F* const value_data = static_cast<F*>(grad_value.mutable_data_ptr());
  const auto rows_of_part = [&](const Part& part, F* total, F* buffers) {
    return part.buffer_offset < 0 ? total + part.first_token * token_stride : buffers + part.buffer_offset * token_stride;
  };

  std::vector<int64_t> cost;
  for (const Part& part : parts) cost.push_back(part.pairs);
  const std::vector<int64_t> order = longest_first(std::move(cost));
  const int64_t scratch = kernels<F>().scratch(plan.longest_tile * p.fold, p.head_dim);
  run_tasks(static_cast<int64_t>(order.size()) * p.num_kv_heads, [&] {
    return [&, buffer = Buffer<F>(scratch)](int64_t task) {
      const Part& part = parts[order[task / p.num_kv_heads]];
      const int64_t head = task % p.num_kv_heads;
      F* const keys = rows_of_part(part, key_data, private_key.data()) + head * p.head_dim;
      F* const values = rows_of_part(part, value_data, private_value.data()) + head * p.head_dim;
      for (int64_t token = 0; token < part.end_token - part.first_token; ++token) {
        std::memset(keys + token * token_stride, 0, p.head_dim * sizeof(F));
        std::memset(values + token * token_stride, 0, p.head_dim * sizeof(F));
      }
      const Gradients<F> gradients{mutable_rows_of<F>(grad_query), keys, values, token_stride, part.first_token};
      for (int64_t tile = part.first_tile; tile < part.last_tile; ++tile)
        kernels<F>().backward(p, plan.tiles[tile].tile, head, upstream, gradients, buffer.data());
    };
  });
  if (buffer_tokens == 0) return;
  // Each token row belongs to one tree; its parts are added in order.
  for (const Part& part : parts) {
    if (part.buffer_offset < 0) continue;
    const int64_t count = (part.end_token - part.first_token) * token_stride;
    const F *key_part = rows_of_part(part, key_data, private_key.data()), *value_part = rows_of_part(part, value_data, private_value.data());
    F *key_total = key_data + part.first_token * token_stride, *value_total = value_data + part.first_token * token_stride;
    torch::stable::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) key_total[i] += key_part[i];
      for (int64_t i = begin; i < end; ++i) value_total[i] += value_part[i];
    });
  }
}

bool is_double(const Tensor& x) {
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == torch::headeronly::ScalarType::Float || dtype == torch::headeronly::ScalarType::Double,
      "packed_attention native: query, key and value must be float32 or float64");
  return dtype == torch::headeronly::ScalarType::Double;
}

// Nothing is read of an empty tensor, whatever its strides.
bool last_is_contiguous(const Tensor& x) { return x.size(0) == 0 || x.stride(2) == 1; }

// The public Python function has checked shapes, dtypes and devices with messages for people; these hold what memory safety needs.
void check(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& visible_from, const Tensor& runs) {
  const bool shapes = query.dim() == 3 && key.dim() == 3 && value.dim() == 3 && key.size(0) == query.size(0) && value.size(0) == query.size(0) &&
                      key.size(1) == value.size(1) && key.size(1) > 0 && query.size(1) % key.size(1) == 0 && key.size(2) == query.size(2) &&
                      value.size(2) == query.size(2) && query.size(2) > 0 && query.size(2) % kPad == 0;
  STD_TORCH_CHECK(shapes, "packed_attention native: query [T, H, D], key and value [T, Hkv, D], D a multiple of 16, H of Hkv");
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(), "packed_attention native: one dtype");
  STD_TORCH_CHECK(
      last_is_contiguous(query) && last_is_contiguous(key) && last_is_contiguous(value), "packed_attention native: the last dimension must be contiguous");
  STD_TORCH_CHECK(
      visible_from.dim() == 1 && visible_from.size(0) == query.size(0) && visible_from.is_contiguous() &&
          visible_from.scalar_type() == torch::headeronly::ScalarType::Int,
      "packed_attention native: visible_from must be int32 [T]");
  STD_TORCH_CHECK(
      runs.dim() == 2 && runs.size(1) == 4 && runs.is_contiguous() && runs.scalar_type() == torch::headeronly::ScalarType::Long,
      "packed_attention native: runs must be int64 [runs, 4]");
  const Run* r = static_cast<const Run*>(runs.const_data_ptr());
  int64_t covered = 0, root = 0;
  for (int64_t i = 0; i < runs.size(0); ++i) {
    STD_TORCH_CHECK(
        r[i].start == covered && r[i].end >= r[i].start && r[i].parent >= -1 && r[i].parent < i && (i > 0 || r[i].parent == -1),
        "packed_attention native: runs must cover the row in order, each below an earlier one");
    const Run* above = r[i].parent < 0 ? nullptr : r + r[i].parent;
    if (!above) root = i;
    STD_TORCH_CHECK(
        (!above || r[i].parent >= root) && r[i].position >= (above ? above->position : 0) &&
            r[i].position <= (above ? above->position + (above->end - above->start) : 0),
        "packed_attention native: a run must be below one of its own tree and begin where that has a token or ends");
    covered = r[i].end;
  }
  STD_TORCH_CHECK(covered == query.size(0), "packed_attention native: runs must cover every token");
}

std::tuple<Tensor, Tensor> packed_attention_forward(
    Tensor query, Tensor key, Tensor value, Tensor visible_from, Tensor runs, double scale, double softcap, int64_t window) {
  check(query, key, value, visible_from, runs);
  Tensor out = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)});
  Tensor lse = torch::stable::new_empty(query, {query.size(0), query.size(1)});
  if (is_double(query))
    forward<double>(query, key, value, visible_from, runs, scale, softcap, window, out, lse);
  else
    forward<float>(query, key, value, visible_from, runs, scale, softcap, window, out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor visible_from,
    Tensor runs, double scale, double softcap, int64_t window) {
  check(query, key, value, visible_from, runs);
  for (const Tensor* x : {&grad_out, &out}) {
    const bool same = x->dim() == 3 && x->size(0) == query.size(0) && x->size(1) == query.size(1) && x->size(2) == query.size(2) &&
                      last_is_contiguous(*x) && x->scalar_type() == query.scalar_type();
    STD_TORCH_CHECK(same, "packed_attention native: grad_out and out must be like query, the last dimension contiguous");
  }
  for (const Tensor* x : {&lse, grad_lse ? &*grad_lse : &lse}) {
    const bool same = x->dim() == 2 && x->size(0) == query.size(0) && x->size(1) == query.size(1) && x->is_contiguous() &&
                      x->scalar_type() == query.scalar_type();
    STD_TORCH_CHECK(same, "packed_attention native: lse and its gradient must be contiguous [T, H] in the dtype of query");
  }
  Tensor grad_query = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)});
  Tensor grad_key = torch::stable::new_empty(key, {key.size(0), key.size(1), key.size(2)});
  Tensor grad_value = torch::stable::new_empty(key, {key.size(0), key.size(1), key.size(2)});
  if (is_double(query))
    backward<double>(grad_out, grad_lse, query, key, value, out, lse, visible_from, runs, scale, softcap, window, grad_query, grad_key, grad_value);
  else
    backward<float>(grad_out, grad_lse, query, key, value, out, lse, visible_from, runs, scale, softcap, window, grad_query, grad_key, grad_value);
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace specs

STABLE_TORCH_LIBRARY_FRAGMENT(specs_kernels, m) {
  m.def(
      "packed_attention_forward(Tensor query, Tensor key, Tensor value, Tensor visible_from, Tensor runs, float scale, float softcap, "
      "int window) -> (Tensor, Tensor)");
  m.def(
      "packed_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor visible_from, Tensor runs, float scale, float softcap, int window) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(specs_kernels, CPU, m) {
  m.impl("packed_attention_forward", TORCH_BOX(&specs::packed_attention_forward));
  m.impl("packed_attention_backward", TORCH_BOX(&specs::packed_attention_backward));
}
