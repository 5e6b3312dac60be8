// The kernels by name: how a launch plan, which is plain C++, finds what nvcc compiled.
#pragma once

#include <initializer_list>
#include <vector>

namespace hellm::cuda {

struct Kernel {
  const char* name;
  const void* function;
};

// All that were compiled.
inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

struct AddKernels {
  AddKernels(std::initializer_list<Kernel> more) { kernels().insert(kernels().end(), more); }
};

// At the end of a file of device code: HELLM_KERNELS(HELLM_KERNEL(...), ...), the instances that plans name.
#define HELLM_KERNEL(...) {#__VA_ARGS__, reinterpret_cast<const void*>(&__VA_ARGS__)}
#define HELLM_JOINED(left, right) left##right
#define HELLM_NAMED(name, number) HELLM_JOINED(name, number)
#define HELLM_KERNELS(...)                                               \
  namespace hellm::cuda {                                                \
  static const AddKernels HELLM_NAMED(kAdded, __COUNTER__){__VA_ARGS__}; \
  }

}  // namespace hellm::cuda
