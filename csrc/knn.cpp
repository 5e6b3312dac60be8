// Launch plans of knn: by panels, what goes before the matrix products, after each of them, and at the end; by tiles, all.
#include "knn.h"

#include "binding.h"

#include "cuda/attention_plan.h"
#include "cuda/knn.cuh"

namespace hellm::cuda {
namespace {

constexpr unsigned kSharedBytes = kMostCandidates * 8 + 16;

KnnParameters parameters_of(const KnnArguments& a) {
  if (a.k > kMostNeighbours || a.num_rows >= int64_t(1) << 31) {
    throw std::invalid_argument("knn takes k of at most " + std::to_string(kMostNeighbours) +
                                " and fewer than 2^31 rows on a GPU, got " + std::to_string(a.k) + " and " +
                                std::to_string(a.num_rows));
  }
  KnnParameters p{};
  p.x = a.x;
  p.unit = a.unit;
  p.inverse_norm = a.inverse_norm;
  p.panel = a.panel;
  p.index = reinterpret_cast<int64*>(a.index);
  p.similarity = static_cast<float*>(a.similarity);
  p.crowded = a.crowded;
  p.rows = a.num_rows;
  p.dim = a.dim;
  p.padded_rows = (a.num_rows + 7) / 8 * 8;
  p.padded_dim = (a.dim + 7) / 8 * 8;
  p.first_row = a.first_row;
  // Rounding both rows to halves costs 2^-10 of the product of their lengths, 2^-24 a column below the range of normal
  // halves, and float32 sums 2^-23 a column; the rest is for second orders and for ties of float32.
  p.slack = 2.0f * (1.0f / 1024 + float(a.dim + 16) / 4194304);
  p.k = int(a.k);
  p.storage = int(a.dtype);
  return p;
}

struct ScanPlan {
  Shape shape;
  int64_t blocks, workspace_bytes;
  KnnParameters p;
};

ScanPlan make_scan_plan(const KnnArguments& a) {
  ScanPlan plan{shape_of(a.dim, false), 0, 0, parameters_of(a)};
  if (a.k > kMostScanned) {
    throw std::invalid_argument("a scan finds at most " + std::to_string(kMostScanned) + " neighbours, got k " +
                                std::to_string(a.k));
  }
  const int64_t tiles = ceil_div(a.num_rows, plan.shape.tile_queries);
  plan.blocks = std::min(tiles, blocks_at_once(plan.shape, {a.num_processors, a.shared_bytes}, kScanBlocks));
  Workspace memory(a.workspace);
  KnnParameters& p = plan.p;
  p.padded_rows = a.num_rows;
  p.padded_dim = plan.shape.width;
  p.unit = memory.take<unsigned short>(p.rows * p.padded_dim);
  p.inverse_norm = memory.take<double>(p.rows);
  p.num_chosen = memory.take<int>(p.rows);
  p.chosen = memory.take<int>(p.rows * kKnnKept);
  const int64_t room = plan.blocks * plan.shape.tile_queries * (kKnnKept + plan.shape.tile_keys);
  p.kept_value = memory.take<float>(room);
  p.kept_index = memory.take<int>(room);
  plan.workspace_bytes = memory.used();
  return plan;
}

}  // namespace

int64_t knn_scan_workspace(const KnnArguments& a) { return make_scan_plan(a).workspace_bytes; }

void knn_scan(const KnnArguments& a, const Queue& queue) {
  const ScanPlan plan = make_scan_plan(a);
  enqueue(queue, "knn_unit_kernel", ceil_div(a.num_rows, kRowThreads / 32), 1, kRowThreads, 0, plan.p);
  enqueue(queue, "knn_scan_kernel<" + std::to_string(plan.shape.width) + ">", plan.blocks, 1,
          AttentionTile<64, 1>::kThreads, plan.shape.shared_bytes, plan.p);
  enqueue(queue, "knn_rank_kernel", a.num_rows, 1, kKnnThreads, kSharedBytes, plan.p);
}

void knn_unit(const KnnArguments& a, const Queue& queue) {
  const KnnParameters p = parameters_of(a);
  const int64_t warps = kRowThreads / 32;
  enqueue(queue, "knn_unit_kernel", (p.padded_rows + warps - 1) / warps, 1, kRowThreads, 0, p);
}

void knn_select(const KnnArguments& a, const Queue& queue) {
  enqueue(queue, "knn_select_kernel", a.panel_rows, 1, kKnnThreads, kSharedBytes, parameters_of(a));
}

void knn_crowded(const KnnArguments& a, const Queue& queue) {
  enqueue(queue, "knn_crowded_kernel", a.num_rows, 1, kKnnThreads, kSharedBytes, parameters_of(a));
}

}  // namespace hellm::cuda

HELLM_CPU_KERNEL(knn, hellm::KnnArguments)

namespace hellm::binding {
namespace {

// Lists of arguments are filled line by line, in the order of the fields.
// clang-format off
void knn(Address x, Address index, Address similarity, int64_t num_rows, int64_t dim, int64_t k, int dtype,
         int num_threads) {
  const KnnArguments arguments{at(x), at<int64_t>(index), at(similarity), num_rows, dim, k, DType(dtype),
      num_threads};
  run(cpu::knn, arguments);
}

namespace gpu {

KnnArguments knn_scan(Address x, Address index, Address similarity, Address workspace, int64_t num_rows,
                      int64_t dim, int64_t k, int num_processors, int shared_bytes, int dtype) {
  KnnArguments a{at(x), at<int64_t>(index), at(similarity), num_rows, dim, k, DType(dtype), 0};
  a.workspace = at(workspace);
  a.num_processors = num_processors;
  a.shared_bytes = shared_bytes;
  return a;
}

KnnArguments knn_unit(Address x, Address unit, Address inverse_norm, int64_t num_rows, int64_t dim, int dtype) {
  return {at(x), nullptr, nullptr, num_rows, dim, 1, DType(dtype), 0, at(unit), at<double>(inverse_norm)};
}

KnnArguments knn_select(Address x, Address inverse_norm, Address panel, Address index, Address similarity,
                        Address crowded, int64_t num_rows, int64_t dim, int64_t k, int64_t first_row,
                        int64_t panel_rows, int dtype) {
  return {at(x), at<int64_t>(index), at(similarity), num_rows, dim, k, DType(dtype), 0, nullptr,
          at<double>(inverse_norm), at<int>(crowded), at<const float>(panel), first_row, panel_rows};
}

KnnArguments knn_crowded(Address x, Address inverse_norm, Address crowded, Address index, Address similarity,
                         int64_t num_rows, int64_t dim, int64_t k, int dtype) {
  return {at(x), at<int64_t>(index), at(similarity), num_rows, dim, k, DType(dtype), 0, nullptr,
          at<double>(inverse_norm), at<int>(crowded)};
}

}  // namespace gpu
// clang-format on

const Operator kOperator([](py::module_& m) {
  m.def("knn", &knn);
  define_plan(m, "knn_scan", "knn.cuh", &gpu::knn_scan, &cuda::knn_scan);
  define_plan(m, "knn_unit", "knn.cuh", &gpu::knn_unit, &cuda::knn_unit);
  define_plan(m, "knn_select", "knn.cuh", &gpu::knn_select, &cuda::knn_select);
  define_plan(m, "knn_crowded", "knn.cuh", &gpu::knn_crowded, &cuda::knn_crowded);
  m.def("knn_scan_workspace", [](int64_t num_rows, int64_t dim, int64_t k, int num_processors, int shared_bytes,
                                 int dtype) {
    return cuda::knn_scan_workspace(gpu::knn_scan(0, 0, 0, 0, num_rows, dim, k, num_processors, shared_bytes, dtype));
  });
});

}  // namespace
}  // namespace hellm::binding
