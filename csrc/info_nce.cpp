// Launch plan of InfoNCE: normalise, attention over the negatives, losses, attention with the roles swapped, gradients.
#include "info_nce.h"

#include "binding.h"

#include "cuda/attention_plan.h"
#include "cuda/info_nce.cuh"

namespace hellm::cuda {
namespace {

struct Plan {
  Shape shape;
  int64_t workspace_bytes;
  bool gradients;
  int blocks[2];  // of each pass
  NormalizeParameters normalize{};
  RowParameters row{};
  AttentionParameters second{};
  GradientParameters gradient{};
};

Plan make_plan(const InfoNceArguments& a) {
  Plan plan{shape_of(a.dim, a.highest_precision), 0, a.row_grad != nullptr, {0, 0}};
  const int64_t n = a.num_keys, r = a.num_rows, width = plan.shape.width;
  const bool both = plan.shape.parts == 2;
  if (n >= int64_t(1) << 31) {
    throw std::invalid_argument("info_nce takes fewer than 2^31 rows, got " + std::to_string(n));
  }
  using Bits = unsigned short;
  const Processors processors{a.num_processors, a.shared_bytes};
  Workspace memory(a.workspace);

  NormalizeParameters& normalize = plan.normalize;
  normalize.x[0] = a.anchor;
  normalize.x[1] = a.positive;
  normalize.high = memory.take<Bits>(2 * n * width);
  normalize.low = both ? memory.take<Bits>(2 * n * width) : nullptr;
  normalize.inverse_norm = memory.take<float>(2 * n);
  normalize.weight_maximum = memory.take<unsigned>(1);
  normalize.rows = n;
  normalize.dim = a.dim;
  normalize.width = int(width);
  normalize.storage = int(a.dtype);

  // Without the anchor's own view only the second half of the unit rows, the positives, are keys.
  const int64_t skip = a.intra_view_negatives ? 0 : n * width;
  const auto keys_of = [&](void* halves) { return halves ? static_cast<Bits*>(halves) + skip : nullptr; };
  AttentionParameters first{};
  first.query_high = normalize.high;
  first.query_low = normalize.low;
  first.query_rows = first.query_ids = reinterpret_cast<const int64*>(a.rows);
  first.key_high = keys_of(normalize.high);
  first.key_low = keys_of(normalize.low);
  first.temperature = a.device_temperature;
  first.weight_maximum = normalize.weight_maximum;
  first.queries = r;
  first.query_stride = first.keys = n;
  first.query_views = 1;
  first.key_views = a.intra_view_negatives ? 2 : 1;
  tile(first, plan.shape);
  first.out[0] = first.out[1] = plan.gradients ? memory.take<float>(r * width) : nullptr;
  first.maximum = memory.take<float>(r);
  first.sum = memory.take<float>(r);
  plan.blocks[0] = count_blocks(first, plan.shape, processors);

  RowParameters& row = plan.row;
  AttentionParameters& second = plan.second;
  if (plan.gradients) {
    row.weight = memory.take<float>(r);
    row.key_scale = memory.take<float>(r);
    row.key_bias = memory.take<float>(r);
    second = first;
    second.query_high = first.key_high;
    second.query_low = first.key_low;
    second.query_rows = second.query_ids = nullptr;
    second.queries = n;
    second.query_views = first.key_views;
    second.key_high = normalize.high;
    second.key_low = normalize.low;
    second.key_rows = second.key_ids = reinterpret_cast<const int64*>(a.rows);
    second.key_stride = n;
    second.key_scale = row.key_scale;
    second.key_bias = row.key_bias;
    second.keys = r;
    second.key_views = 1;
    tile(second, plan.shape);
    plan.blocks[1] = count_blocks(second, plan.shape, processors);
    // Where the gradients have the layout of the sums, the sums are put there and replaced row by row.
    const bool in_place = a.dtype == DType::kFloat32 && a.dim == width;
    const bool anchor_elsewhere = a.intra_view_negatives && !in_place;
    float* const anchor = anchor_elsewhere ? memory.take<float>(n * width) : static_cast<float*>(a.grad_anchor);
    float* const positive = in_place ? static_cast<float*>(a.grad_positive) : memory.take<float>(n * width);
    second.out[0] = a.intra_view_negatives ? anchor : positive;
    second.out[1] = positive;
  }
  const int64_t slots = int64_t(std::max(plan.blocks[0], plan.blocks[1])) * plan.shape.tile_queries;
  first.slot_out = second.slot_out = plan.gradients ? memory.take<float>(slots * width) : nullptr;
  first.slot_maximum = second.slot_maximum = memory.take<float>(slots);
  first.slot_sum = second.slot_sum = memory.take<float>(slots);
  plan.workspace_bytes = memory.used();

  row.attention = first;
  row.anchor = a.anchor;
  row.positive = a.positive;
  row.inverse_norm = normalize.inverse_norm;
  row.row_grad = static_cast<const float*>(a.row_grad);
  row.row_loss = static_cast<float*>(a.row_loss);
  row.row_slope = static_cast<float*>(a.row_slope);
  row.weight_maximum = normalize.weight_maximum;
  row.num_keys = n;
  row.rows = r;
  row.dim = a.dim;
  row.storage = int(a.dtype);
  row.blocks = plan.blocks[0];

  GradientParameters& gradient = plan.gradient;
  gradient.attention = second;
  gradient.x[0] = a.anchor;
  gradient.x[1] = a.positive;
  gradient.grad[0] = a.grad_anchor;
  gradient.grad[1] = a.grad_positive;
  gradient.inverse_norm = normalize.inverse_norm;
  gradient.row_out = first.out[0];
  gradient.weight = row.weight;
  gradient.row_order = reinterpret_cast<const int64*>(a.row_order);
  gradient.row_begin = reinterpret_cast<const int64*>(a.row_begin);
  gradient.num_keys = n;
  gradient.dim = a.dim;
  gradient.storage = int(a.dtype);
  gradient.blocks = plan.blocks[1];
  gradient.intra_view_negatives = a.intra_view_negatives;
  return plan;
}

}  // namespace

int64_t info_nce_workspace(const InfoNceArguments& a) { return make_plan(a).workspace_bytes; }

void info_nce(const InfoNceArguments& a, const Queue& queue) {
  const Plan plan = make_plan(a);
  enqueue_rows(queue, "normalize_kernel", plan.shape, a.num_keys, 2, plan.normalize);
  enqueue_attention(queue, plan.shape, "kRunning", plan.gradients, plan.blocks[0], plan.row.attention);
  enqueue_rows(queue, "info_nce_row_kernel", plan.shape, a.num_rows, 1, plan.row);
  if (!plan.gradients) return;
  enqueue_attention(queue, plan.shape, "kByKey", true, plan.blocks[1], plan.second);
  enqueue_rows(queue, "info_nce_gradient_kernel", plan.shape, a.num_keys, 2, plan.gradient);
}

}  // namespace hellm::cuda

HELLM_CPU_KERNEL(info_nce, hellm::InfoNceArguments)

namespace hellm::binding {
namespace {

// Lists of arguments are filled line by line, in the order of the fields.
// clang-format off
void info_nce(Address anchor, Address positive, Address rows, Address row_grad, Address row_loss, Address grad_anchor,
              Address grad_positive, Address row_slope, int64_t num_keys, int64_t num_rows, int64_t dim,
              double temperature, bool intra_view_negatives, bool highest_precision, bool bfloat16_products,
              int dtype, int num_threads) {
  const InfoNceArguments arguments{at(anchor), at(positive), at<const int64_t>(rows), at(row_grad), at(row_loss),
      at(grad_anchor), at(grad_positive), at(row_slope), num_keys, num_rows, dim, temperature, intra_view_negatives,
      highest_precision, bfloat16_products, DType(dtype), num_threads};
  run(cpu::info_nce, arguments);
}

namespace gpu {

InfoNceArguments info_nce(Address anchor, Address positive, Address rows, Address row_order, Address row_begin,
                          Address row_grad, Address row_loss, Address grad_anchor, Address grad_positive,
                          Address row_slope, Address workspace, int64_t num_keys, int64_t num_rows, int64_t dim,
                          Address temperature, bool intra_view_negatives, bool highest_precision,
                          int num_processors, int shared_bytes, int dtype) {
  return {at(anchor), at(positive), at<const int64_t>(rows), at(row_grad), at(row_loss), at(grad_anchor),
          at(grad_positive), at(row_slope), num_keys, num_rows, dim, 0.0, intra_view_negatives, highest_precision, false,
          DType(dtype), 0, at<const double>(temperature), at<const int64_t>(row_order), at<const int64_t>(row_begin),
          at(workspace), num_processors, shared_bytes};
}

}  // namespace gpu
// clang-format on

const Operator kOperator([](py::module_& m) {
  m.def("info_nce", &info_nce);
  define_plan(m, "info_nce", "info_nce.cuh", &gpu::info_nce, &cuda::info_nce);
  m.def("info_nce_workspace",
        [](int64_t num_keys, int64_t num_rows, int64_t dim, bool gradients, bool intra_view_negatives,
           bool highest_precision, int num_processors, int shared_bytes, int dtype) {
          const Address wanted = gradients ? 16 : 0;  // any address that is aligned like the real ones
          return cuda::info_nce_workspace(gpu::info_nce(0, 0, 0, 0, 0, wanted, 0, wanted, wanted, 0, 0, num_keys,
                                                        num_rows, dim, 0, intra_view_negatives, highest_precision,
                                                        num_processors, shared_bytes, dtype));
        });
});

}  // namespace
}  // namespace hellm::binding
