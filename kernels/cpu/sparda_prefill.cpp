// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// Attention of a prompt's tokens over blocks that each of them chose, on a CPU. Keys and values that
// some token reads are packed once; then a tile of tokens goes through them with an online softmax,
// and only tokens that chose a block multiply it. `kernels/reference/sparda_prefill.py` is the
// readable definition.

#include <cmath>

#include "tiles.h"

extern "C" {

// Mirrored by sparda_prefill.py. Strides in elements; channels and marks are contiguous.
struct PartSizes {
  int64_t kv_heads, group, tokens, dim, keys, first_position, block_size, past_from, past, merge;
  int64_t fp8;  // keys and values are, which T says how to multiply
  int64_t query_head, query_member, query_token, key_head, key_token, value_head, value_token;
  int64_t chosen_head, chosen_token, out_head, out_member, out_token, lse_head, lse_member;
  int64_t lse_token;
};
}

namespace {

constexpr int64_t kRowsOfTask = 112;  // query heads times tokens
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Keys of consecutive positions, in one block.
struct Tile {
  int64_t first, count, block;
};

// What one thread needs for a tile of tokens: per row its query, sum of values, and softmax.
template <typename Q>
struct Task {
  std::vector<Q> query;
  std::vector<float> sums, mass, top;
  std::vector<int32_t> rows, limits;
};

template <typename Q>
__attribute__((noinline)) Task<Q>& task_of_thread() {
  static thread_local Task<Q> own;
  return own;
}

template <typename Q>
__attribute__((noinline)) std::vector<Q>& packed_of_thread() {
  static thread_local std::vector<Q> own;
  return own;
}

// Keys or values of fp8 before they are packed.
template <typename T>
__attribute__((noinline)) std::vector<T>& widened_of_thread() {
  static thread_local std::vector<T> own;
  return own;
}

template <typename Q>
struct Packed {
  const Q *keys, *values;
};

// Rows rows[0..R) of a task against the first W vectors of a tile; each sees limits[r] keys.
template <int R, int W, typename Q>
void attend_rows(Task<Q>& task, const int32_t* rows, const int32_t* limits, Packed<Q> tile,
                 int64_t dim, float scale_log2) {
  const int64_t width = held(dim), vectors = ceil_div(dim, kLanes);
  const Q* held_rows[R];
  for (int r = 0; r < R; ++r) held_rows[r] = task.query.data() + rows[r] * width;
  vec logits[R][W] = {};
  multiply<R, W>(held_rows, tile.keys, kColumns, width / 2, logits);

  alignas(64) Q weights[R][kTile];
  vec old_top = {}, new_top = {};
  ivec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int r = 0; r < R; ++r) {
    vec most = vec{} - INFINITY;
    for (int w = 0; w < W; ++w) {
      logits[r][w] *= scale_log2;
      if (limits[r] < (w + 1) * kLanes)
        logits[r][w] = lane + w * kLanes < limits[r] ? logits[r][w] : vec{} - INFINITY;
      most = most > logits[r][w] ? most : logits[r][w];
    }
    old_top[r] = task.top[rows[r]];
    task.top[rows[r]] = new_top[r] = std::max(old_top[r], top_lane(most));
  }
  const vec decay = exp2_nonpositive(old_top - new_top);
  for (int r = 0; r < R; ++r) {
    float* mass = task.mass.data() + rows[r] * kLanes;
    vec total = load(mass) * decay[r];
    for (int w = 0; w < W; ++w) {
      const vec e = exp2_nonpositive(logits[r][w] - new_top[r]);
      total += e;
      put(weights[r] + w * kLanes, e);
    }
    store(mass, total);
    held_rows[r] = weights[r];
  }

  const int64_t wide = vectors * kLanes;
  float* sums[R];
  for (int r = 0; r < R; ++r) sums[r] = task.sums.data() + rows[r] * wide;
  auto weigh = [&](auto columns, int64_t v) {
    constexpr int C = decltype(columns)::value;
    vec acc[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) acc[r][c] = load(sums[r] + (v + c) * kLanes) * decay[r];
    multiply<R, C>(held_rows, tile.values + v * 2 * kLanes, vectors, W * kLanes / 2, acc);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) store(sums[r] + (v + c) * kLanes, acc[r][c]);
  };
  int64_t v = 0;
  for (; v + kColumns <= vectors; v += kColumns) weigh(std::integral_constant<int, kColumns>{}, v);
  for (; v < vectors; ++v) weigh(std::integral_constant<int, 1>{}, v);
}

template <typename T>
struct Part {
  typedef Held<T> Q;
  const PartSizes& s;
  const uint8_t* chosen;  // may be null
  float* out;
  float* lse;
  float scale_log2;
  std::vector<Tile> tiles;

  // The earliest token that may see a key.
  int64_t first_token(int64_t key) const {
    return s.past ? std::max<int64_t>(s.first_position + key - s.past_from, 0) : 0;
  }

  bool wanted(int64_t head, const Tile& tile) const {
    const int64_t first = first_token(tile.first);
    if (!chosen) return first < s.tokens;
    for (int64_t t = first; t < s.tokens; ++t)
      if (chosen[head * s.chosen_head + t * s.chosen_token + tile.block]) return true;
    return false;
  }

  // S: what keys and values are stored as.
  template <typename S>
  void run(const T* query, const S* keys, const S* values) {
    const int64_t end = s.first_position + s.keys, size = chosen ? s.block_size : end + 1;
    for (int64_t at = s.first_position; at < end;) {
      const int64_t until = std::min({(at / size + 1) * size, at + kTile, end});
      tiles.push_back({at - s.first_position, until - at, at / size});
      at = until;
    }
    const int64_t count = tiles.size(), each = packed_keys(s.dim) + packed_values(s.dim);
    std::vector<Q>& room = packed_of_thread<Q>();
    if (static_cast<int64_t>(room.size()) < s.kv_heads * count * each)
      room.resize(s.kv_heads * count * each);
    Q* packed = room.data();
    std::vector<uint8_t> ready(s.kv_heads * count);
    const int64_t tokens = std::max<int64_t>(kRowsOfTask / s.group, 1);
    const int64_t tasks = ceil_div(s.tokens, tokens);
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 4)
      for (int64_t i = 0; i < s.kv_heads * count; ++i) {
        const int64_t head = i / count;
        const Tile& tile = tiles[i % count];
        if (!(ready[i] = wanted(head, tile))) continue;
        int64_t key_token = s.key_token, value_token = s.value_token;
        const T* key = widened(keys + head * s.key_head + tile.first * s.key_token, tile.count, 0,
                               key_token);
        const T* value = widened(values + head * s.value_head + tile.first * s.value_token,
                                 tile.count, 1, value_token);
        pack_keys<T>(tile.count, s.dim, [&](int64_t k) { return key + k * key_token; },
                     packed + i * each);
        pack_values(value, value_token, tile.count, s.dim, packed + i * each + packed_keys(s.dim));
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < s.kv_heads * tasks; ++i) {  // those with the longest past first
        const int64_t head = i % s.kv_heads, first = (tasks - 1 - i / s.kv_heads) * tokens;
        attend(query, packed + head * count * each, ready.data() + head * count, each, head, first,
               std::min(first + tokens, s.tokens));
      }
    }
  }

  const T* widened(const T* rows, int64_t, int, int64_t&) const { return rows; }
  // Rows of fp8 as T holds them, which is exact; `token` becomes the distance of two.
  const T* widened(const fp8* rows, int64_t count, int half, int64_t& token) const {
    std::vector<T>& room = widened_of_thread<T>();
    room.resize(2 * kTile * s.dim);
    T* target = room.data() + half * kTile * s.dim;
    for (int64_t k = 0; k < count; ++k)
      for (int64_t j = 0; j < s.dim; ++j)
        target[k * s.dim + j] = from_float<T>(to_float(rows[k * token + j]));
    token = s.dim;
    return target;
  }

  void attend(const T* query, const Q* packed, const uint8_t* ready, int64_t each, int64_t head,
              int64_t first, int64_t end) const {
    Task<Q>& task = task_of_thread<Q>();
    begin(task, query, head, first, end);
    for (size_t i = 0; i < tiles.size(); ++i) {
      if (!ready[i]) continue;
      const Tile& tile = tiles[i];
      task.rows.clear();
      task.limits.clear();
      for (int64_t t = std::max(first, first_token(tile.first)); t < end; ++t) {
        if (chosen && !chosen[head * s.chosen_head + t * s.chosen_token + tile.block]) continue;
        int64_t limit = tile.count;
        if (s.past)
          limit = std::min(limit, s.past_from + t - s.first_position - tile.first + 1);
        for (int64_t g = 0; g < s.group; ++g) {
          task.rows.push_back((t - first) * s.group + g);
          task.limits.push_back(limit);
        }
      }
      const Packed<Q> here{packed + i * each, packed + i * each + packed_keys(s.dim)};
      by_rows(task.rows.size(), [&](auto rows, int64_t at) {
        constexpr int R = decltype(rows)::value;
        const int32_t *which = task.rows.data() + at, *limits = task.limits.data() + at;
        if (tile.count > kTile / 2)
          attend_rows<R, kColumns>(task, which, limits, here, s.dim, scale_log2);
        else
          attend_rows<R, kColumns / 2>(task, which, limits, here, s.dim, scale_log2);
      });
    }
    finish(task, head, first, end);
  }

  float* sums_of(int64_t head, int64_t g, int64_t t) const {
    return out + head * s.out_head + g * s.out_member + t * s.out_token;
  }
  float& lse_of(int64_t head, int64_t g, int64_t t) const {
    return lse[head * s.lse_head + g * s.lse_member + t * s.lse_token];
  }

  // Takes up what is there already, as one key whose weight is one.
  void begin(Task<Q>& task, const T* query, int64_t head, int64_t first, int64_t end) const {
    const int64_t rows = (end - first) * s.group, width = held(s.dim);
    const int64_t wide = ceil_div(s.dim, kLanes) * kLanes;
    task.query.resize(rows * width);
    task.sums.assign(rows * wide, 0.0f);
    task.mass.assign(rows * kLanes, 0.0f);
    task.top.assign(rows, -INFINITY);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t t = first + row / s.group, g = row % s.group;
      hold_row(query + head * s.query_head + g * s.query_member + t * s.query_token, s.dim,
               task.query.data() + row * width);
      if (!s.merge || lse_of(head, g, t) == -INFINITY) continue;
      const float* before = sums_of(head, g, t);
      std::copy(before, before + s.dim, task.sums.data() + row * wide);
      task.mass[row * kLanes] = 1.0f;
      task.top[row] = lse_of(head, g, t) * kLog2E;
    }
  }

  void finish(const Task<Q>& task, int64_t head, int64_t first, int64_t end) const {
    const int64_t wide = ceil_div(s.dim, kLanes) * kLanes;
    for (int64_t row = 0; row < (end - first) * s.group; ++row) {
      const int64_t t = first + row / s.group, g = row % s.group;
      const float mass = sum(load(task.mass.data() + row * kLanes));
      const float inverse = mass == 0.0f ? 0.0f : 1.0f / mass;
      const float* sums = task.sums.data() + row * wide;
      float* target = sums_of(head, g, t);
      for (int64_t j = 0; j < s.dim; ++j) target[j] = sums[j] * inverse;
      lse_of(head, g, t) = mass == 0.0f ? -INFINITY : (task.top[row] + std::log2(mass)) * kLn2;
    }
  }
};

}  // namespace

extern "C" {

// query: [kv_heads][group][tokens][dim]; keys and values: [kv_heads][keys][dim], of fp8 if the sizes
// say so; chosen:
// [kv_heads][tokens][blocks] or null; out and lse: float, also read with `merge`. Returns 2 for a
// dtype that is not supported; see with_dtype.
int vllm_sparse_attend_part(int dtype, const void* query, const void* keys, const void* values,
                            const uint8_t* chosen, float* out, float* lse, const PartSizes* sizes,
                            float scale) {
  return with_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    Part<T> part{*sizes, chosen, out, lse, scale * kLog2E, {}};
    auto run = [&](auto number) {
      typedef decltype(number) S;
      part.run(static_cast<const T*>(query), static_cast<const S*>(keys),
               static_cast<const S*>(values));
    };
    if (sizes->fp8)
      run(fp8{});
    else
      run(T{});
  });
}
}
