#define SPECS_ISA avx2
#include "layers_kernel.h"
