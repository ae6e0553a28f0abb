// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// Which blocks each token of a prompt reads, on a CPU: the scores of a few tokens exist at a time,
// and are pooled and ranked while they are in the cache. `kernels/reference/sparda_choose.py` is the
// readable definition; pages of compressed keys are those of sparda_select.cpp.

#include <cmath>

#include "tiles.h"

extern "C" {

// Mirrored by sparda_choose.py. Strides in elements; channels and marks are contiguous.
struct ChooseSizes {
  int64_t tokens, kv_heads, group, dim, windows, stride, table_blocks;
  int64_t init_blocks, local_blocks, top_k, lag, softmax;
  int64_t vector_token, vector_head, compressed_block, compressed_head, compressed_window;
};
}

namespace {

constexpr int64_t kScoresOfTask = 1 << 16;  // a quarter of a megabyte
constexpr int64_t kTokensOfTask = 16;

template <typename Q>
struct Work {
  std::vector<Q> rows;
  std::vector<float> logits, scores, best, ranked;
};

template <typename Q>
__attribute__((noinline)) Work<Q>& work_of_thread() {
  static thread_local Work<Q> own;
  return own;
}

// The best `picks` of blocks [first, end), the earlier one of equals, marked in `chosen`.
void mark_best(const std::vector<float>& best, int64_t first, int64_t end, int64_t picks,
               std::vector<float>& ranked, uint8_t* chosen) {
  ranked.assign(best.begin() + first, best.begin() + end);
  auto cut = ranked.begin() + picks - 1;
  std::nth_element(ranked.begin(), cut, ranked.end(), [](float a, float b) { return a > b; });
  const float least = *cut;
  int64_t equals = picks;
  for (int64_t m = first; m < end; ++m) {
    const bool better = best[m] > least;
    chosen[m] = better;
    equals -= better;
  }
  for (int64_t m = first; equals > 0; ++m)
    if (best[m] == least) chosen[m] = 1, --equals;
}

template <typename T>
struct Choice {
  typedef Held<T> Q;
  const ChooseSizes& s;
  const int32_t* table;
  const int64_t* positions;
  uint8_t* chosen;
  float scale;
  int64_t rows_per_token() const { return s.softmax ? s.group : 1; }

  // Window slots by where they end: slot n ends at (n + 1) * stride - 1 and slot 0 is none. A
  // forecast needs only what the free blocks can see: one window beyond the last of them.
  int64_t slots(int64_t position) const {
    const int64_t complete = std::max<int64_t>((position - s.lag + 1) / s.stride, 0);
    const int64_t last = std::max<int64_t>(position / (s.windows * s.stride) - s.local_blocks, 0);
    return s.softmax ? complete : std::min(complete, last * s.windows + 1);
  }

  void run(const T* cache, const T* vectors) {
    int64_t most = 0;
    for (int64_t t = 0; t < s.tokens; ++t) most = std::max(most, slots(positions[t]));
    const int64_t count = ceil_div(most, kTile), each = packed_keys(s.dim);
    const int64_t fit = kScoresOfTask / std::max<int64_t>(count * kTile * rows_per_token(), 1);
    const int64_t tokens = std::min(std::max<int64_t>(fit, 1), kTokensOfTask);
    const int64_t tasks = ceil_div(s.tokens, tokens);
    std::vector<Q> packed(s.kv_heads * count * each);
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 4)
      for (int64_t i = 0; i < s.kv_heads * count; ++i) {
        const int64_t head = i / count, first = i % count * kTile;
        const T* page = cache + head * s.compressed_head;
        pack_keys<T>(
            std::min<int64_t>(kTile, most - first), s.dim,
            [&](int64_t k) {
              const int64_t n = first + k;
              return page + table[n / s.windows] * s.compressed_block +
                     n % s.windows * s.compressed_window;
            },
            packed.data() + i * each);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < s.kv_heads * tasks; ++i) {
        const int64_t head = i % s.kv_heads, first = (tasks - 1 - i / s.kv_heads) * tokens;
        choose(packed.data() + head * count * each, each, vectors, head, first,
               std::min(first + tokens, s.tokens));
      }
    }
  }

  void choose(const Q* packed, int64_t each, const T* vectors, int64_t head, int64_t first,
              int64_t end) const {
    Work<Q>& work = work_of_thread<Q>();
    const int64_t per_token = rows_per_token(), rows = (end - first) * per_token;
    const int64_t width = held(s.dim);
    int64_t most = 0;
    for (int64_t t = first; t < end; ++t) most = std::max(most, slots(positions[t]));
    const int64_t wide = ceil_div(most, kTile) * kTile;
    work.rows.resize(rows * width);
    work.logits.resize(rows * wide);
    work.scores.resize(wide);
    for (int64_t row = 0; row < rows; ++row)
      hold_row(vectors + (first + row / per_token) * s.vector_token +
                   (head * per_token + row % per_token) * s.vector_head,
               s.dim, work.rows.data() + row * width);
    for (int64_t n = 0; n < wide; n += kTile, packed += each)
      by_rows(rows, [&](auto count, int64_t at) {
        constexpr int R = decltype(count)::value;
        const Q* held_rows[R];
        for (int r = 0; r < R; ++r) held_rows[r] = work.rows.data() + (at + r) * width;
        vec sums[R][kColumns] = {};
        multiply<R, kColumns>(held_rows, packed, kColumns, width / 2, sums);
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < kColumns; ++c)
            store(work.logits.data() + (at + r) * wide + n + c * kLanes, sums[r][c]);
      });
    for (int64_t t = first; t < end; ++t) {
      float* logits = work.logits.data() + (t - first) * per_token * wide;
      const int64_t seen = slots(positions[t]);
      const float* scores = logits;
      if (s.softmax) {
        std::fill(work.scores.begin(), work.scores.end(), 0.0f);
        for (int64_t g = 0; g < s.group; ++g)
          add_probabilities(logits + g * wide, seen, work.scores.data());
        scores = work.scores.data();
      }
      mark(scores, seen, positions[t], work, chosen + (head * s.tokens + t) * s.table_blocks);
    }
  }

  // Adds the softmax over slots [1, seen) of one head.
  void add_probabilities(float* logits, int64_t seen, float* scores) const {
    if (seen < 2) return;
    const int64_t padded = ceil_div(seen, kLanes) * kLanes;
    logits[0] = -INFINITY;
    std::fill(logits + seen, logits + padded, -INFINITY);
    const float scale_log2 = scale * 1.4426950408889634f;
    vec most = vec{} - INFINITY;
    for (int64_t n = 0; n < padded; n += kLanes) {
      const vec x = load(logits + n) * scale_log2;
      store(logits + n, x);
      most = most > x ? most : x;
    }
    const float top = top_lane(most);
    vec mass = {};
    for (int64_t n = 0; n < padded; n += kLanes) {
      const vec e = exp2_nonpositive(load(logits + n) - top);
      store(logits + n, e);
      mass += e;
    }
    const float inverse = 1.0f / sum(mass);
    for (int64_t n = 0; n < padded; n += kLanes)
      store(scores + n, load(scores + n) + load(logits + n) * inverse);
  }

  void mark(const float* scores, int64_t seen, int64_t position, Work<Q>& work,
            uint8_t* row) const {
    const int64_t own = position / (s.windows * s.stride), last = own - s.local_blocks;
    const int64_t picks = s.top_k - (s.init_blocks + s.local_blocks + 1);
    if (own < s.top_k) return std::fill(row, row + own + 1, 1), void();
    std::fill(row, row + s.init_blocks, 1);
    std::fill(row + last, row + own + 1, 1);
    if (picks <= 0) return;
    if (static_cast<int64_t>(work.best.size()) < last) work.best.resize(last);
    for (int64_t m = s.init_blocks; m < last; ++m) {
      float best = -INFINITY;
      const int64_t until = std::min((m + 1) * s.windows + 1, seen);
      for (int64_t n = std::max<int64_t>(m * s.windows, 1); n < until; ++n)
        best = std::max(best, scores[n]);
      work.best[m] = best;
    }
    mark_best(work.best, s.init_blocks, last, picks, work.ranked, row);
  }
};

}  // namespace

extern "C" {

// table: physical blocks; chosen: zeros, [kv_heads][tokens][table_blocks]. Returns 2 for a dtype
// that is not supported; see with_dtype.
int vllm_sparse_choose_blocks(int dtype, const void* cache, const void* vectors,
                              const int32_t* table, const int64_t* positions, uint8_t* chosen,
                              const ChooseSizes* sizes, float scale) {
  return with_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    Choice<T> choice{*sizes, table, positions, chosen, scale};
    choice.run(static_cast<const T*>(cache), static_cast<const T*>(vectors));
  });
}
}
