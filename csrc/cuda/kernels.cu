// The kernels of an operator for nvcc, compiled once for each file of device code.
#include "kernels.h"

#include HELLM_DEVICE_CODE
