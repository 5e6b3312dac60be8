// The only file that knows pybind11: addresses and sizes in, typed calls out, without the interpreter lock.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"

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

void incidence_product(Address x, Address indptr, Address indices, Address values, Address out, int64_t rows,
                       int64_t dim, int dtype, int num_threads) {
  hellm::cpu::kernels().incidence_product(
      {at(x), csr(indptr, indices, values), at(out), rows, dim, DType(dtype), num_threads});
}

void hypergraph_conv(Address x, Address vertex_indptr, Address vertex_edges, Address edge_indptr, Address edge_vertices,
                     Address vertex_values, Address edge_values, Address in_scale, Address edge_scale,
                     Address out_scale, Address diagonal, Address out, Address workspace, int64_t num_vertices,
                     int64_t num_hyperedges, int64_t dim, int num_layers, int dtype, int num_threads) {
  hellm::cpu::kernels().hypergraph_conv(
      {at(x), csr(vertex_indptr, vertex_edges, vertex_values), csr(edge_indptr, edge_vertices, edge_values),
       at(in_scale), at(edge_scale), at(out_scale), at(diagonal), at(out), at(workspace), num_vertices, num_hyperedges,
       dim, num_layers, DType(dtype), num_threads});
}

void bipartite_propagate(Address user_x, Address item_x, Address vertex_indptr, Address vertex_edges,
                         Address edge_indptr, Address edge_vertices, Address user_scale, Address item_scale,
                         Address user_out, Address item_out, Address workspace, int64_t num_users, int64_t num_items,
                         int64_t dim, int num_layers, int dtype, int num_threads) {
  hellm::cpu::kernels().bipartite_propagate(
      {at(user_x), at(item_x), csr(vertex_indptr, vertex_edges, 0), csr(edge_indptr, edge_vertices, 0), at(user_scale),
       at(item_scale), at(user_out), at(item_out), at(workspace), num_users, num_items, dim, num_layers, DType(dtype),
       num_threads});
}

void info_nce(Address anchor, Address positive, Address rows, Address row_grad, Address row_loss, Address grad_anchor,
              Address grad_positive, Address row_slope, int64_t num_keys, int64_t num_rows, int64_t dim,
              double temperature, bool intra_view_negatives, bool medium_precision, int dtype, int num_threads) {
  hellm::cpu::kernels().info_nce({at(anchor), at(positive), at<const int64_t>(rows), at(row_grad), at(row_loss),
                                  at(grad_anchor), at(grad_positive), at(row_slope), num_keys, num_rows, dim,
                                  temperature, intra_view_negatives, medium_precision, DType(dtype), num_threads});
}

void knn(Address x, Address index, Address similarity, int64_t num_rows, int64_t dim, int64_t k, int dtype,
         int num_threads) {
  hellm::cpu::kernels().knn(
      {at(x), at<int64_t>(index), at(similarity), num_rows, dim, k, DType(dtype), num_threads});
}

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
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("incidence_product", &incidence_product, unlocked);
  m.def("hypergraph_conv", &hypergraph_conv, unlocked);
  m.def("bipartite_propagate", &bipartite_propagate, unlocked);
  m.def("info_nce", &info_nce, unlocked);
  m.def("knn", &knn, unlocked);
  m.def("instruction_sets", &instruction_sets, "Names of the usable instruction sets, widest first.");
  m.def("instruction_set", [] { return hellm::cpu::kernels().name; }, "The instruction set in use.");
  m.def("use_instruction_set", &use_instruction_set, "Use the kernels compiled for one instruction set.");
}
