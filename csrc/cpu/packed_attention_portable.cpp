#define SPECS_ISA portable
#include "packed_attention_kernel.h"
