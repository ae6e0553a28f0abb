// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// Vectors of floats as wide as the CPU has them, the cache dtypes, and dot products of them.

#pragma once

#if !defined(__clang__) && (__GNUC__ < 12 || (!defined(__x86_64__) && __GNUC__ < 13))
#error "the kernels need GCC 12 or later, 13 if not on x86: install one, and set CXX to it"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(kLanes * sizeof(uint32_t)), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4)));

struct bf16 {
  uint16_t bits;
};
struct fp8 {  // e4m3
  uint8_t bits;
};
typedef uint16_t short_vec __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(2)));

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline vec load(const bf16* p) {
#ifdef __AVX512F__  // GCC splits the generic conversion into halves
  return (vec)_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__)
  return (vec)_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#endif
  short_vec raw = *reinterpret_cast<const short_vec*>(p);
  return (vec)(__builtin_convertvector(raw, uvec) << 16);
}
// Numbers of float16, which GCC converts one by one if it is not told how.
inline vec widen(short_vec half) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps((__m256i)half);
#elif defined(__F16C__)
  return (vec)_mm256_cvtph_ps((__m128i)half);
#elif defined(__aarch64__)
  const float16x8_t x = (float16x8_t)half;
  const float32x4_t parts[2] = {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
  vec out;
  std::memcpy(&out, parts, sizeof(out));
  return out;
#else
  typedef _Float16 half_vec __attribute__((vector_size(sizeof(half))));
  return __builtin_convertvector((half_vec)half, vec);
#endif
}
inline vec load(const _Float16* p) { return widen(*reinterpret_cast<const short_vec*>(p)); }
// As float16, whose exponent is 8 larger; so that subnormal numbers need no attention. NaN becomes
// 480: conversion as vLLM does it on CPUs makes none.
inline vec load(const fp8* p) {
#if defined(__AVX512F__)  // GCC splits the generic conversion, into halves or into numbers
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  const int16x8_t wide = vmovl_s8(vld1_s8(reinterpret_cast<const int8_t*>(p)));
#else
  typedef int8_t byte_vec __attribute__((vector_size(kLanes), aligned(1)));
  const auto wide = __builtin_convertvector(*reinterpret_cast<const byte_vec*>(p), short_vec);
#endif
  return widen(((short_vec)wide << 7) & 0xbfff) * 256.0f;
}
inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }

inline float to_float(float x) { return x; }
inline float to_float(_Float16 x) { return static_cast<float>(x); }
inline float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float to_float(fp8 x) {
  const uint16_t half = (x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7;
  _Float16 out;
  std::memcpy(&out, &half, 2);
  return static_cast<float>(out) * 256.0f;
}
template <typename T>
inline T from_float(float x) {
  return static_cast<T>(x);
}
template <>
inline bf16 from_float<bf16>(float x) {  // round to nearest even; inputs are finite
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits += 0x7fff + ((bits >> 16) & 1);
  return bf16{static_cast<uint16_t>(bits >> 16)};
}

template <>
inline fp8 from_float<fp8>(float x) {  // see `encode` in kernels/fp8.py; exact for numbers of fp8
  float size = std::fabs(x);
  size = size < 448.0f ? size : 448.0f;  // NaN too
  const bool small = size < 0.015625f;
  if (small) size += 0.015625f;
  uint32_t bits;
  std::memcpy(&bits, &size, 4);
  const uint32_t code = (bits >> 20) - ((small ? 121 : 120) << 3);
  return fp8{static_cast<uint8_t>(code | (x < 0 ? 0x80 : 0))};
}

// What tokens of a cache of T come as: queries, new keys and values, and results.
template <typename T>
using Token = std::conditional_t<std::is_same_v<T, fp8>, float, T>;

// Calls run(T{}) with the element type that `dtype` names: 0 float32, 1 bfloat16, 2 float16.
// Returns 0, or 2 if there is none.
template <typename Run>
int with_dtype(int dtype, Run&& run) {
  switch (dtype) {
    case 0: run(float{}); return 0;
    case 1: run(bf16{}); return 0;
    case 2: run(_Float16{}); return 0;
  }
  return 2;
}

// The same where a cache may also hold e4m3, which is 3.
template <typename Run>
int with_cache_dtype(int dtype, Run&& run) {
  if (dtype != 3) return with_dtype(dtype, run);
  run(fp8{});
  return 0;
}

// Calls run(G, first) for each group of up to four of `count` query heads; G is a constant.
template <typename Run>
void by_four(int64_t count, Run&& run) {
  int64_t first = 0;
  for (; count - first >= 4; first += 4) run(std::integral_constant<int, 4>{}, first);
  switch (count - first) {
    case 1: return run(std::integral_constant<int, 1>{}, first);
    case 2: return run(std::integral_constant<int, 2>{}, first);
    case 3: return run(std::integral_constant<int, 3>{}, first);
  }
}

// Two products a lane: acc + a[0] * b[0] + a[1] * b[1] over pairs of elements of T with queries.
template <typename T>
struct Dot {
  typedef float query;  // how queries are held
  struct pairs {
    vec first, second;
  };
  // Consecutive elements, two vectors of them.
  template <typename X>
  static pairs along(const X* p) {
    return {load(p), load(p + kLanes)};
  }
  // A vector of each of two rows.
  static pairs across(const T* a, const T* b) { return {load(a), load(b)}; }
  // Two such vectors, and sums of them put into the order of the rows.
  static void zip(const T* a, const T* b, pairs (&out)[2]) {
    out[0] = across(a, b);
    out[1] = across(a + kLanes, b + kLanes);
  }
  static void unzip(vec (&)[2]) {}
  // Two elements, in all lanes. Less nothing, not plus: that would make 0 of -0, so that an addition
  // would stay where a load is enough.
  static pairs broadcast(const query* p) { return {p[0] - vec{}, p[1] - vec{}}; }
  static vec add(vec acc, pairs a, pairs b) {
    return acc + a.first * b.first + a.second * b.second;
  }
};

#ifdef __AVX512BF16__
template <>
struct Dot<bf16> {
  typedef bf16 query;
  typedef __m512i pairs;
  static pairs along(const bf16* p) { return _mm512_loadu_si512(p); }
  static pairs across(const bf16* a, const bf16* b) {
    const __m512i order = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
        39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    auto half = [](const bf16* p) {
      return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
    return _mm512_permutex2var_epi16(half(a), order, half(b));
  }
  static void zip(const bf16* a, const bf16* b, pairs (&out)[2]) {
    const __m512i x = along(a), y = along(b);  // by quarters, as that takes one operation each
    out[0] = _mm512_unpacklo_epi16(x, y);
    out[1] = _mm512_unpackhi_epi16(x, y);
  }
  static void unzip(vec (&sums)[2]) {
    const vec even = sums[0], odd = sums[1];
    sums[0] = __builtin_shufflevector(even, odd, 0, 1, 2, 3, 16, 17, 18, 19,  //
                                      4, 5, 6, 7, 20, 21, 22, 23);
    sums[1] = __builtin_shufflevector(even, odd, 8, 9, 10, 11, 24, 25, 26, 27,  //
                                      12, 13, 14, 15, 28, 29, 30, 31);
  }
  static pairs broadcast(const bf16* p) {
    int32_t both;
    std::memcpy(&both, p, sizeof(both));
    return _mm512_set1_epi32(both);
  }
  static vec add(vec acc, pairs a, pairs b) {
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// The lanes of b where their number has a bit of S, else those of a; and lanes that differ in S
// exchanged.
template <int S, int... I>
inline vec choose(vec a, vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I & S ? I + kLanes : I)...);
}
template <int S, int... I>
inline vec exchange(vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ S)...);
}

// The sum of all lanes of v[i] in lane i, of kLanes vectors. With a smaller S, of so many vectors:
// lane i has the part of v[i % S] that is in lanes which differ from i below S.
template <int S = kLanes>
inline vec sums(const vec* v) {
  if constexpr (S == 1) {
    return v[0];
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
    const vec a = sums<S / 2>(v), b = sums<S / 2>(v + S / 2);
    return choose<S / 2>(a, b, lanes) + exchange<S / 2>(choose<S / 2>(b, a, lanes), lanes);
  }
}

inline float sum(vec v) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  if constexpr (kLanes > 8) v += exchange<8>(v, lanes);
  v += exchange<1>(v, lanes);
  v += exchange<2>(v, lanes);
  v += exchange<4>(v, lanes);
  return v[0];
}
inline float largest(vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// The largest of the lanes that differ by multiples of S, in all of them; and their sum.
template <int S>
inline vec largest_by(vec v) {
  if constexpr (S < kLanes) {
    const vec other = exchange<S>(v, std::make_integer_sequence<int, kLanes>{});
    return largest_by<2 * S>(other > v ? other : v);
  }
  return v;
}
template <int S>
inline vec sum_by(vec v) {
  if constexpr (S < kLanes)
    return sum_by<2 * S>(v + exchange<S>(v, std::make_integer_sequence<int, kLanes>{}));
  return v;
}

// Dot products of G query heads, [G][dim], with kLanes / H rows; lane H * r + g is of row r and head
// g. P is the number of pieces of a head (0: not known at compile time); with it, queries stay in
// registers.
constexpr int kPiece = 2 * kLanes;  // elements
template <int G, int H, int P, typename T>
inline vec dots(const typename Dot<T>::query* query, const T* const* rows, int64_t dim) {
  typedef Dot<T> D;
  constexpr int kRows = kLanes / H;
  const int64_t pieces = P ? P : dim / kPiece;
  vec acc[kLanes] = {};
  for (int64_t p = 0; p < pieces; ++p) {
    typename D::pairs of_query[G];
    for (int g = 0; g < G; ++g) of_query[g] = D::along(query + g * dim + kPiece * p);
    for (int r = 0; r < kRows; ++r) {
      const auto row = D::along(rows[r] + kPiece * p);
      for (int g = 0; g < G; ++g) acc[H * r + g] = D::add(acc[H * r + g], row, of_query[g]);
    }
  }
  vec out = sums(acc);
  if (!P)
    for (int64_t j = kPiece * pieces; j < dim; ++j)
      for (int r = 0; r < kRows; ++r)
        for (int g = 0; g < G; ++g)
          out[H * r + g] += to_float(rows[r][j]) * to_float(query[g * dim + j]);
  return out;
}

// One bit per lane that is true.
inline uint32_t lane_bits(ivec truth) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask((__m512i)truth, _mm512_setzero_si512());
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)truth);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(truth[i] != 0) << i;
  return bits;
#endif
}

// exp for arguments <= 0: range reduction by powers of two and a degree-6 polynomial, about
// 1 ulp; flushes to zero below -87.
inline vec exp_nonpositive(vec x) {
  const vec scaled = x * 1.44269504088896341f;
#ifdef __AVX512F__
  const vec nf = (vec)_mm512_roundscale_ps((__m512)scaled, _MM_FROUND_TO_NEAREST_INT);
#else
  ivec n = __builtin_convertvector(scaled - 0.5f, ivec);
  n = n < -126 ? (ivec{} - 126) : n;
  const vec nf = __builtin_convertvector(n, vec);
#endif
  vec r = x - nf * 0.693359375f;
  r = r - nf * -2.12194440e-4f;
  vec p = vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#ifdef __AVX512F__
  const vec value = (vec)_mm512_scalef_ps((__m512)p, (__m512)nf);
#else
  const vec value = p * (vec)((n + 127) << 23);
#endif
  return x < -87.0f ? vec{} : value;
}

}  // namespace
