// The only file that knows pybind11: addresses and sizes in, typed calls out, without the interpreter lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/interruption.h"
#include "cuda/plan.h"
#if defined(HELLM_CUDA)
#include "cuda/launch.h"
#endif

namespace py = pybind11;
using hellm::DType;
using Address = uintptr_t;

namespace {

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

hellm::Csr csr(Address indptr, Address indices, Address values) {
  return {at<const int64_t>(indptr), at<const int32_t>(indices), at(values)};
}

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

// Runs a kernel without the interpreter lock.
template <typename Arguments>
void run(void (*kernel)(const Arguments&, hellm::cpu::Interruption&), const Arguments& arguments) {
  hellm::cpu::Interruption interruption(in_main_thread() ? &signal_raises : nullptr);
  {
    const py::gil_scoped_release unlocked;
    kernel(arguments, interruption);
  }
  if (interruption.requested()) throw py::error_already_set();
}

// Lists of arguments are filled line by line, in the order of the fields.
// clang-format off
void incidence_product(Address x, Address indptr, Address indices, Address values, Address out, int64_t rows,
                       int64_t dim, int dtype, int num_threads) {
  const hellm::IncidenceProductArguments arguments{at(x), csr(indptr, indices, values), at(out), rows, dim,
      DType(dtype), num_threads};
  run(hellm::cpu::kernels().incidence_product, arguments);
}

void hypergraph_conv(Address x, Address vertex_indptr, Address vertex_edges, Address edge_indptr, Address edge_vertices,
                     Address vertex_values, Address edge_values, Address in_scale, Address edge_scale,
                     Address out_scale, Address diagonal, Address out, Address workspace, int64_t num_vertices,
                     int64_t num_hyperedges, int64_t dim, int num_layers, int dtype, int num_threads) {
  const hellm::HypergraphConvArguments arguments{at(x), csr(vertex_indptr, vertex_edges, vertex_values),
      csr(edge_indptr, edge_vertices, edge_values), at(in_scale), at(edge_scale), at(out_scale), at(diagonal), at(out),
      at(workspace), num_vertices, num_hyperedges, dim, num_layers, DType(dtype), num_threads};
  run(hellm::cpu::kernels().hypergraph_conv, arguments);
}

void bipartite_propagate(Address user_x, Address item_x, Address vertex_indptr, Address vertex_edges,
                         Address edge_indptr, Address edge_vertices, Address user_scale, Address item_scale,
                         Address user_out, Address item_out, Address workspace, int64_t num_users, int64_t num_items,
                         int64_t dim, int num_layers, int dtype, int num_threads) {
  const hellm::BipartitePropagateArguments arguments{at(user_x), at(item_x), csr(vertex_indptr, vertex_edges, 0),
      csr(edge_indptr, edge_vertices, 0), at(user_scale), at(item_scale), at(user_out), at(item_out), at(workspace),
      num_users, num_items, dim, num_layers, DType(dtype), num_threads};
  run(hellm::cpu::kernels().bipartite_propagate, arguments);
}

void info_nce(Address anchor, Address positive, Address rows, Address row_grad, Address row_loss, Address grad_anchor,
              Address grad_positive, Address row_slope, int64_t num_keys, int64_t num_rows, int64_t dim,
              double temperature, bool intra_view_negatives, bool highest_precision, int dtype, int num_threads) {
  const hellm::InfoNceArguments arguments{at(anchor), at(positive), at<const int64_t>(rows), at(row_grad), at(row_loss),
      at(grad_anchor), at(grad_positive), at(row_slope), num_keys, num_rows, dim, temperature, intra_view_negatives,
      highest_precision, DType(dtype), num_threads};
  run(hellm::cpu::kernels().info_nce, arguments);
}

void item_cross_entropy(Address hidden, Address item_embedding, Address target, Address bias, Address row_grad,
                        Address row_loss, Address grad_hidden, Address grad_items, Address grad_bias, int64_t num_rows,
                        int64_t num_items, int64_t dim, int dtype, int num_threads) {
  const hellm::ItemCrossEntropyArguments arguments{at(hidden), at(item_embedding), at<const int64_t>(target), at(bias),
      at(row_grad), at(row_loss), at(grad_hidden), at(grad_items), at(grad_bias), num_rows, num_items, dim,
      DType(dtype), num_threads};
  run(hellm::cpu::kernels().item_cross_entropy, arguments);
}

void knn(Address x, Address index, Address similarity, int64_t num_rows, int64_t dim, int64_t k, int dtype,
         int num_threads) {
  const hellm::KnnArguments arguments{at(x), at<int64_t>(index), at(similarity), num_rows, dim, k, DType(dtype),
      num_threads};
  run(hellm::cpu::kernels().knn, arguments);
}

// GPUs: addresses are those of device memory. Each function gives the arguments of a launch plan.
namespace gpu {

// Of a matrix: addresses of row_order and hub_chunk_begin, num_hubs, num_long, num_hub_chunks.
using Schedule = std::array<int64_t, 5>;

hellm::Csr csr(Address indptr, Address indices, Address values, const Schedule& s) {
  return {at<const int64_t>(indptr), at<const int32_t>(indices), at(values), at<const int32_t>(s[0]),
          at<const int32_t>(s[1]), s[2], s[3], s[4]};
}

hellm::IncidenceProductArguments incidence_product(Address x, Address indptr, Address indices, Address values,
                                                   Address out, Address workspace, Schedule schedule, int64_t rows,
                                                   int64_t dim, int dtype) {
  return {at(x), csr(indptr, indices, values, schedule), at(out), rows, dim, DType(dtype), 0, at(workspace)};
}

hellm::HypergraphConvArguments hypergraph_conv(Address x, Address vertex_indptr, Address vertex_edges,
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

hellm::BipartitePropagateArguments bipartite_propagate(Address user_x, Address item_x, Address vertex_indptr,
                                                       Address vertex_edges, Address edge_indptr, Address edge_vertices,
                                                       Address user_scale, Address item_scale, Address user_out,
                                                       Address item_out, Address workspace, Schedule vertex_schedule,
                                                       Schedule edge_schedule, int64_t slab_bytes, int64_t num_users,
                                                       int64_t num_items, int64_t dim, int num_layers, int dtype) {
  return {at(user_x), at(item_x), csr(vertex_indptr, vertex_edges, 0, vertex_schedule),
          csr(edge_indptr, edge_vertices, 0, edge_schedule), at(user_scale), at(item_scale), at(user_out),
          at(item_out), at(workspace), num_users, num_items, dim, num_layers, DType(dtype), 0, slab_bytes};
}

hellm::InfoNceArguments info_nce(Address anchor, Address positive, Address rows, Address row_order, Address row_begin,
                                 Address row_grad, Address row_loss, Address grad_anchor, Address grad_positive,
                                 Address row_slope, Address workspace, int64_t num_keys, int64_t num_rows, int64_t dim,
                                 Address temperature, bool intra_view_negatives, bool highest_precision,
                                 int num_processors, int shared_bytes, int dtype) {
  return {at(anchor), at(positive), at<const int64_t>(rows), at(row_grad), at(row_loss), at(grad_anchor),
          at(grad_positive), at(row_slope), num_keys, num_rows, dim, 0.0, intra_view_negatives, highest_precision, DType(dtype), 0,
          at<const double>(temperature), at<const int64_t>(row_order), at<const int64_t>(row_begin), at(workspace),
          num_processors, shared_bytes};
}

hellm::ItemCrossEntropyArguments item_cross_entropy(Address hidden, Address item_embedding, Address target,
                                                    Address row_order, Address row_begin, Address bias,
                                                    Address row_grad, Address row_loss, Address grad_hidden,
                                                    Address grad_items, Address grad_bias, Address workspace,
                                                    int64_t num_rows, int64_t num_items, int64_t dim,
                                                    bool highest_precision, int num_processors, int shared_bytes,
                                                    int dtype) {
  return {at(hidden), at(item_embedding), at<const int64_t>(target), at(bias), at(row_grad), at(row_loss),
          at(grad_hidden), at(grad_items), at(grad_bias), num_rows, num_items, dim, DType(dtype), 0,
          at<const int64_t>(row_order), at<const int64_t>(row_begin), at(workspace), highest_precision,
          num_processors, shared_bytes};
}

hellm::KnnArguments knn_scan(Address x, Address index, Address similarity, Address workspace, int64_t num_rows,
                             int64_t dim, int64_t k, int num_processors, int shared_bytes, int dtype) {
  hellm::KnnArguments a{at(x), at<int64_t>(index), at(similarity), num_rows, dim, k, DType(dtype), 0};
  a.workspace = at(workspace);
  a.num_processors = num_processors;
  a.shared_bytes = shared_bytes;
  return a;
}

hellm::KnnArguments knn_unit(Address x, Address unit, Address inverse_norm, int64_t num_rows, int64_t dim, int dtype) {
  return {at(x), nullptr, nullptr, num_rows, dim, 1, DType(dtype), 0, at(unit), at<double>(inverse_norm)};
}

hellm::KnnArguments knn_select(Address x, Address inverse_norm, Address panel, Address index, Address similarity,
                               Address crowded, int64_t num_rows, int64_t dim, int64_t k, int64_t first_row,
                               int64_t panel_rows, int dtype) {
  return {at(x), at<int64_t>(index), at(similarity), num_rows, dim, k, DType(dtype), 0, nullptr,
          at<double>(inverse_norm), at<int>(crowded), at<const float>(panel), first_row, panel_rows};
}

hellm::KnnArguments knn_crowded(Address x, Address inverse_norm, Address crowded, Address index, Address similarity,
                                int64_t num_rows, int64_t dim, int64_t k, int dtype) {
  return {at(x), at<int64_t>(index), at(similarity), num_rows, dim, k, DType(dtype), 0, nullptr,
          at<double>(inverse_norm), at<int>(crowded)};
}
// clang-format on

// plan_<name>: the launches, as (kernel, grid, threads, shared bytes, parameters). cuda_<name>, where nvcc compiled the
// kernels: launches them; the last two arguments are the device and the stream.
template <typename Arguments, typename... P>
void define(py::module_& m, const std::string& name, Arguments (*arguments)(P...),
            void (*plan)(const Arguments&, const hellm::cuda::Queue&)) {
  m.def(("plan_" + name).c_str(), [=](P... p) {
    py::list launches;
    plan(arguments(p...), [&](const hellm::cuda::Launch& launch) {
      launches.append(py::make_tuple(launch.kernel, py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]),
                                     launch.threads, launch.shared_bytes,
                                     py::bytes(static_cast<const char*>(launch.parameters), launch.parameter_bytes)));
    });
    return launches;
  });
#if defined(HELLM_CUDA)
  m.def(("cuda_" + name).c_str(), [=](P... p, int device, Address stream) {
    const py::gil_scoped_release unlocked;
    plan(arguments(p...), hellm::cuda::launcher(device, at(stream)));
  });
#endif
}

void define_all(py::module_& m) {
  define(m, "incidence_product", &incidence_product, &hellm::cuda::incidence_product);
  define(m, "hypergraph_conv", &hypergraph_conv, &hellm::cuda::hypergraph_conv);
  define(m, "bipartite_propagate", &bipartite_propagate, &hellm::cuda::bipartite_propagate);
  define(m, "info_nce", &info_nce, &hellm::cuda::info_nce);
  define(m, "item_cross_entropy", &item_cross_entropy, &hellm::cuda::item_cross_entropy);
  define(m, "knn_scan", &knn_scan, &hellm::cuda::knn_scan);
  define(m, "knn_unit", &knn_unit, &hellm::cuda::knn_unit);
  define(m, "knn_select", &knn_select, &hellm::cuda::knn_select);
  define(m, "knn_crowded", &knn_crowded, &hellm::cuda::knn_crowded);
  m.def("hypergraph_conv_workspace",
        [](Schedule vertex_schedule, Schedule edge_schedule, int64_t slab_bytes, int64_t num_vertices,
           int64_t num_hyperedges, int64_t dim, int num_layers, int dtype) {
          return hellm::cuda::hypergraph_conv_workspace(
              hypergraph_conv(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, vertex_schedule, edge_schedule, slab_bytes,
                              num_vertices, num_hyperedges, dim, num_layers, dtype));
        });
  m.def("bipartite_propagate_workspace",
        [](Schedule vertex_schedule, Schedule edge_schedule, int64_t slab_bytes, int64_t num_users, int64_t num_items,
           int64_t dim, int num_layers, int dtype) {
          return hellm::cuda::bipartite_propagate_workspace(
              bipartite_propagate(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, vertex_schedule, edge_schedule, slab_bytes,
                                  num_users, num_items, dim, num_layers, dtype));
        });
  m.def("info_nce_workspace",
        [](int64_t num_keys, int64_t num_rows, int64_t dim, bool gradients, bool intra_view_negatives,
           bool highest_precision, int num_processors, int shared_bytes, int dtype) {
          const Address wanted = gradients ? 16 : 0;  // any address that is aligned like the real ones
          return hellm::cuda::info_nce_workspace(info_nce(0, 0, 0, 0, 0, wanted, 0, wanted, wanted, 0, 0, num_keys,
                                                          num_rows, dim, 0, intra_view_negatives, highest_precision,
                                                          num_processors, shared_bytes, dtype));
        });
  m.def("item_cross_entropy_workspace", [](int64_t num_rows, int64_t num_items, int64_t dim, bool hidden_grad,
                                           bool items_grad, bool highest_precision, int num_processors,
                                           int shared_bytes, int dtype) {
    const Address hidden = hidden_grad ? 16 : 0, items = items_grad ? 16 : 0;
    return hellm::cuda::item_cross_entropy_workspace(item_cross_entropy(0, 0, 0, 0, 0, 0, 0, 0, hidden, items, 0, 0,
                                                                        num_rows, num_items, dim, highest_precision,
                                                                        num_processors, shared_bytes, dtype));
  });
  m.def("knn_scan_workspace", [](int64_t num_rows, int64_t dim, int64_t k, int num_processors, int shared_bytes,
                                 int dtype) {
    return hellm::cuda::knn_scan_workspace(knn_scan(0, 0, 0, 0, num_rows, dim, k, num_processors, shared_bytes, dtype));
  });
#if defined(HELLM_CUDA)
  m.def("cuda_architectures", &hellm::cuda::architectures, "Compute capabilities of the compiled kernels.");
#else
  m.def("cuda_architectures", [] { return ""; }, "Compute capabilities of the compiled kernels: none.");
#endif
}

}  // namespace gpu

py::list instruction_sets() {
  py::list names;
  for (int i = 0; i < hellm::cpu::kNumKernels; ++i) {
    if (hellm::cpu::kKernels[i].supported()) names.append(hellm::cpu::kKernels[i].name);
  }
  return names;
}

void use_instruction_set(const std::string& name) {
  if (!hellm::cpu::use_kernels(name.c_str())) {
    throw std::invalid_argument("instruction set must be one of instruction_sets(), got " + name);
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of hellm.ops. Addresses are those of contiguous tensors; nothing is checked here.";
  m.def("incidence_product", &incidence_product);
  m.def("hypergraph_conv", &hypergraph_conv);
  m.def("bipartite_propagate", &bipartite_propagate);
  m.def("info_nce", &info_nce);
  m.def("item_cross_entropy", &item_cross_entropy);
  m.def("knn", &knn);
  gpu::define_all(m);
  m.def("instruction_sets", &instruction_sets, "Names of the usable instruction sets, widest first.");
  m.def("instruction_set", [] { return hellm::cpu::kernels().name; }, "The instruction set in use.");
  m.def("use_instruction_set", &use_instruction_set, "Use the kernels compiled for one instruction set.");
}
