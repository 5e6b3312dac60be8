// Nearest neighbours: from panels whose matrix product is torch's, or of narrow rows by tiles.
#include "knn.cuh"

#include "kernels.h"

namespace hellm::cuda {

KernelTable knn_kernels() {
  static const Kernel kernels[] = {
      HELLM_KERNEL(knn_unit_kernel),     HELLM_KERNEL(knn_select_kernel),    HELLM_KERNEL(knn_crowded_kernel),
      HELLM_KERNEL(knn_scan_kernel<64>), HELLM_KERNEL(knn_scan_kernel<128>), HELLM_KERNEL(knn_scan_kernel<256>),
      HELLM_KERNEL(knn_rank_kernel),
  };
  return {kernels, int(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace hellm::cuda
