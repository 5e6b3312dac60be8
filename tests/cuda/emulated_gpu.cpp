// The kernels of csrc/cuda on the CPU: g++ -include emulated_gpu.h -include OPERATOR.cuh...; `launch` takes what a launch
// plan says.
#include <algorithm>
#include <numeric>
#include <random>
#include <string>

uint3_ threadIdx, blockIdx, gridDim;

namespace emulated {
std::vector<Thread> threads;
int current;
jmp_buf scheduler;
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

// Nothing may depend on who goes first. With `shuffled`, blocks, warps and lanes go in any order, and a warp goes on
// until it waits for the others of its block.
bool shuffled;
std::mt19937 random_bits;

std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (shuffled) std::shuffle(order.begin(), order.end(), random_bits);
  return order;
}

void run_thread() {
  emulated::body();
  emulated::threads[emulated::current].done = true;
  _longjmp(emulated::scheduler, 1);
}

// Until the thread waits for others or is done.
void go_on(emulated::Thread& thread) {
  if (_setjmp(emulated::scheduler)) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  setcontext(&thread.context);
}

void run_block(unsigned num_threads, unsigned shared_bytes) {
  using namespace emulated;
  // Memory of a new block holds anything.
  hellm::ptx::shared_memory.assign(shared_bytes + 16, 0xff);
  hellm::ptx::copies.assign(num_threads, {});
  threads.resize(num_threads);
  for (unsigned t = 0; t < num_threads; ++t) {
    Thread& thread = threads[t];
    thread.started = thread.done = false;
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  for (bool any = true, ran = true; any;) {
    if (!ran) std::abort();  // some threads wait for others that have left
    any = ran = false;
    for (const unsigned warp : in_order(num_threads / 32)) {
      unsigned long before;
      do {
        before = warp_meeting[warp].generation;
        for (const unsigned lane : in_order(32)) {
          const unsigned t = warp * 32 + lane;
          if (threads[t].done) continue;
          any = true;
          if (threads[t].waits()) continue;
          ran = true;
          current = int(t);
          threadIdx = {t, 0, 0};
          go_on(threads[t]);
        }
      } while (shuffled && warp_meeting[warp].generation != before);
    }
  }
}

}  // namespace

extern "C" void set_accumulator_bits(int bits) { hellm::ptx::accumulator_bits = bits; }

// Of the blocks of a grid and the threads of a block: by number, or shuffled from a seed that is not 0.
extern "C" void set_order(unsigned seed) {
  shuffled = seed != 0;
  random_bits.seed(seed);
}

// 0, or 1 if there is no such kernel.
extern "C" int launch(const char* kernel, unsigned grid_x, unsigned grid_y, unsigned threads, unsigned shared_bytes,
                      const void* parameters) {
  const auto found = emulated::kernels().find(kernel);
  if (found == emulated::kernels().end()) return 1;
  emulated::body = [=] { found->second(parameters); };
  gridDim = {grid_x, grid_y, 1};
  for (const unsigned block : in_order(grid_x * grid_y)) {
    blockIdx = {block % grid_x, block / grid_x, 0};
    run_block(threads, shared_bytes);
  }
  return 0;
}
