// Hopper's copies, barriers and products on the host, for kernels that include csrc/cuda/hopper.
#pragma once

#include "hopper_memory.h"
#include "hopper_products.h"
