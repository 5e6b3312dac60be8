// Launch plans of the sparse products: one gather for each half of a layer.
#include "../hypergraph_conv.h"

#include "parameters.cuh"
#include "plan.h"

namespace hellm::cuda {
namespace {

struct Type {
  const char* name;
  Storage storage;
  int size;
};

Type type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return {"double", kStoreFloat64, 8};
    case DType::kBFloat16: return {"BFloat16", kStoreBFloat16, 2};
    case DType::kFloat16: return {"Half", kStoreFloat16, 2};
    default: return {"float", kStoreFloat32, 4};
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void use_csr(GatherParameters& p, const Csr& matrix, int64_t rows, int64_t dim, void* hub_workspace) {
  p.indptr = reinterpret_cast<const int64*>(matrix.indptr);
  p.indices = matrix.indices;
  p.values = matrix.values;
  p.rows = rows;
  p.dim = dim;
  p.num_entries = matrix.num_entries;
  p.factor = 1.0;
  p.partial = matrix.longest_row > kHubEntries ? hub_workspace : nullptr;
}

void gather(GatherParameters p, Type x, const Queue& queue) {
  const bool wide = p.dim * x.size % 16 == 0 && p.dim % (16 / x.size) == 0 && aligned(p.x) && aligned(p.out) &&
                    aligned(p.self) && aligned(p.partial);
  const std::string accumulation = x.size == 8 ? "double" : "float";
  const auto launch = [&](const std::string& kernel, int count, int64_t blocks) {
    p.lanes = 1;
    while (p.lanes < 32 && p.lanes * count < p.dim) p.lanes *= 2;
    const int64_t groups = kGatherThreads / p.lanes;
    enqueue(queue, kernel + ", " + std::to_string(count) + ">", blocks ? blocks : ceil_div(p.rows, groups),
            ceil_div(p.dim, p.lanes * count), kGatherThreads, 0, p);
  };
  const int count = wide ? 16 / x.size : 1;
  launch("gather_kernel<" + accumulation + ", " + x.name, count, 0);
  if (p.partial == nullptr) return;
  launch("hub_partial_kernel<" + accumulation + ", " + x.name, count, ceil_div(p.num_entries, kHubChunk));
  launch("hub_store_kernel<" + accumulation, wide ? (x.size == 8 ? 2 : 4) : 1, 0);
}

}  // namespace

void incidence_product(const IncidenceProductArguments& a, const Queue& queue) {
  GatherParameters p{};
  use_csr(p, a.matrix, a.rows, a.dim, a.hub_workspace);
  p.x = a.x;
  p.out = a.out;
  p.out_storage = type(a.dtype).storage;
  gather(p, type(a.dtype), queue);
}

void hypergraph_conv(const HypergraphConvArguments& a, const Queue& queue) {
  const Type stored = type(a.dtype), accumulated = type(a.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  char* const edges = static_cast<char*>(a.workspace);
  // Its rows are replaced one by one, each after its own old value was read.
  char* const layer = edges + a.num_hyperedges * a.dim * accumulated.size;
  for (int l = 0; l < a.num_layers; ++l) {
    const bool first = l == 0, last = l + 1 == a.num_layers;
    const Type from = first ? stored : accumulated;
    GatherParameters join{};
    use_csr(join, a.edge, a.num_hyperedges, a.dim, a.hub_workspace);
    join.x = first ? a.x : layer;
    join.in_scale = a.in_scale;
    join.out_scale = a.edge_scale;
    join.out = edges;
    join.out_storage = accumulated.storage;
    gather(join, from, queue);

    GatherParameters spread{};
    use_csr(spread, a.vertex, a.num_vertices, a.dim, a.hub_workspace);
    spread.x = edges;
    spread.out_scale = a.out_scale;
    spread.self = a.diagonal ? join.x : nullptr;
    spread.self_storage = from.storage;
    spread.diagonal = a.diagonal;
    spread.diagonal_scale = a.in_scale;
    spread.out = last ? a.out : layer;
    spread.out_storage = (last ? stored : accumulated).storage;
    gather(spread, accumulated, queue);
  }
}

// Horner's scheme: L times h <- x + A h gives the sum of layers 0..L; the last one divides by L + 1.
void bipartite_propagate(const BipartitePropagateArguments& a, const Queue& queue) {
  const Type stored = type(a.dtype), accumulated = type(a.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  const int64_t table_bytes = (a.num_users + a.num_items) * a.dim * accumulated.size;
  for (int l = 0; l < a.num_layers; ++l) {
    const bool first = l == 0, last = l + 1 == a.num_layers;
    char* const read = static_cast<char*>(a.workspace) + l % 2 * table_bytes;
    char* const written = static_cast<char*>(a.workspace) + (l + 1) % 2 * table_bytes;
    const int64_t users_bytes = a.num_users * a.dim * accumulated.size;
    const auto half = [&](const Csr& matrix, int64_t rows, const void* first_x, char* later_x, const void* in_scale,
                          const void* out_scale, const void* self, void* out, char* later_out) {
      GatherParameters p{};
      use_csr(p, matrix, rows, a.dim, a.hub_workspace);
      p.x = first ? first_x : later_x;
      p.in_scale = in_scale;
      p.out_scale = out_scale;
      p.self = self;
      p.self_storage = stored.storage;
      p.factor = p.self_factor = last ? 1.0 / (a.num_layers + 1) : 1.0;
      p.out = last ? out : later_out;
      p.out_storage = (last ? stored : accumulated).storage;
      gather(p, first ? stored : accumulated, queue);
    };
    half(a.user, a.num_users, a.item_x, read + users_bytes, a.item_scale, a.user_scale, a.user_x, a.user_out, written);
    half(a.item, a.num_items, a.user_x, read, a.user_scale, a.item_scale, a.item_x, a.item_out, written + users_bytes);
  }
}

}  // namespace hellm::cuda
