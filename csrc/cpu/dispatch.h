// The widest instruction set that this library was built with and this processor runs.

#pragma once

namespace specs {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

inline Isa detect_isa() {
#if defined(SPECS_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

// Which one the kernels use: what the processor has, or less when a test asks for it.
Isa current_isa();

// A table of kernels, declared once in the namespace of every instruction set.
#if defined(SPECS_X86)
#define SPECS_BY_ISA(name) \
  (::specs::current_isa() >= ::specs::Isa::avx512 ? avx512::name : ::specs::current_isa() == ::specs::Isa::avx2 ? avx2::name : portable::name)
#else
#define SPECS_BY_ISA(name) portable::name
#endif

}  // namespace specs
