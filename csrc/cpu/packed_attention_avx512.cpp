#define SPECS_ISA avx512
#include "packed_attention_kernel.h"
