// What the launch plans around the attention kernel share: its shapes and its blocks.
#pragma once

#include <algorithm>

#include "parameters.cuh"
#include "plan.h"

namespace hellm::cuda {

// Of the attention kernel.
struct Shape {
  int width, parts, tile_queries, tile_keys;
  unsigned shared_bytes;  // of a block
};

template <int kWidth, int kParts>
Shape shape() {
  using Tile = AttentionTile<kWidth, kParts>;
  return {kWidth, kParts, Tile::kQueries, Tile::kKeys, unsigned(Tile::kSharedBytes)};
}

inline Shape shape_of(int64_t dim, bool both) {
  if (dim <= 64) return both ? shape<64, 2>() : shape<64, 1>();
  if (dim <= 128) return both ? shape<128, 2>() : shape<128, 1>();
  if (dim <= 256 && !both) return shape<256, 1>();
  throw std::invalid_argument("dim must be at most " + std::string(both ? "128" : "256") + " on a GPU, got " +
                              std::to_string(dim));
}

inline void tile(AttentionParameters& p, const Shape& shape) {
  p.tile_queries = shape.tile_queries;
  p.query_tiles = ceil_div(p.queries, shape.tile_queries);
  p.key_tiles = ceil_div(p.keys, shape.tile_keys);
}

// What the work is dealt to.
struct Processors {
  int64_t count, shared_bytes;  // shared_bytes: of each
};

// Blocks that run at the same time, where the registers of a processor hold `most`.
inline int64_t blocks_at_once(const Shape& shape, const Processors& processors, int64_t most) {
  constexpr int64_t kReservedBytes = 1024;  // by the driver, for each block
  const int64_t by_memory = processors.shared_bytes / (shape.shared_bytes + kReservedBytes);
  return std::max<int64_t>(1, std::min(by_memory, most)) * processors.count;
}

// More than run at the same time would come in a second wave, which leaves most processors idle.
inline int count_blocks(const AttentionParameters& p, const Shape& shape, const Processors& processors) {
  const int64_t units = p.query_tiles * p.query_views * p.key_tiles * p.key_views;
  return int(std::min(units, blocks_at_once(shape, processors, kAttentionBlocks)));
}

inline void enqueue_attention(const Queue& queue, const Shape& shape, const char* weights, bool output, int blocks,
                              const AttentionParameters& p) {
  const std::string name = "attention_kernel<" + std::to_string(shape.width) + ", " + std::to_string(shape.parts) +
                           ", " + weights + (output ? ", true>" : ", false>");
  enqueue(queue, name, blocks, 1, AttentionTile<64, 1>::kThreads, shape.shared_bytes, p);
}

// A kernel for one width of the rows, with a warp for each row.
template <typename Parameters>
void enqueue_rows(const Queue& queue, const std::string& kernel, const Shape& shape, int64_t rows, int64_t views,
                  const Parameters& p) {
  enqueue(queue, kernel + "<" + std::to_string(shape.width) + ">", ceil_div(rows, kRowThreads / 32), views, kRowThreads,
          0, p);
}

}  // namespace hellm::cuda
