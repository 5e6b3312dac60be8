// Launch plans of the sparse products: one gather for each half of a layer.
#include "hypergraph_conv.h"

#include "binding.h"

#include <algorithm>
#include <array>
#include <vector>

#include "cuda/hypergraph_conv.cuh"
#include "cuda/plan.h"

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

Type accumulated(DType dtype) { return type(dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32); }

Gather gather_of(const Csr& matrix, int64_t rows) {
  Gather g{};
  g.indptr = reinterpret_cast<const int64*>(matrix.indptr);
  g.indices = matrix.indices;
  g.row_order = matrix.row_order;
  g.hub_chunk_begin = matrix.hub_chunk_begin;
  g.values = matrix.values;
  g.rows = rows;
  g.num_hubs = matrix.num_hubs;
  g.num_long = matrix.num_long;
  g.num_hub_chunks = matrix.num_hub_chunks;
  g.factor = 1.0;
  return g;
}

// Whether every access of the launch may be one of 16 bytes, or of as many values.
bool wide(const Gather& g, int64_t dim, int count) {
  return dim % count == 0 && g.x_pitch % count == 0 && g.self_pitch % count == 0 && g.out_pitch % count == 0 &&
         aligned(g.x) && aligned(g.self) && aligned(g.out) && aligned(g.partial);
}

int lanes_of(int64_t dim, int count) {
  int lanes = 1;
  while (lanes < kMostLanes && lanes * count < dim) lanes *= 2;
  return lanes;
}

// One or two gathers that do not depend on one another, of rows of `dim` columns stored as `x`.
void gather(const std::vector<Gather>& sides, int64_t dim, Type x, const Queue& queue) {
  bool all_wide = true, hubs = false;
  for (const Gather& side : sides) {
    all_wide = all_wide && wide(side, dim, 16 / x.size);
    hubs = hubs || side.num_hubs > 0;
  }
  const std::string accumulation = x.size == 8 ? "double" : "float";
  const auto launch = [&](const std::string& kernel, int count, bool store_hubs) {
    GatherParameters p{};
    p.dim = dim;
    p.lanes = lanes_of(dim, count);
    const int64_t groups = kGatherThreads / p.lanes, long_rows = groups / kLongGroups;
    int64_t blocks = 0;
    for (std::size_t s = 0; s < sides.size(); ++s) {
      const Gather& side = p.side[s] = sides[s];
      if (store_hubs) {
        blocks += ceil_div(side.num_hubs, long_rows);
      } else {
        p.shared_blocks[s] = int(ceil_div(side.num_hub_chunks + side.num_long - side.num_hubs, long_rows));
        blocks += p.shared_blocks[s] + ceil_div(side.rows - side.num_long, groups);
      }
      if (s == 0) p.first_blocks = int(blocks);
    }
    enqueue(queue, kernel + ", " + std::to_string(count) + ">", blocks, ceil_div(dim, p.lanes * count), kGatherThreads,
            0, p);
  };
  launch("gather_kernel<" + accumulation + ", " + x.name, all_wide ? 16 / x.size : 1, false);
  if (hubs) launch("hub_store_kernel<" + accumulation, all_wide ? (x.size == 8 ? 2 : 4) : 1, true);
}

// Columns worked through at a time. The layers of some columns depend on no others, and a table that stays in the cache
// is worth reading the indices again; below 8 columns of four bytes a row is less than what memory hands out at once.
int64_t slab_columns(int64_t rows, int64_t dim, DType dtype, int64_t slab_bytes) {
  const int64_t row_bytes = rows * accumulated(dtype).size;
  if (row_bytes * dim <= slab_bytes) return dim;
  int64_t columns = 32;
  while (columns > 8 && row_bytes * columns > slab_bytes) columns /= 2;
  return std::min(columns, dim);
}

const char* at_column(const void* x, int64_t column, Type type) {
  return static_cast<const char*>(x) + column * type.size;
}
char* at_column(void* x, int64_t column, Type type) { return static_cast<char*>(x) + column * type.size; }

// Columns [column, column + dim) of every row of x, packed: whole lines of the cache instead of parts of them.
void pack(const void* x, int64_t rows, int64_t pitch, int64_t column, int64_t dim, Type x_type, void* out,
          const Queue& queue) {
  const int widest = 16 / x_type.size;
  PackParameters p{at_column(x, column, x_type), out, rows, dim, pitch, 0};
  const int count = dim % widest == 0 && pitch % widest == 0 && aligned(p.x) && aligned(out) ? widest : 1;
  p.lanes = lanes_of(dim, count);
  enqueue(queue, std::string("pack_kernel<") + x_type.name + ", " + std::to_string(count) + ">",
          ceil_div(rows, kGatherThreads / p.lanes), ceil_div(dim, p.lanes * count), kGatherThreads, 0, p);
}

struct ConvMemory {
  int64_t columns;  // of a slab
  char *edges, *layer, *packed, *partial;
  int64_t bytes;
};

ConvMemory memory_of(const HypergraphConvArguments& a) {
  ConvMemory m{};
  m.columns = slab_columns(std::max(a.num_vertices, a.num_hyperedges), a.dim, a.dtype, a.slab_bytes);
  const int64_t row_bytes = m.columns * accumulated(a.dtype).size;
  Workspace workspace(a.workspace);
  m.edges = workspace.take<char>(a.num_hyperedges * row_bytes);
  m.layer = workspace.take<char>(a.num_layers > 1 ? a.num_vertices * row_bytes : 0);
  m.packed = workspace.take<char>(m.columns < a.dim ? a.num_vertices * m.columns * type(a.dtype).size : 0);
  m.partial = workspace.take<char>(std::max(a.vertex.num_hub_chunks, a.edge.num_hub_chunks) * row_bytes);
  m.bytes = workspace.used();
  return m;
}

struct PropagateMemory {
  int64_t columns;
  char* table[2][2];  // [layer read or written][users, items]
  char *packed[2], *partial[2];
  int64_t bytes;
};

PropagateMemory memory_of(const BipartitePropagateArguments& a) {
  PropagateMemory m{};
  const int64_t rows[] = {a.num_users, a.num_items}, chunks[] = {a.user.num_hub_chunks, a.item.num_hub_chunks};
  m.columns = slab_columns(a.num_users + a.num_items, a.dim, a.dtype, a.slab_bytes);
  const int64_t row_bytes = m.columns * accumulated(a.dtype).size;
  Workspace workspace(a.workspace);
  for (int s = 0; s < 2; ++s) {
    for (auto& table : m.table) table[s] = workspace.take<char>(a.num_layers > 1 ? rows[s] * row_bytes : 0);
    m.packed[s] = workspace.take<char>(m.columns < a.dim ? rows[s] * m.columns * type(a.dtype).size : 0);
    m.partial[s] = workspace.take<char>(chunks[s] * row_bytes);
  }
  m.bytes = workspace.used();
  return m;
}

}  // namespace

int64_t hypergraph_conv_workspace(const HypergraphConvArguments& a) { return memory_of(a).bytes; }
int64_t bipartite_propagate_workspace(const BipartitePropagateArguments& a) { return memory_of(a).bytes; }

void incidence_product(const IncidenceProductArguments& a, const Queue& queue) {
  Gather g = gather_of(a.matrix, a.rows);
  g.x = a.x;
  g.out = a.out;
  g.out_storage = type(a.dtype).storage;
  g.x_pitch = g.out_pitch = a.dim;
  g.partial = a.workspace;
  gather({g}, a.dim, type(a.dtype), queue);
}

void hypergraph_conv(const HypergraphConvArguments& a, const Queue& queue) {
  const Type stored = type(a.dtype), between = accumulated(a.dtype);
  const ConvMemory memory = memory_of(a);
  for (int64_t column = 0; column < a.dim; column += memory.columns) {
    const int64_t dim = std::min(memory.columns, a.dim - column);
    const bool slab = dim < a.dim;
    if (slab) pack(a.x, a.num_vertices, a.dim, column, dim, stored, memory.packed, queue);
    for (int l = 0; l < a.num_layers; ++l) {
      const bool first = l == 0, last = l + 1 == a.num_layers;
      const Type from = first ? stored : between;
      Gather join = gather_of(a.edge, a.num_hyperedges);
      // The rows of a layer are replaced one by one, each after its own old value was read.
      join.x = first ? (slab ? memory.packed : a.x) : memory.layer;
      join.in_scale = a.in_scale;
      join.out_scale = a.edge_scale;
      join.out = memory.edges;
      join.out_storage = between.storage;
      join.x_pitch = join.out_pitch = dim;
      join.partial = memory.partial;
      gather({join}, dim, from, queue);

      Gather spread = gather_of(a.vertex, a.num_vertices);
      spread.x = memory.edges;
      spread.out_scale = a.out_scale;
      spread.self = a.diagonal ? join.x : nullptr;
      spread.self_storage = from.storage;
      spread.diagonal = a.diagonal;
      spread.diagonal_scale = a.in_scale;
      spread.out = last ? at_column(a.out, column, stored) : memory.layer;
      spread.out_storage = (last ? stored : between).storage;
      spread.x_pitch = spread.self_pitch = dim;
      spread.out_pitch = last ? a.dim : dim;
      spread.partial = memory.partial;
      gather({spread}, dim, between, queue);
    }
  }
}

// Horner's scheme: L times h <- x + A h gives the sum of layers 0..L; the last one divides by L + 1.
void bipartite_propagate(const BipartitePropagateArguments& a, const Queue& queue) {
  const Type stored = type(a.dtype), between = accumulated(a.dtype);
  const PropagateMemory memory = memory_of(a);
  const Csr* const matrix[] = {&a.user, &a.item};
  const int64_t rows[] = {a.num_users, a.num_items};
  const void *const x[] = {a.user_x, a.item_x}, *const scale[] = {a.user_scale, a.item_scale};
  void* const out[] = {a.user_out, a.item_out};
  for (int64_t column = 0; column < a.dim; column += memory.columns) {
    const int64_t dim = std::min(memory.columns, a.dim - column);
    const bool slab = dim < a.dim;
    for (int s = 0; slab && s < 2; ++s) pack(x[s], rows[s], a.dim, column, dim, stored, memory.packed[s], queue);
    for (int l = 0; l < a.num_layers; ++l) {
      const bool first = l == 0, last = l + 1 == a.num_layers;
      std::vector<Gather> sides;
      for (int s = 0; s < 2; ++s) {
        Gather g = gather_of(*matrix[s], rows[s]);
        g.x = first ? (slab ? memory.packed[1 - s] : x[1 - s]) : memory.table[l % 2][1 - s];
        g.in_scale = scale[1 - s];
        g.out_scale = scale[s];
        g.self = at_column(x[s], column, stored);
        g.self_storage = stored.storage;
        g.factor = g.self_factor = last ? 1.0 / (a.num_layers + 1) : 1.0;
        g.out = last ? at_column(out[s], column, stored) : memory.table[(l + 1) % 2][s];
        g.out_storage = (last ? stored : between).storage;
        g.x_pitch = dim;
        g.self_pitch = a.dim;
        g.out_pitch = last ? a.dim : dim;
        g.partial = memory.partial[s];
        sides.push_back(g);
      }
      gather(sides, dim, first ? stored : between, queue);
    }
  }
}

}  // namespace hellm::cuda

HELLM_CPU_KERNEL(incidence_product, hellm::IncidenceProductArguments)
HELLM_CPU_KERNEL(hypergraph_conv, hellm::HypergraphConvArguments)
HELLM_CPU_KERNEL(bipartite_propagate, hellm::BipartitePropagateArguments)

namespace hellm::binding {
namespace {

Csr csr(Address indptr, Address indices, Address values) {
  return {at<const int64_t>(indptr), at<const int32_t>(indices), at(values)};
}

// Lists of arguments are filled line by line, in the order of the fields.
// clang-format off
void incidence_product(Address x, Address indptr, Address indices, Address values, Address out, int64_t rows,
                       int64_t dim, int dtype, int num_threads) {
  const IncidenceProductArguments arguments{at(x), csr(indptr, indices, values), at(out), rows, dim,
      DType(dtype), num_threads};
  run(cpu::incidence_product, arguments);
}

void hypergraph_conv(Address x, Address vertex_indptr, Address vertex_edges, Address edge_indptr, Address edge_vertices,
                     Address vertex_values, Address edge_values, Address in_scale, Address edge_scale,
                     Address out_scale, Address diagonal, Address out, Address workspace, int64_t num_vertices,
                     int64_t num_hyperedges, int64_t dim, int num_layers, int dtype, int num_threads) {
  const HypergraphConvArguments arguments{at(x), csr(vertex_indptr, vertex_edges, vertex_values),
      csr(edge_indptr, edge_vertices, edge_values), at(in_scale), at(edge_scale), at(out_scale), at(diagonal), at(out),
      at(workspace), num_vertices, num_hyperedges, dim, num_layers, DType(dtype), num_threads};
  run(cpu::hypergraph_conv, arguments);
}

void bipartite_propagate(Address user_x, Address item_x, Address vertex_indptr, Address vertex_edges,
                         Address edge_indptr, Address edge_vertices, Address user_scale, Address item_scale,
                         Address user_out, Address item_out, Address workspace, int64_t num_users, int64_t num_items,
                         int64_t dim, int num_layers, int dtype, int num_threads) {
  const BipartitePropagateArguments arguments{at(user_x), at(item_x), csr(vertex_indptr, vertex_edges, 0),
      csr(edge_indptr, edge_vertices, 0), at(user_scale), at(item_scale), at(user_out), at(item_out), at(workspace),
      num_users, num_items, dim, num_layers, DType(dtype), num_threads};
  run(cpu::bipartite_propagate, arguments);
}

namespace gpu {

// Of a matrix: addresses of row_order and hub_chunk_begin, num_hubs, num_long, num_hub_chunks.
using Schedule = std::array<int64_t, 5>;

Csr csr(Address indptr, Address indices, Address values, const Schedule& s) {
  return {at<const int64_t>(indptr), at<const int32_t>(indices), at(values), at<const int32_t>(s[0]),
          at<const int32_t>(s[1]), s[2], s[3], s[4]};
}

IncidenceProductArguments incidence_product(Address x, Address indptr, Address indices, Address values,
                                            Address out, Address workspace, Schedule schedule, int64_t rows,
                                            int64_t dim, int dtype) {
  return {at(x), csr(indptr, indices, values, schedule), at(out), rows, dim, DType(dtype), 0, at(workspace)};
}

HypergraphConvArguments hypergraph_conv(Address x, Address vertex_indptr, Address vertex_edges,
                                        Address edge_indptr, Address edge_vertices, Address vertex_values,
                                        Address edge_values, Address in_scale, Address edge_scale,
                                        Address out_scale, Address diagonal, Address out, Address workspace,
                                        Schedule vertex_schedule, Schedule edge_schedule, int64_t slab_bytes,
                                        int64_t num_vertices, int64_t num_hyperedges, int64_t dim,
                                        int num_layers, int dtype) {
  return {at(x), csr(vertex_indptr, vertex_edges, vertex_values, vertex_schedule),
          csr(edge_indptr, edge_vertices, edge_values, edge_schedule), at(in_scale), at(edge_scale), at(out_scale),
          at(diagonal), at(out), at(workspace), num_vertices, num_hyperedges, dim, num_layers, DType(dtype), 0,
          slab_bytes};
}

BipartitePropagateArguments bipartite_propagate(Address user_x, Address item_x, Address vertex_indptr,
                                                Address vertex_edges, Address edge_indptr, Address edge_vertices,
                                                Address user_scale, Address item_scale, Address user_out,
                                                Address item_out, Address workspace, Schedule vertex_schedule,
                                                Schedule edge_schedule, int64_t slab_bytes, int64_t num_users,
                                                int64_t num_items, int64_t dim, int num_layers, int dtype) {
  return {at(user_x), at(item_x), csr(vertex_indptr, vertex_edges, 0, vertex_schedule),
          csr(edge_indptr, edge_vertices, 0, edge_schedule), at(user_scale), at(item_scale), at(user_out),
          at(item_out), at(workspace), num_users, num_items, dim, num_layers, DType(dtype), 0, slab_bytes};
}

}  // namespace gpu
// clang-format on

const Operator kOperator([](py::module_& m) {
  m.def("incidence_product", &incidence_product);
  m.def("hypergraph_conv", &hypergraph_conv);
  m.def("bipartite_propagate", &bipartite_propagate);
  define_plan(m, "incidence_product", "hypergraph_conv.cuh", &gpu::incidence_product, &cuda::incidence_product);
  define_plan(m, "hypergraph_conv", "hypergraph_conv.cuh", &gpu::hypergraph_conv, &cuda::hypergraph_conv);
  define_plan(m, "bipartite_propagate", "hypergraph_conv.cuh", &gpu::bipartite_propagate, &cuda::bipartite_propagate);
  m.def("hypergraph_conv_workspace", [](gpu::Schedule vertex_schedule, gpu::Schedule edge_schedule, int64_t slab_bytes,
                                        int64_t num_vertices, int64_t num_hyperedges, int64_t dim, int num_layers,
                                        int dtype) {
    return cuda::hypergraph_conv_workspace(gpu::hypergraph_conv(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, vertex_schedule,
                                                                edge_schedule, slab_bytes, num_vertices, num_hyperedges,
                                                                dim, num_layers, dtype));
  });
  m.def("bipartite_propagate_workspace", [](gpu::Schedule vertex_schedule, gpu::Schedule edge_schedule,
                                            int64_t slab_bytes, int64_t num_users, int64_t num_items, int64_t dim,
                                            int num_layers, int dtype) {
    return cuda::bipartite_propagate_workspace(gpu::bipartite_propagate(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                                        vertex_schedule, edge_schedule, slab_bytes,
                                                                        num_users, num_items, dim, num_layers, dtype));
  });
});

}  // namespace
}  // namespace hellm::binding
