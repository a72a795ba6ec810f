#define SPECS_ISA avx512
#include "linear_logprob_kernel.h"
