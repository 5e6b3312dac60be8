// The CPU kernels, one table for each instruction set they were compiled for, chosen at run time.
#pragma once

#include "../hypergraph_conv.h"
#include "../info_nce.h"
#include "../item_cross_entropy.h"
#include "../knn.h"
#include "interruption.h"

namespace hellm::cpu {

struct Kernels {
  const char* name;
  bool (*supported)();
  void (*incidence_product)(const IncidenceProductArguments&, Interruption&);
  void (*hypergraph_conv)(const HypergraphConvArguments&, Interruption&);
  void (*bipartite_propagate)(const BipartitePropagateArguments&, Interruption&);
  void (*info_nce)(const InfoNceArguments&, Interruption&);
  void (*item_cross_entropy)(const ItemCrossEntropyArguments&, Interruption&);
  void (*knn)(const KnnArguments&, Interruption&);
};

// Widest first. Entries that this processor cannot run are included; ask supported().
extern const Kernels* const kKernels;
extern const int kNumKernels;

// The table in use: the widest supported one unless use_kernels chose another.
const Kernels& kernels();

// False if there is no table of that name or the processor cannot run it.
bool use_kernels(const char* name);

}  // namespace hellm::cpu
