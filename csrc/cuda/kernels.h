// The kernels by name: how a launch plan, which is plain C++, finds what nvcc compiled.
#pragma once

namespace hellm::cuda {

struct Kernel {
  const char* name;
  const void* function;
};

#define HELLM_KERNEL(...) {#__VA_ARGS__, reinterpret_cast<const void*>(&__VA_ARGS__)}

struct KernelTable {
  const Kernel* kernels;
  int count;
};

KernelTable hypergraph_conv_kernels();
KernelTable info_nce_kernels();
KernelTable item_cross_entropy_kernels();
KernelTable knn_kernels();

}  // namespace hellm::cuda
