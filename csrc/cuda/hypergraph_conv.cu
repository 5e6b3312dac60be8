// The gathers for every storage type, with accesses of 16 bytes and of one value.
#include "hypergraph_conv.cuh"

#include "kernels.h"

namespace hellm::cuda {

KernelTable hypergraph_conv_kernels() {
  static const Kernel kernels[] = {
      HELLM_KERNEL(gather_kernel<float, float, 4>),
      HELLM_KERNEL(gather_kernel<float, float, 1>),
      HELLM_KERNEL(gather_kernel<float, BFloat16, 8>),
      HELLM_KERNEL(gather_kernel<float, BFloat16, 1>),
      HELLM_KERNEL(gather_kernel<float, Half, 8>),
      HELLM_KERNEL(gather_kernel<float, Half, 1>),
      HELLM_KERNEL(gather_kernel<double, double, 2>),
      HELLM_KERNEL(gather_kernel<double, double, 1>),
      HELLM_KERNEL(pack_kernel<float, 4>),
      HELLM_KERNEL(pack_kernel<float, 1>),
      HELLM_KERNEL(pack_kernel<BFloat16, 8>),
      HELLM_KERNEL(pack_kernel<BFloat16, 1>),
      HELLM_KERNEL(pack_kernel<Half, 8>),
      HELLM_KERNEL(pack_kernel<Half, 1>),
      HELLM_KERNEL(pack_kernel<double, 2>),
      HELLM_KERNEL(pack_kernel<double, 1>),
      HELLM_KERNEL(hub_store_kernel<float, 4>),
      HELLM_KERNEL(hub_store_kernel<float, 1>),
      HELLM_KERNEL(hub_store_kernel<double, 2>),
      HELLM_KERNEL(hub_store_kernel<double, 1>),
  };
  return {kernels, int(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace hellm::cuda
