#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace hellm::cpu {

#define HELLM_DECLARE_KERNELS(isa)                                             \
  namespace isa {                                                              \
  void incidence_product(const IncidenceProductArguments&, Interruption&);     \
  void hypergraph_conv(const HypergraphConvArguments&, Interruption&);         \
  void bipartite_propagate(const BipartitePropagateArguments&, Interruption&); \
  void info_nce(const InfoNceArguments&, Interruption&);                       \
  void item_cross_entropy(const ItemCrossEntropyArguments&, Interruption&);    \
  void knn(const KnnArguments&, Interruption&);                                \
  }
// clang-format off
#define HELLM_KERNELS(isa, supported) \
  {#isa,          supported, isa::incidence_product,  isa::hypergraph_conv, isa::bipartite_propagate, \
   isa::info_nce, isa::item_cross_entropy, isa::knn}
// clang-format on

HELLM_DECLARE_KERNELS(portable)
#if defined(HELLM_X86)
HELLM_DECLARE_KERNELS(avx512)
HELLM_DECLARE_KERNELS(avx2)
#endif

namespace {

const Kernels kTables[] = {
#if defined(HELLM_X86)
    HELLM_KERNELS(avx512,
                  [] {
                    return bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                                __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2"));
                  }),
    HELLM_KERNELS(avx2, [] { return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")); }),
#endif
    HELLM_KERNELS(portable, [] { return true; }),
};

const Kernels* widest() {
  const Kernels* table = kTables;
  while (!table->supported()) ++table;
  return table;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table{widest()};
  return table;
}

}  // namespace

const Kernels* const kKernels = kTables;
const int kNumKernels = int(sizeof(kTables) / sizeof(kTables[0]));

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

bool use_kernels(const char* name) {
  for (const Kernels& table : kTables) {
    if (std::strcmp(table.name, name) == 0 && table.supported()) {
      chosen() = &table;
      return true;
    }
  }
  return false;
}

}  // namespace hellm::cpu
