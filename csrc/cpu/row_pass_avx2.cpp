#define SPECS_ISA avx2
#include "row_pass_kernel.h"
