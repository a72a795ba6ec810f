#define SPECS_ISA avx2
#include "packed_attention_kernel.h"
