// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// SparDA's block selection for decode rows on a CPU: scores the paged compressed keys, pools them to
// blocks and takes the best, without materialising anything. `kernels/reference/selection.py` is the
// readable definition.
//
// One (block, KV head) page of the compressed keys is [windows per block][D]; its windows end in
// that block, so the first one of a sequence's first block does not exist.

#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

struct Shape {
  int64_t rows, kv_heads, group, dim, windows, stride, blocks;
  int64_t init_blocks, local_blocks, top_k, lag, softmax, vector_stride;
  float scale;
};

struct Scratch {
  std::vector<float> vectors, scores, logits;
  std::vector<int32_t> order;
};

// Dot products of one vector with the windows of one page.
template <typename T>
inline void dots(const float* vector, const T* page, int64_t windows, int64_t dim, float* out) {
  for (int64_t w = 0; w < windows; ++w, page += dim) {
    vec sums = {};
    int64_t j = 0;
    for (; j + kLanes <= dim; j += kLanes) sums += load(vector + j) * load(page + j);
    float total = sum(sums);
    for (; j < dim; ++j) total += vector[j] * to_float(page[j]);
    out[w] = total;
  }
}

template <typename T>
void select(const Shape& s, const T* cache, const T* vectors, const int64_t* table,
            const int64_t* positions, int64_t* out) {
  const int64_t block_size = s.windows * s.stride;
  const int64_t page = s.windows * s.dim;
#pragma omp parallel
  {
    static thread_local Scratch tmp;
    tmp.vectors.resize(s.group * s.dim + kLanes);
    tmp.scores.resize(s.blocks * s.windows + kLanes);
    tmp.logits.resize(s.blocks * s.windows + kLanes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < s.rows * s.kv_heads; ++task) {
      const int64_t row = task / s.kv_heads, head = task % s.kv_heads;
      const int64_t own = positions[row] / block_size;
      int64_t* chosen = out + task * s.top_k;
      // Free picks lie in [init, last); all others up to `own` are always read.
      const int64_t last = std::max(own - s.local_blocks, std::min(s.init_blocks, own + 1));
      const int64_t first = std::min(s.init_blocks, last);
      const int64_t forced = first + own + 1 - last;
      const int64_t picks = std::min(last - first, s.top_k - forced);
      tmp.order.clear();
      if (picks == last - first) {
        for (int64_t m = first; m < last; ++m) tmp.order.push_back(static_cast<int32_t>(m));
      } else if (picks > 0) {
        const T* source = vectors + row * s.vector_stride + head * s.group * s.dim;
        for (int64_t i = 0; i < s.group * s.dim; ++i) tmp.vectors[i] = to_float(source[i]);
        // Window slots by where they end: slot n ends at (n + 1) * stride - 1 and slot 0 is none.
        // Those complete at the scored position number:
        const int64_t visible =
            std::min((positions[row] - s.lag + 1) / s.stride, s.blocks * s.windows);
        // A forecast needs only what the free blocks can see: one window beyond the last of them.
        const int64_t slots = s.softmax ? visible : std::min(visible, last * s.windows + 1);
        float* scores = tmp.scores.data();
        std::fill(scores, scores + slots, 0.0f);
        for (int64_t g = 0; g < s.group; ++g) {
          float* logits = s.softmax ? tmp.logits.data() : scores;
          for (int64_t n = 0; n < slots; n += s.windows) {
            const int64_t block = table[row * s.blocks + n / s.windows];
            dots(tmp.vectors.data() + g * s.dim, cache + (block * s.kv_heads + head) * page,
                 std::min(s.windows, slots - n), s.dim, logits + n);
          }
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
        for (int64_t m = first; m < last; ++m) {
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
      int64_t k = 0;
      for (int64_t m = 0; m < first; ++m) chosen[k++] = m;
      for (int32_t m : tmp.order) chosen[k++] = m;
      for (int64_t m = last; m <= own && k < s.top_k; ++m) chosen[k++] = m;
      while (k < s.top_k) chosen[k++] = -1;
    }
  }
}

}  // namespace

extern "C" {

// dtype: 0 float32, 1 bfloat16, 2 float16, of cache and vectors. lag: scores are those of the token
// `lag` positions before. softmax: 0 ranks raw dot products of a single vector per KV head.
int vllm_sparse_select_blocks(int dtype, const void* cache, const void* vectors,
                              const int64_t* table, const int64_t* positions, int64_t* out,
                              const int64_t* sizes, float scale) {
  Shape s = {};
  int64_t* fields[] = {&s.rows,        &s.kv_heads,     &s.group, &s.dim, &s.windows,
                       &s.stride,      &s.blocks,       &s.init_blocks, &s.local_blocks,
                       &s.top_k,       &s.lag,          &s.softmax, &s.vector_stride};
  for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); ++i) *fields[i] = sizes[i];
  s.scale = scale;
#define VLLM_SPARSE_RUN(T)                                                                   \
  select<T>(s, static_cast<const T*>(cache), static_cast<const T*>(vectors), table, positions, out)
  switch (dtype) {
    case 0: VLLM_SPARSE_RUN(float); return 0;
    case 1: VLLM_SPARSE_RUN(bf16); return 0;
    case 2: VLLM_SPARSE_RUN(_Float16); return 0;
  }
#undef VLLM_SPARSE_RUN
  return 2;
}
}
