#define SPECS_ISA avx512
#include "layers_kernel.h"
