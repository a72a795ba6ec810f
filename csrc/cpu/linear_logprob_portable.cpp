#define SPECS_ISA portable
#include "linear_logprob_kernel.h"
