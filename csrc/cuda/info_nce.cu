// InfoNCE for each width of the operands; kParts 2 is float32 accuracy.
#include "info_nce.cuh"

#include "kernels.h"

namespace hellm::cuda {

KernelTable info_nce_kernels() {
  static const Kernel kernels[] = {
      HELLM_KERNEL(normalize_kernel<64>),
      HELLM_KERNEL(normalize_kernel<128>),
      HELLM_KERNEL(normalize_kernel<256>),
      HELLM_KERNEL(attention_kernel<64, 1, kRunning, false>),
      HELLM_KERNEL(attention_kernel<64, 1, kRunning, true>),
      HELLM_KERNEL(attention_kernel<64, 1, kByKey, true>),
      HELLM_KERNEL(attention_kernel<64, 2, kRunning, false>),
      HELLM_KERNEL(attention_kernel<64, 2, kRunning, true>),
      HELLM_KERNEL(attention_kernel<64, 2, kByKey, true>),
      HELLM_KERNEL(attention_kernel<128, 1, kRunning, false>),
      HELLM_KERNEL(attention_kernel<128, 1, kRunning, true>),
      HELLM_KERNEL(attention_kernel<128, 1, kByKey, true>),
      HELLM_KERNEL(attention_kernel<128, 2, kRunning, false>),
      HELLM_KERNEL(attention_kernel<128, 2, kRunning, true>),
      HELLM_KERNEL(attention_kernel<128, 2, kByKey, true>),
      HELLM_KERNEL(attention_kernel<256, 1, kRunning, false>),
      HELLM_KERNEL(attention_kernel<256, 1, kRunning, true>),
      HELLM_KERNEL(attention_kernel<256, 1, kByKey, true>),
      HELLM_KERNEL(info_nce_row_kernel<64>),
      HELLM_KERNEL(info_nce_row_kernel<128>),
      HELLM_KERNEL(info_nce_row_kernel<256>),
      HELLM_KERNEL(info_nce_gradient_kernel<64>),
      HELLM_KERNEL(info_nce_gradient_kernel<128>),
      HELLM_KERNEL(info_nce_gradient_kernel<256>),
  };
  return {kernels, int(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace hellm::cuda
