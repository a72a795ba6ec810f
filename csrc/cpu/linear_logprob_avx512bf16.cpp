#define SPECS_ISA avx512bf16
#include "linear_logprob_bf16_kernel.h"
