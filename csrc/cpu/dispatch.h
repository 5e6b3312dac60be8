// The CPU kernels were compiled once for each instruction set; one set is in use.
#pragma once

#include "interruption.h"

namespace hellm::cpu {

struct InstructionSet {
  const char* name;
  bool (*supported)();
};

// Widest first, as the kernels of HELLM_CPU_KERNEL. Those that this processor cannot run are included.
extern const InstructionSet* const kInstructionSets;
extern const int kNumInstructionSets;

// The place of the one in use: the widest supported one unless use_instruction_set chose another.
int instruction_set();

// False if there is none of that name or the processor cannot run it.
bool use_instruction_set(const char* name);

// Whether one instruction (VNNI) multiplies 16-bit pairs and adds to their sums, in vectors of so many bytes: where the
// processor has it, unless use_fused_pairs said no. Sums are exact, so that results are the same bits.
bool fused_pairs(int vector_bytes);
void use_fused_pairs(bool use);

// Whether this processor and its system have tiles of bfloat16 (AMX).
bool bfloat16_tiles();

template <typename Arguments>
using Kernel = void (*)(const Arguments&, Interruption&);

// Declares hellm::cpu::<kernel>, an operator's kernel for each instruction set.
#define HELLM_CPU_KERNEL_OF(isa, kernel, Arguments) \
  namespace isa {                                   \
  void kernel(const Arguments&, Interruption&);     \
  }
#if defined(HELLM_X86)
#define HELLM_CPU_KERNEL(kernel, Arguments)                                                          \
  namespace hellm::cpu {                                                                             \
  HELLM_CPU_KERNEL_OF(avx512, kernel, Arguments)                                                     \
  HELLM_CPU_KERNEL_OF(avx2, kernel, Arguments)                                                       \
  HELLM_CPU_KERNEL_OF(portable, kernel, Arguments)                                                   \
  static constexpr Kernel<Arguments> kernel[] = {&avx512::kernel, &avx2::kernel, &portable::kernel}; \
  }
#else
#define HELLM_CPU_KERNEL(kernel, Arguments)                          \
  namespace hellm::cpu {                                             \
  HELLM_CPU_KERNEL_OF(portable, kernel, Arguments)                   \
  static constexpr Kernel<Arguments> kernel[] = {&portable::kernel}; \
  }
#endif

}  // namespace hellm::cpu
