// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// Exact attention of one decode token's query group over runs of token rows.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t kMaxDim = 1024;

// Cache lines (of 64 bytes) that a later phase will read. Scattered reads are bound by latency:
// asked for one phase ahead, they arrive in the second-level cache while the core computes.
struct Lines {
  static constexpr int64_t kAhead = 2048;  // at most; two lists may be on their way, 256 KiB
  std::vector<const char*> at;
  int64_t count = 0, next = 0;

  void clear() { count = next = 0; }
  // Consecutive lines, as far as they are read ahead.
  void add(const void* first, int64_t bytes) {
    const char* p = static_cast<const char*>(first);
    const int64_t lines = std::min((bytes + 63) / 64, kAhead - count);
    const char** target = more(lines);
    for (int64_t i = 0; i < lines; ++i) target[i] = p + 64 * i;
  }
  void add(const void* first, const std::vector<int32_t>& offsets) {
    const char* p = static_cast<const char*>(first);
    const char** target = more(offsets.size());
    for (size_t i = 0; i < offsets.size(); ++i) target[i] = p + offsets[i];
  }
  void pull(int64_t lines) {
    for (const int64_t end = std::min(count, next + lines); next < end; ++next)
      __builtin_prefetch(at[next], 0, 2);
  }
  // What each of `steps` steps has to pull.
  int64_t share(int64_t steps) const {
    const int64_t lines = std::min(count, kAhead) - next;
    return steps && lines > 0 ? (lines + steps - 1) / steps : 0;
  }

 private:
  const char** more(int64_t lines) {
    count += lines;
    if (static_cast<int64_t>(at.size()) < count) at.resize(2 * count);
    return at.data() + count - lines;
  }
};

// Consecutive token rows: each is a key, then a value.
template <typename T>
struct Run {
  const T* rows;
  int64_t tokens;
};

// Exact attention of a query group; a group of more than four heads reads the rows again for each
// further four.
template <typename T>
struct Attention {
  typedef Dot<T> D;
  typedef typename D::query Query;
  int64_t group, dim;
  float scale, value_scale;  // of logits and of what is attended to

  // Copies a query group to where attend() wants it.
  static void hold(const Token<T>* source, int64_t count, std::vector<Query>& query) {
    query.resize(count);
    if constexpr (std::is_same_v<Token<T>, Query>)
      std::memcpy(query.data(), source, count * sizeof(Query));
    else
      for (int64_t i = 0; i < count; ++i) query[i] = to_float(source[i]);
  }

  // query and out: [group][dim]. Pulls all of `later` on the way. sinks: learned ones, a logit of
  // each head that takes part beside those of tokens, or null. If runs are a part of what is
  // attended to, `part` takes what merge() needs, [group][partial()], and `out` nothing.
  void attend(const Query* query, const std::vector<Run<T>>& runs, Token<T>* out, Lines& later,
              const float* sinks = nullptr, float* part = nullptr) const {
    by_four(group, [&](auto count, int64_t first) {
      constexpr int G = decltype(count)::value;
      const Query* q = query + first * dim;
      Token<T>* target = out + first * dim;
      const float* own = sinks ? sinks + first : nullptr;
      float* rest = part ? part + first * partial() : nullptr;
      switch (dim) {
        case 64: return heads<G, 64 / kPiece>(q, runs, target, later, own, rest);
        case 128: return heads<G, 128 / kPiece>(q, runs, target, later, own, rest);
        default: return heads<G, 0>(q, runs, target, later, own, rest);
      }
    });
  }

  // Numbers of a head's part: weighted sums, then the largest logit and the weights' sum.
  static int64_t partial(int64_t dim) { return dim + 2; }
  int64_t partial() const { return partial(dim); }

  // What a head without tokens adds.
  void leave_out(float* part) const {
    for (int64_t g = 0; g < group; ++g, part += partial()) part[dim] = -INFINITY, part[dim + 1] = 0;
  }

  // Of `count` parts, each [group][partial()]; zeros if none has tokens.
  void merge(const float* parts, int64_t count, Token<T>* out) const {
    float sums[kMaxDim];
    for (int64_t g = 0; g < group; ++g, parts += partial(), out += dim) {
      const int64_t stride = group * partial();
      float top = -INFINITY, total = 0;
      for (int64_t i = 0; i < count; ++i) top = std::max(top, parts[i * stride + dim]);
      std::fill(sums, sums + dim, 0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const float *part = parts + i * stride, mass = part[dim + 1];
        if (mass == 0) continue;
        const float weight = std::exp(part[dim] - top);
        total += weight * mass;
        for (int64_t j = 0; j < dim; ++j) sums[j] += weight * part[j];
      }
      const float factor = total == 0 ? 0 : value_scale / total;
      for (int64_t j = 0; j < dim; ++j) out[j] = from_float<Token<T>>(sums[j] * factor);
    }
  }

 private:
  // Tokens whose keys and values stay in the first-level cache between logits and weighted sums.
  static constexpr int kChunk = 32;
  static constexpr int kAtOnce = kLanes / 4;  // tokens whose logits fill a vector
  typedef const T* Rows[kChunk];

  // Up to four query heads, by an online softmax. P as in dots().
  template <int G, int P>
  void heads(const Query* query, const std::vector<Run<T>>& runs, Token<T>* out, Lines& later,
             const float* sinks, float* part) const {
    size_t run = 0;
    int64_t taken = 0, tokens = 0;
    for (const Run<T>& r : runs) tokens += r.tokens;
    auto next = [&](Rows& rows) {
      int count = 0;
      while (count < kChunk && run < runs.size()) {
        rows[count++] = runs[run].rows + taken * 2 * dim;
        if (++taken == runs[run].tokens) ++run, taken = 0;
      }
      for (int t = count; t % kAtOnce; ++t) rows[t] = rows[count - 1];
      return count;
    };
    const int64_t share = later.share(2 * tokens);  // with a logit, and with a weight
    float sums[4 * kMaxDim];
    std::fill(sums, sums + G * dim, 0.0f);
    vec top = vec{} - INFINITY, mass = {};  // lane i: of head i % 4
    if (sinks)                              // as a first token of no value
      for (int i = 0; i < kLanes; ++i)
        if (i % 4 < G) top[i] = sinks[i % 4], mass[i] = i < 4;
    Rows chunks[2];
    int count = next(chunks[0]);
    for (int i = 0; count; i ^= 1) {
      const int following = next(chunks[i ^ 1]);
      float weights[4 * kChunk];  // [token][head]
      vec highest = top;
      for (int t = 0; t < count; t += kAtOnce) {
        for (int n = t; n < std::min(t + kAtOnce, following); ++n) ask(chunks[i ^ 1][n]);
        later.pull(kAtOnce * share);
        const vec logits = dots<G, 4, P>(query, chunks[i] + t, dim) * scale;
        store(weights + 4 * t, logits);
        highest = logits > highest ? logits : highest;
      }
      highest = largest_by<4>(highest);
      const vec decay = exp_nonpositive(top - highest);
      top = highest;
      mass = mass * decay + exponentials(weights, count, top);
      weigh_all<G, P>(chunks[i], count, weights, decay, sums, later, share);
      count = following;
    }
    for (int g = 0; g < G; ++g) {
      float total = 0;
      for (int lane = g; lane < kLanes; lane += 4) total += mass[lane];
      if (part) {
        float* own = part + g * partial();
        std::copy_n(sums + g * dim, dim, own);
        own[dim] = top[g], own[dim + 1] = total;
        continue;
      }
      for (int64_t j = 0; j < dim; ++j)
        out[g * dim + j] = from_float<Token<T>>(sums[g * dim + j] * (value_scale / total));
    }
  }

  void ask(const T* row) const {
    const char* p = reinterpret_cast<const char*>(row);
    for (int64_t b = 0; b < 2 * dim * static_cast<int64_t>(sizeof(T)); b += 64)
      __builtin_prefetch(p + b);
  }

  // Turns the logits of `count` tokens into weights; returns their sums.
  static vec exponentials(float* x, int count, vec top) {
    const int padded = (4 * count + kLanes - 1) / kLanes * kLanes;
    std::fill(x + 4 * count, x + padded, -INFINITY);
    vec sums = {};
    for (int i = 0; i < padded; i += kLanes) {
      const vec e = exp_nonpositive(load(x + i) - top);
      store(x + i, e);
      sums += e;
    }
    return sums;
  }

  template <int G, int P>
  void weigh_all(const Rows& rows, int count, const float* weights, vec decay, float* sums,
                 Lines& later, int64_t share) const {
    const int64_t vectors = P ? 2 * P : dim / kLanes;
    // Sums of four heads times four vectors would fill all 16 registers of AVX2.
    constexpr int W = kLanes == 8 && G == 4 ? 2 : 4;
    int64_t v = 0;
    for (; v + W <= vectors; v += W)
      weigh<G, W>(rows, count, weights, decay, v, sums, later, share);
    if (P) return;
    for (; v < vectors; ++v)
      weigh<G, 1>(rows, count, weights, decay, v, sums, later, share);
    for (int64_t j = v * kLanes; j < dim; ++j)
      for (int g = 0; g < G; ++g) {
        float total = sums[g * dim + j] * decay[g];
        for (int t = 0; t < count; ++t) total += to_float(rows[t][dim + j]) * weights[4 * t + g];
        sums[g * dim + j] = total;
      }
  }

  // W vectors of the values, from vector `first` of the head.
  template <int G, int W>
  void weigh(const Rows& rows, int count, const float* weights, vec decay, int64_t first,
             float* sums, Lines& later, int64_t share) const {
    sums += first * kLanes;
    vec acc[G][W];
    for (int g = 0; g < G; ++g)
      for (int w = 0; w < W; ++w) acc[g][w] = load(sums + g * dim + w * kLanes) * decay[g];
    for (int t = 0; t < count; ++t) {
      later.pull(share);
      for (int w = 0; w < W; ++w) {
        const vec value = load(rows[t] + dim + (first + w) * kLanes);
        for (int g = 0; g < G; ++g) acc[g][w] += value * weights[4 * t + g];
      }
    }
    for (int g = 0; g < G; ++g)
      for (int w = 0; w < W; ++w) store(sums + g * dim + w * kLanes, acc[g][w]);
  }
};

}  // namespace
