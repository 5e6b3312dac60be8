// The module: what its operators define, and which instruction set is in use.
#include "binding.h"

#include <stdexcept>

#include "cpu/limits.h"

HELLM_CPU_KERNEL(multiply_adds, hellm::MultiplyAddArguments)
HELLM_CPU_KERNEL(gathers, hellm::GatherArguments)

namespace hellm::binding {
namespace {

// Python runs its signal handlers in the main thread alone.
bool in_main_thread() {
  static const py::handle main_thread = py::object(py::module_::import("threading").attr("main_thread")).release();
  return main_thread().attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
}

// Runs the handlers of the signals that came; true if one of them raised, as that of Ctrl-C does.
bool signal_raises() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool raises = PyErr_CheckSignals() != 0;
  PyGILState_Release(state);
  return raises;
}

py::list instruction_sets() {
  py::list names;
  for (int set = 0; set < cpu::kNumInstructionSets; ++set) {
    if (cpu::kInstructionSets[set].supported()) names.append(cpu::kInstructionSets[set].name);
  }
  return names;
}

void use_instruction_set(const std::string& name) {
  if (!cpu::use_instruction_set(name.c_str())) {
    throw std::invalid_argument("instruction set must be one of instruction_sets(), got " + name);
  }
}

float multiply_adds(double operations, int num_threads) {
  float result = 0;
  run(cpu::multiply_adds, MultiplyAddArguments{operations, 0.5f, 0.5f, &result, num_threads});
  return result;
}

void gathers(Address x, Address index, Address out, int64_t count, int64_t dim, int64_t num_rows, int num_threads) {
  run(cpu::gathers,
      GatherArguments{at<float>(x), at<int32_t>(index), at<float>(out), count, dim, num_rows, num_threads});
}

const char* cuda_architectures() {
#if defined(HELLM_CUDA)
  return cuda::architectures();
#else
  return "";
#endif
}

}  // namespace

std::vector<Operator::Define>& Operator::all() {
  static std::vector<Define> operators;
  return operators;
}

bool (*interruption_by_signals())() { return in_main_thread() ? &signal_raises : nullptr; }

}  // namespace hellm::binding

PYBIND11_MODULE(_C, m) {
  using namespace hellm::binding;
  m.doc() = "Compiled kernels of hellm.ops. Addresses are those of contiguous tensors; nothing is checked here.";
  m.attr("device_code") = py::dict();
  for (const Operator::Define define : Operator::all()) define(m);
  m.def("cuda_architectures", &cuda_architectures, "Compute capabilities of the compiled kernels; none without nvcc.");
  m.def("instruction_sets", &instruction_sets, "Names of the usable instruction sets, widest first.");
  m.def(
      "instruction_set", [] { return hellm::cpu::kInstructionSets[hellm::cpu::instruction_set()].name; },
      "The instruction set in use.");
  m.def("multiply_adds", &multiply_adds,
        "Float32 multiply-adds in registers, so many operations: a processor's limit.");
  m.def("gathers", &gathers, "Sums of rows of a float32 table: the limit of what gathers rows.");
  m.def("use_fused_pairs", &hellm::cpu::use_fused_pairs,
        "Whether VNNI instructions are used where the processor has them.");
  m.def("use_instruction_set", &use_instruction_set, "Use the kernels compiled for one instruction set.");
}
