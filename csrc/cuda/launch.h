// The compiled kernels of a plan on a device. There in builds with nvcc only.
#pragma once

#include "plan.h"

namespace hellm::cuda {

// Puts launches on a stream of a device. Throws std::runtime_error with what the driver says and what helps.
Queue launcher(int device, void* stream);

// Compute capabilities the kernels were compiled for, as "80;90a;120".
const char* architectures();

}  // namespace hellm::cuda
