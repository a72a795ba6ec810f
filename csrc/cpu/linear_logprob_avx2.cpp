#define SPECS_ISA avx2
#include "linear_logprob_kernel.h"
