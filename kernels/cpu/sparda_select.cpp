// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// SparDA's block selection for decode rows on a CPU: scores the paged compressed keys, pools them to
// blocks and takes the best, without materialising anything. `kernels/reference/sparda_select.py` is the
// readable definition.
//
// One (block, KV head) page of the compressed keys is [windows per block][D]; its windows end in
// that block, so the first one of a sequence's first block does not exist.

#include <algorithm>
#include <vector>

#include "simd.h"

extern "C" {

// Strides in elements.
struct SpardaSelectSizes {
  int64_t rows, kv_heads, group, dim, windows, stride, blocks, table_row;
  int64_t init_blocks, local_blocks, top_k, lag, softmax, dense_len, capacity;
  int64_t vector_row, vector_head, compressed_block, compressed_head, compressed_window;
  float scale;
};
}

namespace {

typedef SpardaSelectSizes Shape;

struct Scratch {
  std::vector<float> vectors, scores, logits;
  std::vector<int32_t> order;
};

// Dot products of one vector with the windows of one block.
template <typename T>
inline void dots(const float* vector, const T* keys, int64_t windows, const Shape& s, float* out) {
  for (int64_t w = 0; w < windows; ++w, keys += s.compressed_window) {
    vec sums = {};
    int64_t j = 0;
    for (; j + kLanes <= s.dim; j += kLanes) sums += load(vector + j) * load(keys + j);
    float total = sum(sums);
    for (; j < s.dim; ++j) total += vector[j] * to_float(keys[j]);
    out[w] = total;
  }
}

bool reads_everything(const Shape& s, int64_t position) {
  return position / (s.windows * s.stride) < s.top_k || position < s.dense_len;
}

// Fills tmp.order with the free picks of one row and head: the best blocks in [init, last).
template <typename T>
void pick(const Shape& s, const T* cache, const T* vectors, const int32_t* table, int64_t position,
          int64_t row, int64_t head, int64_t last, Scratch& tmp) {
  tmp.order.clear();
  const int64_t picks = s.top_k - (s.init_blocks + s.local_blocks + 1);
  if (picks <= 0) return;
  for (int64_t g = 0; g < s.group; ++g) {
    const T* source = vectors + row * s.vector_row + (head * s.group + g) * s.vector_head;
    for (int64_t j = 0; j < s.dim; ++j) tmp.vectors[g * s.dim + j] = to_float(source[j]);
  }
  // Window slots by where they end: slot n ends at (n + 1) * stride - 1 and slot 0 is none.
  // Those complete at the scored position number:
  const int64_t visible = (position - s.lag + 1) / s.stride;
  // A forecast needs only what the free blocks can see: one window beyond the last of them.
  const int64_t slots = s.softmax ? visible : std::min(visible, last * s.windows + 1);
  float* scores = tmp.scores.data();
  std::fill(scores, scores + slots, 0.0f);
  for (int64_t g = 0; g < s.group; ++g) {
    float* logits = s.softmax ? tmp.logits.data() : scores;
    for (int64_t n = 0; n < slots; n += s.windows)
      dots(tmp.vectors.data() + g * s.dim,
           cache + table[n / s.windows] * s.compressed_block + head * s.compressed_head,
           std::min(s.windows, slots - n), s, logits + n);
    if (!s.softmax) break;
    float top = -INFINITY;
    for (int64_t n = 1; n < slots; ++n) top = std::max(top, logits[n] *= s.scale);
    const int64_t padded = (slots + kLanes - 1) / kLanes * kLanes;
    logits[0] = -INFINITY;
    for (int64_t n = slots; n < padded; ++n) logits[n] = -INFINITY;
    vec mass = {};
    for (int64_t n = 0; n < padded; n += kLanes) {
      const vec e = exp_nonpositive(load(logits + n) - top);
      *reinterpret_cast<vec*>(logits + n) = e;
      mass += e;
    }
    const float inverse = 1.0f / sum(mass);
    for (int64_t n = 0; n < slots; ++n) scores[n] += logits[n] * inverse;
  }
  // Block m overlaps the slots m * windows to (m + 1) * windows, both included.
  float* best = tmp.logits.data();
  for (int64_t m = s.init_blocks; m < last; ++m) {
    float most = -INFINITY;
    for (int64_t n = std::max<int64_t>(m * s.windows, 1);
         n <= std::min((m + 1) * s.windows, slots - 1); ++n)
      most = std::max(most, scores[n]);
    best[m] = most;
    tmp.order.push_back(static_cast<int32_t>(m));
  }
  auto better = [&](int32_t a, int32_t b) {
    return best[a] > best[b] || (best[a] == best[b] && a < b);
  };
  std::nth_element(tmp.order.begin(), tmp.order.begin() + picks, tmp.order.end(), better);
  tmp.order.resize(picks);
  std::sort(tmp.order.begin(), tmp.order.end());
}

template <typename T>
void select(const Shape& s, const T* cache, const T* vectors, const int32_t* table,
            const int64_t* positions, int32_t* logical, int32_t* pieces, int32_t* lengths) {
  const int64_t block_size = s.windows * s.stride;
  bool scored = false;
  for (int64_t row = 0; row < s.rows; ++row) {
    const int64_t position = positions[row], own = position / block_size;
    const bool everything = reads_everything(s, position);
    scored |= !everything;
    lengths[row] = position < 0 ? 0
                                : static_cast<int32_t>((everything ? own : s.top_k - 1) * block_size +
                                                       position % block_size + 1);
  }
#pragma omp parallel if (scored)
  {
    static thread_local Scratch tmp;
    if (scored) {
      tmp.vectors.resize(s.group * s.dim + kLanes);
      tmp.scores.resize(s.blocks * s.windows + kLanes);
      tmp.logits.resize(s.blocks * s.windows + kLanes);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < s.rows * s.kv_heads; ++task) {
      const int64_t row = task / s.kv_heads, head = task % s.kv_heads;
      const int64_t position = positions[row], own = position / block_size;
      const int32_t* blocks = table + row * s.table_row;
      int32_t* chosen = logical + task * s.capacity;
      int64_t k = 0;
      auto take = [&](int64_t first, int64_t end) {
        for (int64_t m = first; m < end; ++m) chosen[k++] = static_cast<int32_t>(m);
      };
      if (position >= 0 && reads_everything(s, position)) {
        take(0, own + 1);
      } else if (position >= 0) {
        const int64_t last = own - s.local_blocks;  // free picks lie before it
        pick(s, cache, vectors, blocks, position, row, head, last, tmp);
        take(0, s.init_blocks);
        for (int32_t m : tmp.order) chosen[k++] = m;
        take(last, own + 1);
      }
      std::fill(chosen + k, chosen + s.capacity, -1);
      int32_t* found = pieces + task * s.capacity;
      for (int64_t i = 0; i < s.capacity; ++i)
        found[i] = chosen[i] < 0 ? -1 : static_cast<int32_t>(blocks[chosen[i]] * s.kv_heads + head);
    }
  }
}

}  // namespace

extern "C" {

// dtype: of cache and vectors, as with_dtype names it; others return 2. lag: scores are those of the
// token `lag` positions before. softmax: 0 ranks raw dot products of a single vector per
// KV head. vectors may be null if every row reads all its blocks.
int vllm_sparse_select_blocks(int dtype, const void* cache, const void* vectors,
                              const int32_t* table, const int64_t* positions, int32_t* logical,
                              int32_t* pieces, int32_t* lengths, const SpardaSelectSizes* sizes) {
  return with_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    select<T>(*sizes, static_cast<const T*>(cache), static_cast<const T*>(vectors), table,
              positions, logical, pieces, lengths);
  });
}
}
