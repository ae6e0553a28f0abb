// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// What a SparDA layer stores of a step on a CPU: tokens, windows of compressed keys, queries.
// `kernels/reference/sparda_tokens.py` is the readable definition.

#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

namespace {

// Rows of fewer bytes than this in total are not worth waking threads for.
constexpr int64_t kWorthThreads = 1 << 17;

}  // namespace

extern "C" {

// Sizes and strides in bytes, except for counts. With fp8, keys and values come as floats.
struct SpardaWriteSizes {
  int64_t tokens, kv_heads, block_size, head_bytes, fp8;
  int64_t key_token, key_head, value_token, value_head;
  int64_t query_heads, query_bytes, query_token, query_head;
};

// Without queries that are kept, their pointers are null; `recent` may be in any case.
void vllm_sparse_write_tokens(char* host, char* slab, const int32_t* frame_of, const int64_t* slots,
                              const char* key, const char* value, char* kept, const char* query,
                              char* recent, const SpardaWriteSizes* sizes, float key_scale,
                              float value_scale) {
  const SpardaWriteSizes s = *sizes;
  const float keys = 1.0f / key_scale, values = 1.0f / value_scale;
  auto put = [&](char* target, const char* from, float factor) {
    if (!s.fp8) return static_cast<void>(std::memcpy(target, from, s.head_bytes));
    for (int64_t j = 0; j < s.head_bytes; ++j) {
      const fp8 number = from_float<fp8>(reinterpret_cast<const float*>(from)[j] * factor);
      std::memcpy(target + j, &number, 1);
    }
  };
  const int64_t row = 2 * s.head_bytes;
#pragma omp parallel for if (s.tokens * s.kv_heads * row > kWorthThreads)
  for (int64_t t = 0; t < s.tokens; ++t) {
    if (slots[t] < 0) continue;
    const int64_t block = slots[t] / s.block_size, offset = slots[t] % s.block_size;
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      const int64_t piece = block * s.kv_heads + h, frame = frame_of[piece];
      char* target = host + (piece * s.block_size + offset) * row;
      put(target, key + t * s.key_token + h * s.key_head, keys);
      put(target + s.head_bytes, value + t * s.value_token + h * s.value_head, values);
      if (frame >= 0) std::memcpy(slab + (frame * s.block_size + offset) * row, target, row);
    }
    if (kept == nullptr) continue;
    for (int64_t h = 0; h < s.query_heads; ++h) {
      const char* from = query + t * s.query_token + h * s.query_head;
      std::memcpy(kept + (block * s.query_heads + h) * s.query_bytes, from, s.query_bytes);
      if (recent != nullptr)
        std::memcpy(recent + (t * s.query_heads + h) * s.query_bytes, from, s.query_bytes);
    }
  }
}

// Strides in elements.
struct SpardaWindowSizes {
  int64_t rows, kv_heads, block_size, dim, stride, fp8, table_row;
  int64_t compressed_block, compressed_head, compressed_window;
};
}

namespace {

// Means of keys of S, times a factor.
template <typename T, typename S>
void update_windows(T* compressed, const S* source, const S* slab, const int32_t* frame_of,
                    const int64_t* positions, const int32_t* table, const SpardaWindowSizes& s,
                    float factor) {
  // Prompts add up in PyTorch, half by half: with the same order, a window does not depend on which
  // step completed it.
  static thread_local std::vector<float> sums;
  const int64_t size = 2 * s.stride;
  sums.resize(size * s.dim);
  for (int64_t row = 0; row < s.rows; ++row) {
    const int64_t end = positions[row] + 1;
    if (end < size || end % s.stride) continue;
    const int32_t* blocks = table + row * s.table_row;
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      float* sum = sums.data();
      for (int64_t token = end - size; token < end; ++token) {
        const int64_t piece = blocks[token / s.block_size] * s.kv_heads + h;
        const int64_t frame = frame_of[piece];
        const S* key = (frame < 0 ? source + piece * s.block_size * 2 * s.dim
                                  : slab + frame * s.block_size * 2 * s.dim) +
                       token % s.block_size * 2 * s.dim;
        for (int64_t j = 0; j < s.dim; ++j) *sum++ = to_float(key[j]);
      }
      sum = sums.data();
      int64_t left = size;
      for (; left % 2 == 0; left /= 2)
        for (int64_t i = 0; i < left / 2 * s.dim; ++i) sum[i] += sum[left / 2 * s.dim + i];
      for (int64_t m = 1; m < left; ++m)
        for (int64_t j = 0; j < s.dim; ++j) sum[j] += sum[m * s.dim + j];
      const int64_t newest = end - 1;
      T* target = compressed + blocks[newest / s.block_size] * s.compressed_block +
                  h * s.compressed_head + newest % s.block_size / s.stride * s.compressed_window;
      for (int64_t j = 0; j < s.dim; ++j) target[j] = from_float<T>(sum[j] / size * factor);
    }
  }
}

}  // namespace

extern "C" {

// dtype: of what is compressed, as with_dtype names it; others return 2.
int vllm_sparse_update_windows(int dtype, void* compressed, const void* source, const void* slab,
                               const int32_t* frame_of, const int64_t* positions,
                               const int32_t* table, const SpardaWindowSizes* sizes,
                               float key_scale) {
  return with_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    auto update = [&](auto number) {
      typedef decltype(number) S;
      update_windows(static_cast<T*>(compressed), static_cast<const S*>(source),
                     static_cast<const S*>(slab), frame_of, positions, table, *sizes, key_scale);
    };
    if (sizes->fp8)
      update(fp8{});
    else
      update(T{});
  });
}

// Strides in bytes.
struct SpardaRecordSizes {
  int64_t count, heads, block_size, head_bytes, query_token, query_head;
};

void vllm_sparse_record_queries(char* kept, const char* query, const int64_t* slots,
                                const int64_t* last, const SpardaRecordSizes* sizes) {
  const SpardaRecordSizes s = *sizes;
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t slot = slots[last[i]];
    if (slot < 0) continue;
    for (int64_t h = 0; h < s.heads; ++h)
      std::memcpy(kept + (slot / s.block_size * s.heads + h) * s.head_bytes,
                  query + last[i] * s.query_token + h * s.query_head, s.head_bytes);
  }
}
}
