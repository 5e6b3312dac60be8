// The kernels of csrc/cuda on the CPU: g++ -include emulated_gpu.h; `launch` takes what a launch plan says.
#include "../../csrc/cuda/hypergraph_conv.cu"
#include "../../csrc/cuda/info_nce.cu"
#include "../../csrc/cuda/item_cross_entropy.cu"
#include "../../csrc/cuda/knn.cu"

#include <map>
#include <string>

uint3_ threadIdx, blockIdx, gridDim;

namespace emulated {
std::vector<Thread> threads;
int current;
ucontext_t scheduler;
Meeting warp_meeting[64], block_meeting;
void* deposit[2048];
std::function<void()> body;
}  // namespace emulated

namespace hellm::ptx {
std::vector<unsigned char> shared_memory;
std::vector<Copies> copies;
int accumulator_bits = 24;
}  // namespace hellm::ptx

namespace {

void run_thread() {
  emulated::body();
  emulated::threads[emulated::current].done = true;
  swapcontext(&emulated::threads[emulated::current].context, &emulated::scheduler);
}

void run_block(unsigned num_threads, unsigned shared_bytes) {
  using namespace emulated;
  // Memory of a new block holds anything.
  hellm::ptx::shared_memory.assign(shared_bytes + 16, 0xff);
  hellm::ptx::copies.assign(num_threads, {});
  threads.resize(num_threads);
  for (unsigned t = 0; t < num_threads; ++t) {
    Thread& thread = threads[t];
    thread.done = false;
    thread.stack.resize(kStack);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (unsigned t = 0; t < num_threads; ++t) {
      if (threads[t].done) continue;
      any = true;
      current = int(t);
      threadIdx = {t, 0, 0};
      swapcontext(&scheduler, &threads[t].context);
    }
  }
  for (const Meeting& meeting : warp_meeting) {
    if (meeting.arrived) std::abort();  // some threads of a warp waited for others that had left
  }
}

using Call = std::function<void()>;

template <typename Parameters>
Call call(const void* function, const void* parameters) {
  const auto kernel = reinterpret_cast<void (*)(const Parameters)>(const_cast<void*>(function));
  return [=] { kernel(*static_cast<const Parameters*>(parameters)); };
}

// What the kernels of each family get.
const std::map<std::string, Call (*)(const void*, const void*)> kCalls = {
    {"gather_kernel", call<hellm::GatherParameters>},
    {"hub_store_kernel", call<hellm::GatherParameters>},
    {"pack_kernel", call<hellm::PackParameters>},
    {"normalize_kernel", call<hellm::NormalizeParameters>},
    {"attention_kernel", call<hellm::AttentionParameters>},
    {"info_nce_row_kernel", call<hellm::RowParameters>},
    {"info_nce_gradient_kernel", call<hellm::GradientParameters>},
    {"table_maximum_kernel", call<hellm::TableParameters>},
    {"table_size_kernel", call<hellm::TableParameters>},
    {"table_halves_kernel", call<hellm::TableParameters>},
    {"item_row_kernel", call<hellm::ItemRowParameters>},
    {"item_gradient_kernel", call<hellm::ItemGradientParameters>},
    {"knn_unit_kernel", call<hellm::KnnParameters>},
    {"knn_select_kernel", call<hellm::KnnParameters>},
    {"knn_crowded_kernel", call<hellm::KnnParameters>},
};

}  // namespace

extern "C" void set_accumulator_bits(int bits) { hellm::ptx::accumulator_bits = bits; }

// 0, or 1 if there is no such kernel.
extern "C" int launch(const char* kernel, unsigned grid_x, unsigned grid_y, unsigned threads, unsigned shared_bytes,
                      const void* parameters) {
  using namespace hellm::cuda;
  const std::string name(kernel);
  for (const auto& table :
       {hypergraph_conv_kernels(), info_nce_kernels(), item_cross_entropy_kernels(), knn_kernels()}) {
    for (int i = 0; i < table.count; ++i) {
      if (name != table.kernels[i].name) continue;
      emulated::body = kCalls.at(name.substr(0, name.find('<')))(table.kernels[i].function, parameters);
      gridDim = {grid_x, grid_y, 1};
      for (unsigned y = 0; y < grid_y; ++y) {
        for (unsigned x = 0; x < grid_x; ++x) {
          blockIdx = {x, y, 0};
          run_block(threads, shared_bytes);
        }
      }
      return 0;
    }
  }
  return 1;
}
