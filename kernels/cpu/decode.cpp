// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// RocketKV decode attention on a CPU: append, page extrema, page scores, top-k and exact attention
// over the selection, fused so that each byte of the paged KV cache is read once and nothing is
// materialised. `kernels/reference/decode.py` is the readable definition.
//
// A task is one KV head of one token. Each thread has up to three of them in flight, so that memory
// is always busy: while it scores one, the rows that the one before has selected are on their way,
// and the first extrema of the one after; while it attends to those rows, the other extrema are.

#include <atomic>
#include <cstdint>
#include <cstring>

#include <omp.h>

#include "attention.h"
#include "pages.h"
#include "simd.h"

namespace {

template <typename T>
struct Arguments {
  const DecodeSizes& s;
  T* cache;
  const Token<T> *query, *key, *value;
  Token<T>* out;
  const int32_t *table, *lengths, *final_lengths, *top_r;
  const float* sinks;  // [kv_heads][group], or null
  float scale, key_scale, value_scale;
  bool read_all;

  HeadCache<T> head(int64_t task) const {
    return {s, cache, table + task / s.kv_heads * s.table_stride, task % s.kv_heads};
  }
  const float* sinks_of(int64_t task) const {
    return sinks ? sinks + task % s.kv_heads * s.group : nullptr;
  }
  void append(int64_t task) const {
    const int64_t t = task / s.kv_heads, at = t * s.key_stride + task % s.kv_heads * s.dim;
    if (lengths[t] > 0)
      head(task).append(lengths[t] - 1, key + at, value + at, key_scale, value_scale);
  }
  // Only the last token that a step writes to a page stores the page's extrema.
  void refresh(int64_t task) const {
    const int64_t t = task / s.kv_heads, n = lengths[t];
    if (n > 0 && top_r[t] > 0 && (n == final_lengths[t] || n % s.page_size == 0))
      head(task).refresh(n);
  }
};

template <typename T>
struct Task {
  int64_t id = -1;  // none
  bool selects;
  std::vector<typename Dot<T>::query> query;
  Channels<T> channels;
  Lines extrema, rows;
  std::vector<int32_t> offsets;  // in bytes, of the lines that a block's chosen extrema are in
  std::vector<Run<T>> runs;

  void begin(const Arguments<T>& a, int64_t task) {
    const DecodeSizes& s = a.s;
    const int64_t t = task / s.kv_heads, h = task % s.kv_heads, n = a.lengths[t];
    const HeadCache<T> head = a.head(task);
    id = task;
    selects = !a.read_all && a.top_r[t] > 0 && n > s.top_k;
    extrema.clear();
    rows.clear();
    runs.clear();
    Attention<T>::hold(a.query + t * s.query_stride + h * s.group * s.dim, s.group * s.dim, query);
    if (selects) {
      channels.choose(query.data(), s.group, s.dim, a.top_r[t], a.scale * a.key_scale);
      const int32_t bytes = head.pages_per_block() * sizeof(T);
      offsets.clear();
      for (int32_t row : channels.rows)
        for (int32_t b = 0; b < bytes; b += 64) offsets.push_back(row * bytes + b);
      for (int64_t b = 0; b * s.block_size < n; ++b) extrema.add(head.extrema(b), offsets);
    } else {
      for (int64_t slot = 0; slot < n; slot += s.block_size)
        runs.push_back({head.row(slot), std::min(s.block_size, n - slot)});
      ask_for_rows(s.dim);
    }
  }

  void select(const Arguments<T>& a, PageSelection<T>& selection, Lines& earlier, Lines& later) {
    if (!selects) return;
    const DecodeSizes& s = a.s;
    const HeadCache<T> head = a.head(id);
    const int64_t n = a.lengths[id / s.kv_heads];
    const int64_t last =
        selection.select(head, channels, s.group, n, extrema, earlier, later, a.sinks_of(id));
    for (int32_t page : selection.pages) {
      const int64_t visible = std::min(s.page_size, n - page * s.page_size);
      runs.push_back({head.row(page * s.page_size), visible});
    }
    runs.back().tokens = std::min(runs.back().tokens, last);
    ask_for_rows(s.dim);
  }

  void attend(const Arguments<T>& a, Attention<T>& attention, Lines& later) {
    const DecodeSizes& s = a.s;
    Token<T>* out = a.out + id / s.kv_heads * s.out_stride + id % s.kv_heads * s.group * s.dim;
    if (runs.empty()) std::memset(static_cast<void*>(out), 0, s.group * s.dim * sizeof(*out));
    else attention.attend(query.data(), runs, out, later, a.sinks_of(id));
  }

 private:
  void ask_for_rows(int64_t dim) {
    for (const Run<T>& run : runs) rows.add(run.rows, run.tokens * 2 * dim * sizeof(T));
  }
};

template <typename T>
struct Workspace {
  Task<T> tasks[3];
  PageSelection<T> selection;
  Attention<T> attention;
};

// Kept between calls: allocating it would cost as much as a small selection. Not inlined, for the
// compiler would look a thread's own up again and again.
template <typename T>
__attribute__((noinline)) Workspace<T>& workspace() {
  static thread_local Workspace<T> own;
  return own;
}

template <typename T>
void decode(const Arguments<T>& a) {
  const DecodeSizes& s = a.s;
  const int64_t tasks = s.tokens * s.kv_heads;
  // A replayed request brings several tokens: all are appended before any is read.
  bool replays = false;
  for (int64_t t = 0; t < s.tokens; ++t) replays |= a.lengths[t] != a.final_lengths[t];
  std::atomic<int64_t> claimed{0};
#pragma omp parallel
  {
    Workspace<T>& own = workspace<T>();
    Attention<T>& attention = own.attention;
    attention.group = s.group;
    attention.dim = s.dim;
    attention.scale = a.scale * a.key_scale;
    attention.value_scale = a.value_scale;
    if (replays) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; ++task) a.append(task);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; ++task) a.refresh(task);
    }
    Task<T> *before = &own.tasks[0], *now = &own.tasks[1], *after = &own.tasks[2];
    auto begin = [&](Task<T>* task, int64_t id) {
      task->id = -1;
      if (id >= tasks) return;
      if (!replays) {
        a.append(id);
        a.refresh(id);
      }
      task->begin(a, id);
    };
    before->id = -1;
    // Every thread starts with one, so that a small batch is spread.
    begin(now, omp_get_thread_num());
    const int64_t threads = omp_get_num_threads();
    while (now->id >= 0 || before->id >= 0) {
      begin(after, now->id < 0 ? tasks : threads + claimed.fetch_add(1));
      if (now->id >= 0) now->select(a, own.selection, before->rows, after->extrema);
      if (before->id >= 0) {
        before->rows.pull(Lines::kAhead);
        before->attend(a, attention, after->extrema);
      }
      std::swap(before, now);  // now: done
      std::swap(now, after);
    }
  }
}

}  // namespace

// dtype: see with_cache_dtype. final_lengths[t] is the length of t's request after this step.
// sinks: a learned logit of each query head, or null. Returns 1 for a head size and 2 for a dtype
// that is not supported.
extern "C" int vllm_sparse_decode(int dtype, void* cache, const void* query, const void* key,
                                  const void* value, void* out, const int32_t* table,
                                  const int32_t* lengths, const int32_t* final_lengths,
                                  const int32_t* top_r, const float* sinks,
                                  const DecodeSizes* sizes, float scale, float key_scale,
                                  float value_scale, int read_all) {
  if (sizes->dim > kMaxDim) return 1;
  return with_cache_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    typedef Token<T> X;
    decode<T>({*sizes, static_cast<T*>(cache), static_cast<const X*>(query),
               static_cast<const X*>(key), static_cast<const X*>(value), static_cast<X*>(out),
               table, lengths, final_lengths, top_r, sinks, scale, key_scale, value_scale,
               read_all != 0});
  });
}
