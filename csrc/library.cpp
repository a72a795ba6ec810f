// The library specs_kernels/_C: what it runs on. Each op registers itself in its own file.

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>

#include "cpu/dispatch.h"

namespace specs {
namespace {

std::atomic<int> wanted_isa{static_cast<int>(Isa::avx512_bf16)};

}  // namespace

Isa current_isa() {
  static const Isa detected = detect_isa();
  const int wanted = wanted_isa.load(std::memory_order_relaxed);
  return wanted < static_cast<int>(detected) ? static_cast<Isa>(wanted) : detected;
}

namespace {

int64_t native_isa() { return static_cast<int64_t>(current_isa()); }

// Of the sources, so that Python does not run a library built from others (native.py).
int64_t native_fingerprint() { return SPECS_FINGERPRINT; }

// For tests: use at most this instruction set. Returns what will be used.
int64_t native_limit_isa(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= static_cast<int64_t>(Isa::avx512_bf16), "isa must be 0 (portable), 1 (avx2), 2 (avx512) or 3 (avx512_bf16)");
  wanted_isa.store(static_cast<int>(isa));
  return native_isa();
}

}  // namespace
}  // namespace specs

STABLE_TORCH_LIBRARY(specs_kernels, m) {
  m.def("native_isa() -> int");
  m.def("native_fingerprint() -> int");
  m.def("native_limit_isa(int isa) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(specs_kernels, CompositeExplicitAutograd, m) {
  m.impl("native_isa", TORCH_BOX(&specs::native_isa));
  m.impl("native_fingerprint", TORCH_BOX(&specs::native_fingerprint));
  m.impl("native_limit_isa", TORCH_BOX(&specs::native_limit_isa));
}
