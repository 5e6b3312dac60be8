// Selection of nearest neighbours; the matrix product between the kernels is torch's.
#include "knn.cuh"

#include "kernels.h"

namespace hellm::cuda {

KernelTable knn_kernels() {
  static const Kernel kernels[] = {
      HELLM_KERNEL(knn_unit_kernel),
      HELLM_KERNEL(knn_select_kernel),
      HELLM_KERNEL(knn_crowded_kernel),
  };
  return {kernels, int(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace hellm::cuda
