#define SPECS_ISA avx512
#include "row_pass_kernel.h"
