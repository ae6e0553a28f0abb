// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// Products of a few rows with a packed tile of keys or values, which stay in registers. A packed
// tile holds, for every two elements of a row, a vector of pairs per column of lanes, so that a
// pair of the row is one broadcast.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace {

constexpr int kColumns = 4;               // vectors of a tile of keys
constexpr int kTile = kColumns * kLanes;  // its keys
#ifdef __AVX512F__
constexpr int kRows = 6;  // with kColumns sums each, they fill the registers
#else
constexpr int kRows = 2;
#endif

// How rows and tiles of a cache of T are held.
template <typename T>
using Held = typename Dot<T>::query;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where element `which` of a pair lies in a vector of pairs.
template <typename Q>
inline int64_t in_pairs(int64_t lane, int64_t which) {
  return sizeof(Q) == 2 ? 2 * lane + which : lane + kLanes * which;
}

inline void store_pairs(float* p, const Dot<float>::pairs& x) {
  store(p, x.first);
  store(p + kLanes, x.second);
}
template <typename X>
inline void store_pairs(float* p, const X& x) {
  store(p, x.first);
  store(p + kLanes, x.second);
}
#ifdef __AVX512BF16__
inline void store_pairs(bf16* p, __m512i x) { _mm512_storeu_si512(p, x); }
#endif

template <typename Q, typename T>
inline Q hold(T x) {
  if constexpr (std::is_same_v<Q, T>)
    return x;
  else
    return static_cast<Q>(to_float(x));
}

// Elements of a row as it is held: whole pairs.
inline int64_t held(int64_t dim) { return dim + dim % 2; }
inline int64_t packed_keys(int64_t dim) { return held(dim) * kTile; }
inline int64_t packed_values(int64_t dim) { return ceil_div(dim, kLanes) * kLanes * kTile; }

template <typename T>
void hold_row(const T* row, int64_t dim, Held<T>* out) {
  for (int64_t j = 0; j < dim; ++j) out[j] = hold<Held<T>>(row[j]);
  if (dim % 2) out[dim] = Held<T>{};
}

// row(i): the i-th of `count` keys, at most a tile; the others become zero.
template <typename T, typename Row>
void pack_keys(int64_t count, int64_t dim, Row&& row, Held<T>* out) {
  typedef Held<T> Q;
  std::fill(out, out + packed_keys(dim), Q{});
  for (int64_t i = 0; i < count; ++i) {
    const T* key = row(i);
    Q* target = out + i / kLanes * 2 * kLanes;
    const int64_t first = in_pairs<Q>(i % kLanes, 0), second = in_pairs<Q>(i % kLanes, 1);
    int64_t j = 0;
    for (; j + 1 < dim; j += 2, target += 2 * kTile) {
      target[first] = hold<Q>(key[j]);
      target[second] = hold<Q>(key[j + 1]);
    }
    if (j < dim) target[first] = hold<Q>(key[j]);
  }
}

// Values of consecutive tokens, `stride` elements apart.
template <typename T>
void pack_values(const T* values, int64_t stride, int64_t count, int64_t dim, Held<T>* out) {
  typedef Held<T> Q;
  const int64_t vectors = ceil_div(dim, kLanes);
  for (int64_t i = 0; i < kTile; i += 2, values += 2 * stride) {
    Q* target = out + i * vectors * kLanes;
    int64_t v = 0;
    if (i + 1 < count)
      for (; v < dim / kLanes; ++v, target += 2 * kLanes)
        store_pairs(target, Dot<T>::across(values + v * kLanes, values + stride + v * kLanes));
    for (; v < vectors; ++v, target += 2 * kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane)
        for (int64_t which = 0; which < 2; ++which) {
          const int64_t j = v * kLanes + lane;
          const bool real = j < dim && i + which < count;
          target[in_pairs<Q>(lane, which)] = real ? hold<Q>(values[which * stride + j]) : Q{};
        }
  }
}

// sums[r][w] += the products of row r with the w-th of `columns` vectors of a packed tile, over
// so many pairs of elements.
template <int R, int W, typename Q>
inline void multiply(const Q* const* rows, const Q* packed, int64_t columns, int64_t pairs,
                     vec (&sums)[R][W]) {
  typedef Dot<Q> D;
  vec acc[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) acc[r][w] = sums[r][w];
  for (int64_t p = 0; p < pairs; ++p, packed += columns * 2 * kLanes) {
    typename D::pairs tile[W];
    for (int w = 0; w < W; ++w) tile[w] = D::along(packed + w * 2 * kLanes);
    for (int r = 0; r < R; ++r) {
      const auto pair = D::broadcast(rows[r] + 2 * p);
      for (int w = 0; w < W; ++w) acc[r][w] = D::add(acc[r][w], tile[w], pair);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sums[r][w] = acc[r][w];
}

// Calls run(R, first) for shares of `count` rows, of at most kRows each and as equal as can be; R
// is a constant.
template <typename Run>
void by_rows(int64_t count, Run&& run) {
  const int64_t shares = ceil_div(count, kRows);
  for (int64_t i = 0; i < shares; ++i) {
    const int64_t first = i * count / shares, size = (i + 1) * count / shares - first;
    auto with = [&](auto rows) {
      if constexpr (decltype(rows)::value <= kRows) run(rows, first);
    };
    switch (size) {
      case 1: with(std::integral_constant<int, 1>{}); break;
      case 2: with(std::integral_constant<int, 2>{}); break;
      case 3: with(std::integral_constant<int, 3>{}); break;
      case 4: with(std::integral_constant<int, 4>{}); break;
      case 5: with(std::integral_constant<int, 5>{}); break;
      case 6: with(std::integral_constant<int, 6>{}); break;
    }
  }
}

inline float top_lane(vec v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)v);
#else
  return largest(v);
#endif
}

// 2^x for x <= 0, about 1 ulp; at most 2^-126 below -126.
inline vec exp2_nonpositive(vec x) {
  const vec low = vec{} - 126.0f;
  x = x < low ? low : x;  // NaN stays
#ifdef __AVX512F__
  const vec whole = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const vec whole = __builtin_convertvector(__builtin_convertvector(x - 0.5f, ivec), vec);
#endif
  const vec r = x - whole;
  vec p = vec{} + 1.5403530e-4f;  // the series of 2^r
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return p * (vec)((__builtin_convertvector(whole, ivec) + 127) << 23);
}

// Floats as they are held, a vector of them.
inline void put(float* p, vec x) { store(p, x); }
#ifdef __AVX512BF16__
inline void put(bf16* p, vec x) {
  const auto half = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(p, &half, sizeof(half));
}
#endif

}  // namespace
