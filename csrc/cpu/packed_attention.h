// What the driver (packed_attention.cpp) and the kernels of each instruction set agree on.
//
// A *run* is a piece of the row in which every token sees all earlier tokens of the piece. A token sees its own run up to itself (or to the
// end of its bidirectional span), and the runs above it, each up to the position at which the next one down begins.
//
// Letters: T tokens, H query heads, K key/value heads, G = H / K, D head size (a multiple of kPad).

#pragma once

#include <stdint.h>

namespace specs {

constexpr int64_t kPad = 16;        // columns of a panel and head sizes are multiples of this, for every vector width
constexpr int64_t kBlockKeys = 64;  // keys that are multiplied at a time
constexpr int64_t kTileRows = 64;   // query rows (tokens x G) of a tile, about

struct Run {
  int64_t start, end;  // tokens
  int64_t parent;      // the run above, or -1
  int64_t position;    // index of the first token along its path
};

// [T, heads, D] with contiguous D.
template <class F>
struct Rows {
  F* data;
  int64_t token_stride, head_stride;
  __attribute__((always_inline)) F* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

template <class F>
struct Attention {
  Rows<const F> query, key, value;
  int64_t num_heads, num_kv_heads, fold, head_dim;  // fold is G
  F scale, softcap;                                 // softcap 0: none
  int64_t window;                                   // 0: none
  const int32_t* visible_from;                      // [T]
  const Run* runs;
  const int64_t* panel_offsets;  // per run: its first column among the panels of one head
  int64_t panel_columns;         // columns of one head
  const F* key_panels;           // [K][panel_columns * D]: per run, blocks of kBlockKeys keys, each transposed to [D][width]
  const F* value_panels;         // the same of the values; backward only
};

template <class F>
struct ForwardResult {
  Rows<F> out;
  F* lse;  // [T, H]
};

template <class F>
struct Upstream {
  Rows<const F> grad_out;
  const F* grad_lse;  // [T, H] or null
  Rows<const F> out;
  const F* lse;  // [T, H]
};

template <class F>
struct Gradients {
  Rows<F> query;
  // Rows of this task's keys and values: added to, without other writers. Token t is at row t - first_token.
  F *key, *value;
  int64_t token_stride, first_token;
};

// Queries [begin, end) of one run.
struct Tile {
  int64_t run, begin, end;
};

template <class F>
struct AttentionKernels {
  int64_t (*scratch)(int64_t rows, int64_t head_dim);  // elements of F that a tile of so many rows needs
  void (*pack)(const Rows<const F>& rows, int64_t head, const Run& run, int64_t head_dim, F* panels);
  void (*forward)(const Attention<F>&, const Tile&, int64_t kv_head, const ForwardResult<F>&, F* scratch);
  void (*backward)(const Attention<F>&, const Tile&, int64_t kv_head, const Upstream<F>&, const Gradients<F>&, F* scratch);
};

#define SPECS_DECLARE_ATTENTION(isa)                              \
  namespace isa {                                                 \
  extern const AttentionKernels<float> attention_kernels_float;   \
  extern const AttentionKernels<double> attention_kernels_double; \
  }
SPECS_DECLARE_ATTENTION(portable)
SPECS_DECLARE_ATTENTION(avx2)
SPECS_DECLARE_ATTENTION(avx512)
#undef SPECS_DECLARE_ATTENTION

}  // namespace specs
