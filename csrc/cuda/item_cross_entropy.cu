// item_cross_entropy for each width of the operands; kParts 2 is float32 accuracy.
#include "item_cross_entropy.cuh"

#include "kernels.h"

namespace hellm::cuda {

KernelTable item_cross_entropy_kernels() {
  static const Kernel kernels[] = {
      HELLM_KERNEL(table_maximum_kernel),
      HELLM_KERNEL(table_size_kernel),
      HELLM_KERNEL(table_halves_kernel<64>),
      HELLM_KERNEL(table_halves_kernel<128>),
      HELLM_KERNEL(table_halves_kernel<256>),
      HELLM_KERNEL(attention_kernel<64, 1, kRunningBiased, false>),
      HELLM_KERNEL(attention_kernel<64, 1, kRunningBiased, true>),
      HELLM_KERNEL(attention_kernel<64, 1, kByKeyBiased, true>),
      HELLM_KERNEL(attention_kernel<64, 2, kRunningBiased, false>),
      HELLM_KERNEL(attention_kernel<64, 2, kRunningBiased, true>),
      HELLM_KERNEL(attention_kernel<64, 2, kByKeyBiased, true>),
      HELLM_KERNEL(attention_kernel<128, 1, kRunningBiased, false>),
      HELLM_KERNEL(attention_kernel<128, 1, kRunningBiased, true>),
      HELLM_KERNEL(attention_kernel<128, 1, kByKeyBiased, true>),
      HELLM_KERNEL(attention_kernel<128, 2, kRunningBiased, false>),
      HELLM_KERNEL(attention_kernel<128, 2, kRunningBiased, true>),
      HELLM_KERNEL(attention_kernel<128, 2, kByKeyBiased, true>),
      HELLM_KERNEL(attention_kernel<256, 1, kRunningBiased, false>),
      HELLM_KERNEL(attention_kernel<256, 1, kRunningBiased, true>),
      HELLM_KERNEL(attention_kernel<256, 1, kByKeyBiased, true>),
      HELLM_KERNEL(item_row_kernel<64>),
      HELLM_KERNEL(item_row_kernel<128>),
      HELLM_KERNEL(item_row_kernel<256>),
      HELLM_KERNEL(item_gradient_kernel<64>),
      HELLM_KERNEL(item_gradient_kernel<128>),
      HELLM_KERNEL(item_gradient_kernel<256>),
  };
  return {kernels, int(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace hellm::cuda
