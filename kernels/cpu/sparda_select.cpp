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
#include <cmath>
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

template <typename T>
struct Scratch {
  std::vector<typename Dot<T>::query> query;
  std::vector<const T*> keys;  // of each window
  std::vector<float> scores, logits;
  std::vector<int32_t> order;
};

bool reads_everything(const Shape& s, int64_t position) {
  return position / (s.windows * s.stride) < s.top_k || position < s.dense_len;
}

// Windows are asked for so many windows ahead: pages lie anywhere. With AVX-512 nobody has measured
// it, and it is left to the processor.
constexpr int kAhead = kLanes == 8 ? 2 * kLanes : 0;

template <typename T>
void ask_ahead(const Shape& s, const T* const* keys) {
  if constexpr (kAhead > 0)
    for (int r = 0; r < kLanes; ++r)
      for (int64_t b = 0; b < s.dim * static_cast<int64_t>(sizeof(T)); b += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(keys[kAhead + r]) + b);
}

// Adds to tmp.scores the softmax over the windows [1, slots) of G heads. P as in dots().
template <int G, int P, typename T>
void add_probabilities(const Shape& s, int64_t slots, const typename Dot<T>::query* query,
                       Scratch<T>& tmp) {
  constexpr int H = G == 3 ? 4 : G;  // lanes of a window
  // Windows go by kLanes, which are H vectors: n is in vector n % H, so that sums<H>() of them, heads
  // added up, has all in order.
  float* logits = tmp.logits.data();
  auto hide = [&](int64_t n) {
    const int64_t at = n % kLanes;
    float* x = logits + (n - at) * H + at % H * kLanes + at / H * H;
    std::fill(x, x + H, -INFINITY);
  };
  const int64_t padded = (slots + kLanes - 1) / kLanes * kLanes;
  vec highest = vec{} - INFINITY;
  for (int64_t n = 0; n < padded; n += kLanes) {
    ask_ahead(s, tmp.keys.data() + n);
    float* own = logits + n * H;
    for (int j = 0; j < H; ++j) {
      const T* keys[kLanes / H];
      for (int r = 0; r < kLanes / H; ++r) keys[r] = tmp.keys[n + H * r + j];
      store(own + j * kLanes, dots<G, H, P>(query, keys, s.dim) * s.scale);
    }
    if (n == 0) hide(0);
    for (int64_t after = slots; after < n + kLanes; ++after) hide(after);
    for (int j = 0; j < H; ++j) {
      const vec x = load(own + j * kLanes);
      highest = x > highest ? x : highest;
    }
  }
  const vec top = largest_by<H>(highest);
  vec mass = {};
  for (int64_t i = 0; i < padded * H; i += kLanes) {
    const vec e = exp_nonpositive(load(logits + i) - top);
    store(logits + i, e);
    mass += e;
  }
  vec inverse = 1.0f / sum_by<H>(mass);
  for (int i = 0; i < kLanes; ++i)
    if (i % H >= G) inverse[i] = 0;
  float* scores = tmp.scores.data();
  for (int64_t n = 0; n < padded; n += kLanes) {
    vec of_heads[H];
    for (int j = 0; j < H; ++j) of_heads[j] = load(logits + n * H + j * kLanes) * inverse;
    store(scores + n, load(scores + n) + sums<H>(of_heads));
  }
}

// Scores of the windows [1, slots) of one row and head. P as in dots().
template <int P, typename T>
void score(const Shape& s, int64_t slots, Scratch<T>& tmp) {
  float* scores = tmp.scores.data();
  if (!s.softmax) {
    for (int64_t n = 0; n < slots; n += kLanes) {
      ask_ahead(s, tmp.keys.data() + n);
      store(scores + n, dots<1, 1, P>(tmp.query.data(), tmp.keys.data() + n, s.dim));
    }
    return;
  }
  std::fill(scores, scores + slots + kLanes, 0.0f);
  by_four(s.group, [&](auto count, int64_t first) {
    add_probabilities<decltype(count)::value, P>(s, slots, tmp.query.data() + first * s.dim, tmp);
  });
}

// Fills tmp.order with the free picks of one row and head: the best blocks in [init, last).
template <typename T>
void pick(const Shape& s, const T* cache, const T* vectors, const int32_t* table, int64_t position,
          int64_t row, int64_t head, int64_t last, Scratch<T>& tmp) {
  tmp.order.clear();
  const int64_t picks = s.top_k - (s.init_blocks + s.local_blocks + 1);
  if (picks <= 0) return;
  for (int64_t g = 0; g < s.group; ++g) {
    const T* source = vectors + row * s.vector_row + (head * s.group + g) * s.vector_head;
    for (int64_t j = 0; j < s.dim; ++j)
      tmp.query[g * s.dim + j] = from_float<typename Dot<T>::query>(to_float(source[j]));
  }
  // Window slots by where they end: slot n ends at (n + 1) * stride - 1 and slot 0 is none.
  // Those complete at the scored position number:
  const int64_t visible = (position - s.lag + 1) / s.stride;
  // A forecast needs only what the free blocks can see: one window beyond the last of them.
  const int64_t slots = s.softmax ? visible : std::min(visible, last * s.windows + 1);
  for (int64_t n = 0, block = 0; n < slots; ++block) {
    const T* key = cache + table[block] * s.compressed_block + head * s.compressed_head;
    for (const int64_t end = std::min(n + s.windows, slots); n < end; ++n) {
      tmp.keys[n] = key;
      key += s.compressed_window;
    }
  }
  // Up to whole vectors, and as far as is asked for ahead.
  std::fill_n(tmp.keys.begin() + slots, kLanes + kAhead, tmp.keys[0]);
  switch (s.dim) {
    case 64: score<64 / kPiece>(s, slots, tmp); break;
    case 128: score<128 / kPiece>(s, slots, tmp); break;
    default: score<0>(s, slots, tmp);
  }
  const float* scores = tmp.scores.data();
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
    static thread_local Scratch<T> tmp;
    if (scored) {
      const int64_t most = s.blocks * s.windows + kLanes + kAhead;
      tmp.query.resize(s.group * s.dim);
      tmp.keys.resize(most);
      tmp.scores.resize(most);
      tmp.logits.resize(4 * most);
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
