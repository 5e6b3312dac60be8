// Launches by name: no allocation, no synchronisation.
#include "launch.h"

#include <cuda_runtime.h>

#include <unordered_map>

#include "kernels.h"

namespace hellm::cuda {
namespace {

constexpr unsigned kSharedBytesWithoutAsking = 48 * 1024;

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the next call starts afresh
  const bool driver = status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice ||
                      status == cudaErrorUnsupportedPtxVersion || status == cudaErrorSystemDriverMismatch ||
                      status == cudaErrorCompatNotSupportedOnDevice;
  std::string help;
  if (driver) {
    help = "; this build needs an NVIDIA driver for CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
           std::to_string(CUDART_VERSION % 1000 / 10) + " or newer";
  } else if (status == cudaErrorNoKernelImageForDevice) {
    help = std::string("; the kernels were compiled for compute capability ") + architectures();
  }
  throw std::runtime_error("CUDA error " + std::to_string(int(status)) + " at " + what + ": " +
                           cudaGetErrorString(status) + help);
}

const void* find(const std::string& name) {
  static const auto* const functions = [] {
    auto* const all = new std::unordered_map<std::string, const void*>;
    for (const Kernel& kernel : kernels()) (*all)[kernel.name] = kernel.function;
    return all;
  }();
  const auto found = functions->find(name);
  if (found == functions->end()) throw std::logic_error("no kernel " + name);
  return found->second;
}

}  // namespace

const char* architectures() { return HELLM_CUDA_ARCHITECTURES; }

Queue launcher(int device, void* stream) {
  check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
  return [stream](const Launch& launch) {
    const void* const function = find(launch.kernel);
    if (launch.shared_bytes > kSharedBytesWithoutAsking) {
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(launch.shared_bytes)),
            launch.kernel);
    }
    void* arguments[] = {const_cast<void*>(launch.parameters)};
    const dim3 grid(launch.grid[0], launch.grid[1], launch.grid[2]), block(launch.threads);
    check(cudaLaunchKernel(function, grid, block, arguments, launch.shared_bytes, static_cast<cudaStream_t>(stream)),
          launch.kernel);
  };
}

}  // namespace hellm::cuda
