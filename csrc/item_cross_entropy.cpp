// Launch plan of item_cross_entropy: tables to halves, attention of hidden over the items, losses and the gradient of
// hidden, attention with the roles swapped, gradients of the items.
#include "item_cross_entropy.h"

#include "binding.h"

#include "cuda/attention_plan.h"
#include "cuda/item_cross_entropy.cuh"

namespace hellm::cuda {
namespace {

struct Plan {
  Shape shape;
  int64_t workspace_bytes;
  int blocks[2];  // of each pass
  TableParameters tables{};
  ItemRowParameters row{};
  ItemGradientParameters gradient{};
};

void plan_tables(const ItemCrossEntropyArguments& a, const Shape& shape, Workspace& memory, TableParameters& p) {
  const void* const x[] = {a.hidden, a.item_embedding};
  const int64_t rows[] = {a.num_rows, a.num_items};
  for (int table = 0; table < 2; ++table) {
    p.x[table] = x[table];
    p.rows[table] = rows[table];
    p.high[table] = memory.take<unsigned short>(rows[table] * shape.width);
    p.low[table] = shape.parts == 2 ? memory.take<unsigned short>(rows[table] * shape.width) : nullptr;
  }
  p.warp_maximum = memory.take<float>(2 * kMaximumWarps);
  p.size = memory.take<float>(2);
  p.temperature = memory.take<double>(1);
  p.weight_maximum = memory.take<unsigned>(1);
  p.dim = a.dim;
  p.storage = int(a.dtype);
}

// Rows of one table as queries, those of the other as keys.
AttentionParameters between(const TableParameters& tables, int queries, const Shape& shape) {
  AttentionParameters p{};
  p.query_high = tables.high[queries];
  p.query_low = tables.low[queries];
  p.key_high = tables.high[1 - queries];
  p.key_low = tables.low[1 - queries];
  p.temperature = tables.temperature;
  p.weight_maximum = tables.weight_maximum;
  p.queries = p.query_stride = tables.rows[queries];
  p.keys = tables.rows[1 - queries];
  p.query_views = p.key_views = 1;
  tile(p, shape);
  return p;
}

void plan_rows(const ItemCrossEntropyArguments& a, Plan& plan) {
  ItemRowParameters& row = plan.row;
  row.hidden = a.hidden;
  row.items = a.item_embedding;
  row.target = reinterpret_cast<const int64*>(a.target);
  row.bias = static_cast<const float*>(a.bias);
  row.row_grad = static_cast<const float*>(a.row_grad);
  row.row_loss = static_cast<float*>(a.row_loss);
  row.grad_hidden = a.grad_hidden;
  row.size = plan.tables.size;
  row.weight_maximum = plan.tables.weight_maximum;
  row.rows = a.num_rows;
  row.dim = a.dim;
  row.storage = int(a.dtype);
  row.blocks = plan.blocks[0];

  ItemGradientParameters& gradient = plan.gradient;
  gradient.hidden = a.hidden;
  gradient.grad_items = a.grad_items;
  gradient.grad_bias = static_cast<float*>(a.grad_bias);
  gradient.weight = row.weight;
  gradient.size = plan.tables.size;
  gradient.row_order = reinterpret_cast<const int64*>(a.row_order);
  gradient.row_begin = reinterpret_cast<const int64*>(a.row_begin);
  gradient.num_items = a.num_items;
  gradient.dim = a.dim;
  gradient.storage = int(a.dtype);
  gradient.blocks = plan.blocks[1];
}

Plan make_plan(const ItemCrossEntropyArguments& a) {
  Plan plan{shape_of(a.dim, a.highest_precision), 0, {0, 0}};
  if (a.num_rows >= int64_t(1) << 31 || a.num_items >= int64_t(1) << 31) {
    throw std::invalid_argument("item_cross_entropy takes fewer than 2^31 rows and items, got " +
                                std::to_string(a.num_rows) + " and " + std::to_string(a.num_items));
  }
  const Processors processors{a.num_processors, a.shared_bytes};
  Workspace memory(a.workspace);
  TableParameters& tables = plan.tables;
  plan_tables(a, plan.shape, memory, tables);
  const int64_t width = plan.shape.width;
  const auto* const target = reinterpret_cast<const int64*>(a.target);
  const auto* const bias = static_cast<const float*>(a.bias);

  ItemRowParameters& row = plan.row;
  AttentionParameters& first = row.attention;
  first = between(tables, 0, plan.shape);
  first.query_ids = target;
  first.key_bias = bias;
  first.out[0] = first.out[1] = a.grad_hidden ? memory.take<float>(a.num_rows * width) : nullptr;
  first.maximum = memory.take<float>(a.num_rows);
  first.sum = memory.take<float>(a.num_rows);
  plan.blocks[0] = count_blocks(first, plan.shape, processors);

  AttentionParameters& second = plan.gradient.attention;
  if (a.grad_items) {
    row.weight = memory.take<float>(a.num_rows);
    row.key_scale = memory.take<float>(a.num_rows);
    row.key_bias = memory.take<float>(a.num_rows);
    row.key_maximum = memory.take<float>(a.num_rows);
    second = between(tables, 1, plan.shape);
    second.key_ids = target;
    second.key_scale = row.key_scale;
    second.key_bias = row.key_bias;
    second.key_maximum = row.key_maximum;
    second.query_bias = bias;
    // Where the gradient has the layout of the sums, the sums are put there and replaced row by row.
    const bool in_place = a.dtype == DType::kFloat32 && a.dim == width;
    second.out[0] = in_place ? static_cast<float*>(a.grad_items) : memory.take<float>(a.num_items * width);
    second.out[1] = second.out[0];
    second.sum = memory.take<float>(a.num_items);
    plan.blocks[1] = count_blocks(second, plan.shape, processors);
  }
  const int64_t slots = int64_t(std::max(plan.blocks[0], plan.blocks[1])) * plan.shape.tile_queries;
  first.slot_out = second.slot_out = a.grad_hidden || a.grad_items ? memory.take<float>(slots * width) : nullptr;
  first.slot_maximum = memory.take<float>(slots);
  first.slot_sum = second.slot_sum = memory.take<float>(slots);
  plan.workspace_bytes = memory.used();

  plan_rows(a, plan);
  return plan;
}

}  // namespace

int64_t item_cross_entropy_workspace(const ItemCrossEntropyArguments& a) { return make_plan(a).workspace_bytes; }

void item_cross_entropy(const ItemCrossEntropyArguments& a, const Queue& queue) {
  const Plan plan = make_plan(a);
  enqueue(queue, "table_maximum_kernel", kMaximumWarps / (kRowThreads / 32), 2, kRowThreads, 0, plan.tables);
  enqueue(queue, "table_size_kernel", 1, 1, 32, 0, plan.tables);
  enqueue_rows(queue, "table_halves_kernel", plan.shape, std::max(a.num_rows, a.num_items), 2, plan.tables);
  enqueue_attention(queue, plan.shape, "kRunningBiased", a.grad_hidden, plan.blocks[0], plan.row.attention);
  enqueue_rows(queue, "item_row_kernel", plan.shape, a.num_rows, 1, plan.row);
  if (!a.grad_items) return;
  enqueue_attention(queue, plan.shape, "kByKeyBiased", true, plan.blocks[1], plan.gradient.attention);
  enqueue_rows(queue, "item_gradient_kernel", plan.shape, a.num_items, 1, plan.gradient);
}

}  // namespace hellm::cuda

HELLM_CPU_KERNEL(item_cross_entropy, hellm::ItemCrossEntropyArguments)

namespace hellm::binding {
namespace {

// Lists of arguments are filled line by line, in the order of the fields.
// clang-format off
void item_cross_entropy(Address hidden, Address item_embedding, Address target, Address bias, Address row_grad,
                        Address row_loss, Address grad_hidden, Address grad_items, Address grad_bias, int64_t num_rows,
                        int64_t num_items, int64_t dim, int dtype, int num_threads) {
  const ItemCrossEntropyArguments arguments{at(hidden), at(item_embedding), at<const int64_t>(target), at(bias),
      at(row_grad), at(row_loss), at(grad_hidden), at(grad_items), at(grad_bias), num_rows, num_items, dim,
      DType(dtype), num_threads};
  run(cpu::item_cross_entropy, arguments);
}

namespace gpu {

ItemCrossEntropyArguments item_cross_entropy(Address hidden, Address item_embedding, Address target,
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

}  // namespace gpu
// clang-format on

const Operator kOperator([](py::module_& m) {
  m.def("item_cross_entropy", &item_cross_entropy);
  define_plan(m, "item_cross_entropy", "item_cross_entropy.cuh", &gpu::item_cross_entropy, &cuda::item_cross_entropy);
  m.def("item_cross_entropy_workspace",
        [](int64_t num_rows, int64_t num_items, int64_t dim, bool hidden_grad, bool items_grad, bool highest_precision,
           int num_processors, int shared_bytes, int dtype) {
          const Address hidden = hidden_grad ? 16 : 0, items = items_grad ? 16 : 0;
          return cuda::item_cross_entropy_workspace(gpu::item_cross_entropy(0, 0, 0, 0, 0, 0, 0, 0, hidden, items, 0, 0,
                                                                            num_rows, num_items, dim, highest_precision,
                                                                            num_processors, shared_bytes, dtype));
        });
});

}  // namespace
}  // namespace hellm::binding
