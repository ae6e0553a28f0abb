// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// Exact decode attention on a CPU over what others have selected: frames that hold blocks of
// SparDA, or single tokens of a paged cache. The readable definitions are in
// `kernels/reference/sparda_attention.py` and `kernels/reference/attention.py`.

#include "attention.h"

#include <omp.h>

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace {

// Mirrored by FrameSizes in sparda_attention.py. Frames are contiguous; strides count elements.
struct FrameSizes {
  int64_t tokens, kv_heads, group, dim, block_size, table_stride, max_tokens;
  int64_t query_stride, out_stride;
};

// Mirrored by SlotSizes in attention.py. Strides count elements.
struct SlotSizes {
  int64_t tokens, kv_heads, group, dim, block_size, top_k, block_stride;
  int64_t head_stride, table_stride, slot_stride, query_stride, out_stride;
};

template <typename T>
struct Workspace {
  Attention<T> attention;
  std::vector<typename Dot<T>::query> query;
  std::vector<Run<T>> runs;
  Lines rows;
};

// Kept between calls. Not inlined, for the compiler would look a thread's own up again and again.
template <typename T>
__attribute__((noinline)) Workspace<T>& workspace() {
  static thread_local Workspace<T> own;
  return own;
}

// Shares of fewer tokens are not worth a thread.
constexpr int64_t kLeastShare = 256;

// The part of `runs` that a share of them takes, out of as many as are worth it.
template <typename T>
void cut(std::vector<Run<T>>& runs, int64_t share, int64_t shares) {
  int64_t tokens = 0;
  for (const Run<T>& run : runs) tokens += run.tokens;
  const int64_t count = runs.size(), most = std::min({tokens / kLeastShare, count, shares});
  const int64_t worth = std::max(most, int64_t{1});  // so that the first has some of any row
  if (share >= worth) return runs.clear();
  runs.erase(runs.begin() + count * (share + 1) / worth, runs.end());
  runs.erase(runs.begin(), runs.begin() + count * share / worth);
}

// collect(token, kv_head, runs) lists what to attend to; nothing gives zeros. sinks: learned ones,
// [kv_heads][group], or null. If there are fewer pairs of a token and a KV head than threads, each
// is cut into shares, two for every thread, which are merged in the end.
template <typename T, typename Sizes, typename Collect>
void attend(const Sizes& s, const void* query, void* out, float scale, float value_scale,
            const float* sinks, Collect&& collect) {
  const int64_t tasks = s.tokens * s.kv_heads;
  const int64_t threads = omp_get_max_threads();
  const int64_t shares = tasks && tasks < threads ? (2 * threads + tasks - 1) / tasks : 1;
  const int64_t numbers = s.group * Attention<T>::partial(s.dim);  // of a share
  static thread_local std::vector<float> scratch;
  if (shares > 1) scratch.resize(tasks * shares * numbers);
  float* const parts = scratch.data();
#pragma omp parallel
  {
    Workspace<T>& own = workspace<T>();
    Attention<T>& attention = own.attention;
    std::vector<Run<T>>& runs = own.runs;
    attention.group = s.group;
    attention.dim = s.dim;
    attention.scale = scale;
    attention.value_scale = value_scale;
#pragma omp for schedule(dynamic, 1)
    for (int64_t piece = 0; piece < tasks * shares; ++piece) {
      const int64_t task = piece / shares, share = piece % shares;
      const int64_t t = task / s.kv_heads, h = task % s.kv_heads, first = h * s.group * s.dim;
      Token<T>* target = static_cast<Token<T>*>(out) + t * s.out_stride + first;
      float* part = shares > 1 ? parts + piece * numbers : nullptr;
      runs.clear();
      collect(t, h, runs);
      if (part) cut(runs, share, shares);
      if (part && runs.empty()) {
        attention.leave_out(part);
        continue;
      }
      if (runs.empty()) {
        std::memset(static_cast<void*>(target), 0, s.group * s.dim * sizeof(*target));
        continue;
      }
      const Token<T>* source = static_cast<const Token<T>*>(query) + t * s.query_stride + first;
      attention.hold(source, s.group * s.dim, own.query);
      own.rows.clear();
      for (const Run<T>& run : runs) own.rows.add(run.rows, run.tokens * 2 * s.dim * sizeof(T));
      own.rows.pull(Lines::kAhead / 4);  // a head start; the rest is asked for on the way
      const float* of_group = sinks && !share ? sinks + h * s.group : nullptr;
      attention.attend(own.query.data(), runs, target, own.rows, of_group, part);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < (shares > 1 ? tasks : 0); ++task) {
      const int64_t t = task / s.kv_heads, first = task % s.kv_heads * s.group * s.dim;
      attention.merge(parts + task * shares * numbers, shares,
                      static_cast<Token<T>*>(out) + t * s.out_stride + first);
    }
  }
}

}  // namespace

extern "C" {

// frames: pages of [block_size][2 * D]; table: [tokens][kv_heads][table_stride]; lengths: [tokens].
// Returns 1 for a head size and 2 for a dtype that is not supported; see with_cache_dtype.
int vllm_sparse_attend_frames(int dtype, const void* frames, const void* query, void* out,
                              const int32_t* table, const int32_t* lengths, const FrameSizes* sizes,
                              float scale, float value_scale) {
  const FrameSizes& s = *sizes;
  if (s.dim > kMaxDim) return 1;
  return with_cache_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    attend<T>(s, query, out, scale, value_scale, nullptr, [&](int64_t t, int64_t h, auto& runs) {
      const int32_t* frame = table + (t * s.kv_heads + h) * s.table_stride;
      for (int64_t slot = 0; slot < lengths[t]; slot += s.block_size)
        runs.push_back({static_cast<const T*>(frames) + *frame++ * s.block_size * 2 * s.dim,
                        std::min(s.block_size, lengths[t] - slot)});
    });
  });
}

// slots: ascending block * block_size + slot, [tokens][kv_heads][slot_stride], of which the first
// min(top_k, length) count; null, or top_r[t] of 0, attends to all of the block table. sinks: a
// learned logit of each query head, or null. Returns 1 for a head size and 2 for a dtype that is
// not supported; see with_cache_dtype.
int vllm_sparse_attend_slots(int dtype, const void* cache, const void* query, void* out,
                             const int32_t* slots, const int32_t* table, const int32_t* lengths,
                             const int32_t* top_r, const float* sinks, const SlotSizes* sizes,
                             float scale, float key_scale, float value_scale) {
  const SlotSizes& s = *sizes;
  if (s.dim > kMaxDim) return 1;
  return with_cache_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    const float of_logits = scale * key_scale;
    attend<T>(s, query, out, of_logits, value_scale, sinks, [&](int64_t t, int64_t h, auto& runs) {
      auto row = [&](int64_t block, int64_t slot) {
        return static_cast<const T*>(cache) + block * s.block_stride + h * s.head_stride +
               slot * 2 * s.dim;
      };
      const int64_t length = lengths[t];
      if (!slots || top_r[t] <= 0) {
        for (int64_t slot = 0; slot < length; slot += s.block_size)
          runs.push_back({row(table[t * s.table_stride + slot / s.block_size], 0),
                          std::min(s.block_size, length - slot)});
        return;
      }
      const int32_t* slot = slots + (t * s.kv_heads + h) * s.slot_stride;
      for (int64_t i = 0; i < std::min(length, s.top_k); ++i)
        runs.push_back({row(slot[i] / s.block_size, slot[i] % s.block_size), 1});
    });
  });
}
}
