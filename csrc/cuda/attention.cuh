// Attention whose values are its keys: one tile of keys in shared memory feeds both products. Half operands whatever the
// storage type: rows come in a range where they never overflow, cost what bfloat16 costs and keep three more bits. With
// kParts 2 a value is high + low, and three products give float32 accuracy.
#pragma once

#include "attention_products.cuh"

namespace hellm {

// First unit of work of a block; unit = tile of queries * key tiles + tile of keys.
__device__ __forceinline__ int64 first_unit(int64 units, int64 block, int64 blocks) { return units * block / blocks; }

// One tile of queries against tiles of keys; every warp has kQueries / 4 queries to itself.
template <int kWidth, int kParts, Weights kWeights, bool kOutput>
struct Attention : AttentionProducts<kWidth, kParts, kOutput, kWeights> {
  using Products = AttentionProducts<kWidth, kParts, kOutput, kWeights>;
  using typename Products::Tile;
  using Products::kBands, Products::kKeyBands, Products::kColumnBands, Products::kMaximum;
  using Products::lane, Products::out, Products::shared, Products::warp;
  static constexpr bool kKeyBias = kWeights != kRunning, kQueryBias = kWeights == kByKeyBiased;
  static constexpr bool kSum = kWeights != kByKey, kRows = kWeights == kByKey;

  const AttentionParameters& p;
  int query_view, first_query;  // rows are fewer than 2^31
  float temperature_scale, bias_shift;
  float maximum[kBands][2], sum[kBands][2];

  __device__ __forceinline__ Attention(const AttentionParameters& parameters) : p(parameters) {
    temperature_scale = kLog2E / float(*p.temperature);
    bias_shift = kWeightShift;
    if (!kMaximum) {
      const float largest = __uint_as_float(*p.weight_maximum);
      if (largest != 0) bias_shift -= log2f(largest);
    }
  }

  __device__ __forceinline__ void begin_tile(int tile) {
    query_view = tile / int(p.query_tiles);
    first_query = tile % int(p.query_tiles) * Tile::kQueries;
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        maximum[b][h] = -infinity();
        sum[b][h] = 0;
      }
#pragma unroll
      for (int c = 0; c < (kOutput ? kColumnBands : 1); ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[b][c][i] = 0;
      }
    }
    const auto row = [&](int i) -> int64 {
      const int query = first_query + i;
      if (query >= p.queries) return -1;
      const int64 chosen = p.query_rows ? p.query_rows[query] : query;
      return chosen >= 0 && chosen < p.query_stride ? query_view * p.query_stride + chosen : -1;
    };
    copy_rows<kWidth, Tile::kQueries, Tile::kThreads>(shared.query(0), p.query_high, row);
    if (kParts == 2) copy_rows<kWidth, Tile::kQueries, Tile::kThreads>(shared.query(kParts - 1), p.query_low, row);
  }

  // Of a key that is a chosen row; -1 for one that does not exist.
  __device__ __forceinline__ int64 row_of(int key) const {
    const int64 chosen = p.key_rows[key];
    return chosen >= 0 && chosen < p.key_stride ? chosen : -1;
  }

  __device__ __forceinline__ void load_keys(int view, int first, int stage) {
    const auto row = [&](int i) -> int64 {
      return first + i >= p.keys ? -1 : kRows && p.key_rows ? row_of(first + i) : view * p.keys + first + i;
    };
    copy_rows<kWidth, Tile::kKeys, Tile::kThreads>(shared.key(stage, 0), p.key_high, row);
    if (kParts == 2) copy_rows<kWidth, Tile::kKeys, Tile::kThreads>(shared.key(stage, kParts - 1), p.key_low, row);
    for (int i = threadIdx.x; i < Tile::kKeys; i += Tile::kThreads) {
      const int key = first + i;
      const bool present = key < p.keys;
      shared.id(stage)[i] = !present ? -1 : int(p.key_ids ? p.key_ids[key] : key);
      if (!kMaximum) shared.scale(stage)[i] = present ? p.key_scale[key] : 0.0f;
      if (kQueryBias) shared.maximum(stage)[i] = present ? p.key_maximum[key] : 0.0f;
      if (!kKeyBias) continue;
      const float bias = present && p.key_bias ? p.key_bias[key] : 0.0f;
      shared.bias(stage)[i] = !present ? -infinity() : kMaximum ? bias * kLog2E : bias + bias_shift;
    }
    ptx::commit_copies();
  }

  // `value` where the key is padding or has the id of the query.
  __device__ __forceinline__ void mask(int first_key, int stage, float value, float (&s)[kBands][kKeyBands][4]) {
    const bool apart = first_key - first_query >= Tile::kQueries || first_query - first_key >= Tile::kKeys;
    const int* const id = shared.id(stage);
    if (p.keys - first_key >= Tile::kKeys && !(p.query_ids || p.key_ids ? meet(first_key, id) : !apart)) return;
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int own = query_id(b, h);
#pragma unroll
        for (int j = 0; j < kKeyBands; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int other = id[j * 8 + lane % 4 * 2 + i];
            if (other == own || other == -1) s[b][j][h * 2 + i] = value;
          }
        }
      }
    }
  }

  // Whether a query of this warp may have the id of a key; that of every pair is asked only then.
  __device__ __forceinline__ bool meet(int first_key, const int* id) const {
    bool any = p.query_ids && p.key_ids;
    if (!p.key_ids) {
#pragma unroll
      for (int b = 0; b < kBands; ++b) {
#pragma unroll
        for (int h = 0; h < 2; ++h) any |= unsigned(query_id(b, h) - first_key) < unsigned(Tile::kKeys);
      }
    } else if (!p.query_ids) {
#pragma unroll
      for (int j = 0; j < kKeyBands; ++j) {
        any |= unsigned(id[j * 8 + lane / 4] - first_query) < unsigned(Tile::kQueries);
      }
    }
    return __any_sync(kAllLanes, any);
  }

  __device__ __forceinline__ int query_id(int band, int h) const {
    const int query = query_of(band, h);
    return query >= p.queries ? -2 : int(p.query_ids ? p.query_ids[query] : query);
  }

  // Number of the query whose values this lane has in half h (0: elements 0 and 1, 1: elements 2 and 3) of a band.
  __device__ __forceinline__ int query_of(int band, int h) const { return first_query + local_query(band, h); }
  __device__ __forceinline__ int local_query(int band, int h) const {
    return (warp * kBands + band) * 16 + h * 8 + lane / 4;
  }

  // Similarities to weights, relative to the running maximum of the row.
  __device__ __forceinline__ void weigh_running(int stage, float (&s)[kBands][kKeyBands][4]) {
    if constexpr (kKeyBias) add_key_bias(stage, s);
    const float unit = kKeyBias ? 1.0f : temperature_scale;
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
      float scale[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = -infinity();
#pragma unroll
        for (int j = 0; j < kKeyBands; ++j) top = fmaxf(top, fmaxf(s[b][j][2 * h], s[b][j][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
        const float higher = fmaxf(maximum[b][h], top * unit);
        const float shift = higher == -infinity() ? 0.0f : higher;
        scale[h] = ptx::exp2_fast(maximum[b][h] - shift);
        maximum[b][h] = higher;
        float total = 0;
#pragma unroll
        for (int j = 0; j < kKeyBands; ++j) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            s[b][j][i] = ptx::exp2_fast(fmaf(s[b][j][i], unit, kWeightShift - shift));
            total += s[b][j][i];
          }
        }
        sum[b][h] = sum[b][h] * scale[h] + total;
      }
      // Maxima settle after a few tiles.
      if (kOutput && __any_sync(kAllLanes, scale[0] != 1.0f || scale[1] != 1.0f)) {
#pragma unroll
        for (int c = 0; c < (kOutput ? kColumnBands : 1); ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[b][c][i] *= scale[i / 2];
        }
      }
    }
  }

  // Similarities to logits in base 2.
  __device__ __forceinline__ void add_key_bias(int stage, float (&s)[kBands][kKeyBands][4]) {
    const float* const bias = shared.bias(stage);
#pragma unroll
    for (int j = 0; j < kKeyBands; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float key_bias = bias[j * 8 + lane % 4 * 2 + i];
#pragma unroll
        for (int b = 0; b < kBands; ++b) {
#pragma unroll
          for (int h = 0; h < 2; ++h) s[b][j][2 * h + i] = fmaf(s[b][j][2 * h + i], temperature_scale, key_bias);
        }
      }
    }
  }

  // Similarities to sizes of weights with the scale and bias of each key: bounded, as every query is a negative of its
  // keys.
  __device__ __forceinline__ void weigh_by_key(int stage, float (&s)[kBands][kKeyBands][4]) {
    const float *scale = shared.scale(stage), *bias = shared.bias(stage), *top = shared.maximum(stage);
    // Read again for each tile of keys: over all of them there are no registers left.
    float query_bias[kBands][2];
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int query = query_of(b, h);
        query_bias[b][h] = kQueryBias && p.query_bias && query < p.queries ? p.query_bias[query] * kLog2E : 0.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < kKeyBands; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = j * 8 + lane % 4 * 2 + i;
        const float key_scale = fabsf(scale[key]), key_bias = bias[key], key_top = kQueryBias ? top[key] : 0.0f;
#pragma unroll
        for (int b = 0; b < kBands; ++b) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& value = s[b][j][2 * h + i];
            // Rounded as in the first pass, so that large logits cancel exactly.
            const float logit = kQueryBias ? fmaf(value, key_scale, query_bias[b][h]) - key_top + key_bias
                                           : fmaf(value, key_scale, key_bias);
            value = ptx::exp2_fast(logit);
          }
        }
      }
    }
  }

  // `s` holds the weights without the signs of their keys.
  __device__ __forceinline__ void add_signed_weights(int stage, const float (&s)[kBands][kKeyBands][4]) {
    const float* const scale = shared.scale(stage);
#pragma unroll
    for (int j = 0; j < kKeyBands; ++j) {
      __syncwarp();  // the scales of one band after the other: all at once, the compiler spills
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float key_scale = scale[j * 8 + lane % 4 * 2 + i];
#pragma unroll
        for (int b = 0; b < kBands; ++b) {
#pragma unroll
          for (int h = 0; h < 2; ++h) sum[b][h] += copysignf(s[b][j][2 * h + i], key_scale);
        }
      }
    }
  }

  // A piece that starts a tile goes to the output, slot < 0.
  __device__ __forceinline__ void store(int slot) {
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int query = query_of(b, h);
        const int64 place = slot < 0 ? query : int64(slot) * Tile::kQueries + local_query(b, h);
        float total = sum[b][h];
        if (kSum) {
          total += __shfl_xor_sync(kAllLanes, total, 1);
          total += __shfl_xor_sync(kAllLanes, total, 2);
        }
        if (query >= p.queries) continue;
        if (lane % 4 == 0) {
          if (kMaximum) (slot < 0 ? p.maximum : p.slot_maximum)[place] = maximum[b][h];
          if (kSum) (slot < 0 ? p.sum : p.slot_sum)[place] = total;
        }
        if constexpr (kOutput) {
          float* const base = slot >= 0 ? p.slot_out : query_view ? p.out[1] : p.out[0];
          float* const row = base + place * kWidth + lane % 4 * 2;
#pragma unroll
          for (int c = 0; c < kColumnBands; ++c) {
            Vector<float, 2> pair;
            pair[0] = out[b][c][2 * h];
            pair[1] = out[b][c][2 * h + 1];
            pair.store(row + c * 8);
          }
        }
      }
    }
  }

  // `count` tiles of keys from `begin` on.
  __device__ __forceinline__ void run(int begin, int count) {
    int view = begin / int(p.key_tiles), first = begin % int(p.key_tiles) * Tile::kKeys;
    load_keys(view, first, 0);
    for (int tile = 0; tile < count; ++tile) {
      const int stage = tile % 2, first_key = first;
      if (tile + 1 < count) {
        const bool last = p.keys - first <= Tile::kKeys;  // of its view
        view += last;
        first = last ? 0 : first + Tile::kKeys;
        load_keys(view, first, 1 - stage);
        ptx::wait_copies<1>();
      } else {
        ptx::wait_copies<0>();
      }
      __syncthreads();
      if (tile == 0) this->hold_queries();
      float s[kBands][kKeyBands][4];
      this->similarities(stage, s);
      if constexpr (kMaximum) {
        mask(first_key, stage, -infinity(), s);
        weigh_running(stage, s);
      } else {
        weigh_by_key(stage, s);
        mask(first_key, stage, 0.0f, s);
        if constexpr (kSum) add_signed_weights(stage, s);
      }
      if constexpr (kOutput) this->add_values(stage, s);
      __syncthreads();
    }
  }
};

template <int kWidth, int kParts, Weights kWeights, bool kOutput>
__global__ void __launch_bounds__(128, kAttentionBlocks) attention_kernel(const AttentionParameters p) {
  Attention<kWidth, kParts, kWeights, kOutput> attention(p);
  const int64 tiles = p.key_tiles * p.key_views, units = p.query_tiles * p.query_views * tiles;
  const int64 begin = first_unit(units, blockIdx.x, gridDim.x);
  const int64 end = first_unit(units, int64(blockIdx.x) + 1, gridDim.x);
  const int last_tile = int(end / tiles), last_key = int(end % tiles);
  int key = int(begin % tiles);
  for (int tile = int(begin / tiles); tile < last_tile || (tile == last_tile && key < last_key); ++tile) {
    attention.begin_tile(tile);
    attention.run(key, (tile == last_tile ? last_key : int(tiles)) - key);
    attention.store(key == 0 ? -1 : int(blockIdx.x));
    key = 0;
  }
}

}  // namespace hellm
