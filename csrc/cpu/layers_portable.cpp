#define SPECS_ISA portable
#include "layers_kernel.h"
