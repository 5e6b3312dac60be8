// What the binding of an operator is made of: addresses and sizes in, typed calls out, without the interpreter lock.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cuda/plan.h"
#include "dtype.h"
#if defined(HELLM_CUDA)
#include "cuda/launch.h"
#endif

namespace hellm::binding {

namespace py = pybind11;
using Address = uintptr_t;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// What defines the functions of an operator in the module. Each operator has one, which adds itself to the list.
class Operator {
 public:
  using Define = void (*)(py::module_&);

  explicit Operator(Define define) { all().push_back(define); }
  static std::vector<Define>& all();
};

// What asks, in the main thread, whether a signal came whose handler raised; null in another.
bool (*interruption_by_signals())();

// Runs the kernel of the instruction set in use, of those that HELLM_CPU_KERNEL declared.
template <typename Arguments>
void run(const cpu::Kernel<Arguments>* kernels, const Arguments& arguments) {
  cpu::Interruption interruption(interruption_by_signals());
  {
    const py::gil_scoped_release unlocked;
    kernels[cpu::instruction_set()](arguments, interruption);
  }
  if (interruption.requested()) throw py::error_already_set();
}

// plan_<name>: the launches, as (kernel, grid, threads, shared bytes, parameters). cuda_<name>, where nvcc compiled the
// kernels: launches them; the last two arguments are the device and the stream. device_code[name] is the file of the
// kernels. Addresses are those of device memory.
template <typename Arguments, typename... P>
void define_plan(py::module_& m, const std::string& name, const char* device_code, Arguments (*arguments)(P...),
                 void (*plan)(const Arguments&, const cuda::Queue&)) {
  m.attr("device_code")[py::str(name)] = device_code;
  m.def(("plan_" + name).c_str(), [=](P... p) {
    py::list launches;
    plan(arguments(p...), [&](const cuda::Launch& launch) {
      launches.append(py::make_tuple(launch.kernel, py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]),
                                     launch.threads, launch.shared_bytes,
                                     py::bytes(static_cast<const char*>(launch.parameters), launch.parameter_bytes)));
    });
    return launches;
  });
#if defined(HELLM_CUDA)
  m.def(("cuda_" + name).c_str(), [=](P... p, int device, Address stream) {
    const py::gil_scoped_release unlocked;
    plan(arguments(p...), cuda::launcher(device, at(stream)));
  });
#endif
}

}  // namespace hellm::binding
