#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(HELLM_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hellm::cpu {
namespace {

const InstructionSet kSets[] = {
#if defined(HELLM_X86)
    {"avx512",
     [] {
       return bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2"));
     }},
    {"avx2", [] { return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")); }},
#endif
    {"portable", [] { return true; }},
};

int widest() {
  int set = 0;
  while (!kSets[set].supported()) ++set;
  return set;
}

std::atomic<int>& chosen() {
  static std::atomic<int> set{widest()};
  return set;
}

std::atomic<bool> fuses{true};

}  // namespace

#if defined(HELLM_X86)
bool fused_pairs(int vector_bytes) {
  static const bool has[2] = {bool(__builtin_cpu_supports("avxvnni")), bool(__builtin_cpu_supports("avx512vnni"))};
  return fuses.load(std::memory_order_relaxed) && vector_bytes >= 32 && has[vector_bytes == 64];
}
#else
bool fused_pairs(int) { return false; }
#endif

bool bfloat16_tiles() {
#if defined(HELLM_X86) && defined(__linux__)
  // Linux keeps the tiles of those processes alone that have asked for it.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool has = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                          syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return has;
#else
  return false;
#endif
}

void use_fused_pairs(bool use) { fuses = use; }

const InstructionSet* const kInstructionSets = kSets;
const int kNumInstructionSets = int(sizeof(kSets) / sizeof(kSets[0]));

int instruction_set() { return chosen().load(std::memory_order_relaxed); }

bool use_instruction_set(const char* name) {
  for (int set = 0; set < kNumInstructionSets; ++set) {
    if (std::strcmp(kSets[set].name, name) == 0 && kSets[set].supported()) {
      chosen() = set;
      return true;
    }
  }
  return false;
}

}  // namespace hellm::cpu
