#define SPECS_ISA portable
#include "row_pass_kernel.h"
