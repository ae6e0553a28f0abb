// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// RocketKV's key extrema on a CPU: keeping them, scoring pages by them, choosing the best pages.
//
// What one KV head has in one block of the cache is a contiguous run of elements:
//     [block_size][2 * D]                 one row per token: its key, then its value
//     [2 * D][block_size / page_size]     channel-major page extrema: D rows of minima, D of maxima

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention.h"
#include "simd.h"

namespace {

// Mirrored by DecodeSizes in decode.py. Strides count elements.
struct DecodeSizes {
  int64_t tokens, kv_heads, group, dim, block_size, page_size, top_k;
  int64_t block_stride, head_stride, table_stride, query_stride, out_stride, key_stride;
};

// The cache of one KV head of one request.
template <typename T>
struct HeadCache {
  const DecodeSizes& s;
  T* cache;
  const int32_t* table;  // block ids, from the first kept block
  int64_t head;

  T* block(int64_t index) const {
    return cache + table[index] * s.block_stride + head * s.head_stride;
  }
  T* row(int64_t slot) const {
    const uint32_t size = s.block_size, at = slot;  // 64-bit division is slow
    return block(at / size) + at % size * 2 * s.dim;
  }
  T* extrema(int64_t index) const { return block(index) + s.block_size * 2 * s.dim; }
  int64_t pages_per_block() const { return s.block_size / s.page_size; }

  // The scales are those that stored numbers are multiplied with; only fp8 has any.
  void append(int64_t slot, const Token<T>* key, const Token<T>* value, float key_scale,
              float value_scale) const {
    T* target = row(slot);
    if constexpr (std::is_same_v<T, Token<T>>) {
      std::memcpy(target, key, s.dim * sizeof(T));
      std::memcpy(target + s.dim, value, s.dim * sizeof(T));
    } else {
      const float keys = 1.0f / key_scale, values = 1.0f / value_scale;
      for (int64_t j = 0; j < s.dim; ++j) {
        target[j] = from_float<T>(key[j] * keys);
        target[s.dim + j] = from_float<T>(value[j] * values);
      }
    }
  }

  // Element-wise extrema of the keys in slots [first, last), which are of one page.
  void bounds(int64_t first, int64_t last, float* low, float* high) const {
    std::fill(low, low + s.dim, INFINITY);
    std::fill(high, high + s.dim, -INFINITY);
    const T* key = row(first);
    for (int64_t slot = first; slot < last; ++slot, key += 2 * s.dim) {
      int64_t j = 0;
      for (; j + kLanes <= s.dim; j += kLanes) {
        const vec x = load(key + j), least = load(low + j), most = load(high + j);
        store(low + j, x < least ? x : least);
        store(high + j, x > most ? x : most);
      }
      for (; j < s.dim; ++j) {
        const float x = to_float(key[j]);
        low[j] = std::min(low[j], x);
        high[j] = std::max(high[j], x);
      }
    }
  }

  // Stores the extrema of the page that the last of `tokens` tokens is in.
  void refresh(int64_t tokens) const {
    float low[kMaxDim], high[kMaxDim];
    const int64_t page = (tokens - 1) / s.page_size, stride = pages_per_block();
    bounds(page * s.page_size, tokens, low, high);
    T* target = extrema(page / stride) + page % stride;
    for (int64_t j = 0; j < s.dim; ++j) {
      target[j * stride] = from_float<T>(low[j]);
      target[(s.dim + j) * stride] = from_float<T>(high[j]);
    }
  }
};

// Calls each(i), ascending, for the `count` largest of n non-negative numbers, ties to the lower;
// -1 follows them up to a whole vector. Such floats order as integers, so bisecting the bit
// pattern of the count-th largest takes at most 31 branch-free passes; pause() runs in each.
template <typename Pause, typename Each>
void each_top(const float* numbers, int64_t n, int64_t count, Pause&& pause, Each&& each) {
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  auto bits = [&](int64_t p) { return (ivec)load(numbers + p); };
  auto at_least = [&](int32_t threshold) {
    pause();
    int64_t found = 0;
    for (int64_t p = 0; p < padded; p += kLanes)
      found += __builtin_popcount(lane_bits(bits(p) >= threshold));
    return found;
  };
  int32_t low = 0, high = 0x7f800000;  // at_least(low) >= count > at_least(high)
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t found = at_least(middle);
    (found >= count ? low : high) = middle;
    if (found == count) break;
  }
  int64_t ties = count - at_least(low + 1);
  for (int64_t p = 0; p < padded; p += kLanes) {
    const uint32_t larger = lane_bits(bits(p) > low);
    for (uint32_t rest = larger | lane_bits(bits(p) == low); rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      // If more than `count` share the smallest kept value, the first ones win.
      if ((larger >> lane & 1) || ties-- > 0) each(static_cast<int32_t>(p + lane));
    }
  }
}

// The channels that estimate a query group's logits, and how.
template <typename T>
struct Channels {
  typedef typename Dot<T>::query Query;
  std::vector<int32_t> rows;   // of the extrema, ascending by channel; even in number
  std::vector<Query> weights;  // [group][rows]
  std::vector<float> inverse_temperature;  // the logit scale included

  // query: [group][dim]. Channels with the largest group magnitude; minima for a non-positive sum.
  void choose(const Query* query, int64_t group, int64_t dim, int64_t top_r, float scale) {
    top_r = std::min(top_r, dim);
    float magnitude[kMaxDim + kLanes], total[kMaxDim];
    std::fill(magnitude, magnitude + dim, 0.0f);
    std::fill(total, total + dim, 0.0f);
    for (int64_t g = 0; g < group; ++g)
      for (int64_t j = 0; j < dim; ++j) {
        const float x = to_float(query[g * dim + j]);
        magnitude[j] += std::fabs(x);
        total[j] += x;
      }
    std::fill(magnitude + dim, magnitude + dim + kLanes, -1.0f);
    int32_t order[kMaxDim];
    int64_t kept = 0;
    each_top(magnitude, dim, top_r, [] {}, [&](int32_t j) {
      if (kept < top_r) order[kept++] = j;
    });
    top_r = kept;  // fewer where they are not numbers
    const int64_t even = top_r + top_r % 2;
    rows.resize(even);
    for (int64_t i = 0; i < top_r; ++i)
      rows[i] = order[i] + (total[order[i]] > 0 ? static_cast<int32_t>(dim) : 0);
    if (even > top_r) rows[top_r] = rows[top_r - 1];
    weights.assign(group * even, from_float<Query>(0.0f));
    inverse_temperature.resize(group);
    for (int64_t g = 0; g < group; ++g) {
      const Query *from = query + g * dim, *to = weights.data() + g * even;
      for (int64_t i = 0; i < top_r; ++i) weights[g * even + i] = from[order[i]];
      const float chosen = magnitude_sum(to, even), all = magnitude_sum(from, dim);
      inverse_temperature[g] = chosen > 0 ? scale / std::sqrt(chosen / all) : 1.0f;
    }
  }

 private:
  static float magnitude_sum(const Query* x, int64_t count) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) total += std::fabs(to_float(x[i]));
    return total;
  }
};

// Hybrid sparse attention's choice of pages for one query group.
template <typename T>
struct PageSelection {
  typedef Dot<T> D;
  std::vector<float> score, probability;
  std::vector<int32_t> pages;

  // Fills `pages`, the newest first; returns how many tokens of the last one are taken. `own` are
  // the extrema in the order of their use; of `earlier` and `later` some is pulled on the way.
  // sinks: learned ones of the group, or null.
  int64_t select(const HeadCache<T>& head, const Channels<T>& channels, int64_t group,
                 int64_t tokens, Lines& own, Lines& earlier, Lines& later, const float* sinks) {
    const DecodeSizes& s = head.s;
    const int64_t count = (tokens + s.page_size - 1) / s.page_size, newest = count - 1;
    const int64_t newest_tokens = tokens - newest * s.page_size;
    const int64_t per_block = head.pages_per_block(), blocks = (count + per_block - 1) / per_block;
    const int64_t padded = (blocks * per_block + kLanes - 1) / kLanes * kLanes;
    score.resize(group * padded + kLanes);
    // What ranking and attention leave idle: two thirds of what is read next, a quarter of what
    // comes after.
    const int64_t own_share = own.count / blocks + 1;
    const int64_t earlier_share = earlier.share(3 * blocks / 2);
    const int64_t later_share = later.share(4 * blocks);
    own.pull(3 * own_share);
    for (int64_t b = 0; b < blocks; ++b) {
      own.pull(own_share);
      earlier.pull(earlier_share);
      later.pull(later_share);
      float* out = score.data() + b * per_block;
      by_four(group, [&](auto heads, int64_t first) {
        score_heads<decltype(heads)::value>(head.extrema(b), per_block, channels, first, out,
                                            padded);
      });
    }
    // The newest page may have grown since (or, for a replayed token, shrunk to what it saw).
    float bound[2 * kMaxDim];
    head.bounds(newest * s.page_size, tokens, bound, bound + s.dim);
    const int64_t width = channels.rows.size();
    for (int64_t g = 0; g < group; ++g) {
      float value = 0;
      for (int64_t i = 0; i < width; ++i)
        value += to_float(channels.weights[g * width + i]) * bound[channels.rows[i]];
      score[g * padded + newest] = value;
      for (int64_t p = count; p < padded; ++p) score[g * padded + p] = -INFINITY;
    }
    rank(channels, group, padded, newest, newest_tokens, s.page_size, earlier, sinks);

    pages.assign(1, static_cast<int32_t>(newest));
    const int64_t rest = s.top_k - newest_tokens;
    if (rest <= 0) return s.top_k;
    const int64_t full = std::min(rest / s.page_size, newest);
    const int64_t remainder = full < newest ? rest - full * s.page_size : 0;
    take_top(newest, full + (remainder > 0), earlier);
    if (pages.size() < 2) return newest_tokens;  // NaN scores rank nothing
    if (!remainder) return s.page_size;
    // The lowest-ranked page is the one taken in part; it goes last.
    size_t lowest = 1;
    for (size_t i = 2; i < pages.size(); ++i)
      if (probability[pages[i]] <= probability[pages[lowest]]) lowest = i;
    std::rotate(pages.begin() + lowest, pages.begin() + lowest + 1, pages.end());
    return remainder;
  }

 private:
  template <int G>
  static void score_heads(const T* extrema, int64_t pages, const Channels<T>& channels,
                          int64_t first, float* out, int64_t out_stride) {
    out += first * out_stride;
    int64_t p = 0;
    for (; p + 2 * kLanes <= pages; p += 2 * kLanes)
      score_tile<G, 2>(extrema + p, pages, channels, first, out + p, out_stride);
    for (; p + kLanes <= pages; p += kLanes)
      score_tile<G, 1>(extrema + p, pages, channels, first, out + p, out_stride);
    const int64_t width = channels.rows.size();
    for (; p < pages; ++p)
      for (int g = 0; g < G; ++g) {
        float total = 0;
        for (int64_t i = 0; i < width; ++i)
          total += to_float(extrema[channels.rows[i] * pages + p]) *
                   to_float(channels.weights[(first + g) * width + i]);
        out[g * out_stride + p] = total;
      }
  }

  template <int G, int W>
  static void score_tile(const T* extrema, int64_t pages, const Channels<T>& channels,
                         int64_t first, float* out, int64_t out_stride) {
    const int64_t width = channels.rows.size();
    const int32_t* rows = channels.rows.data();
    const auto* weights = channels.weights.data() + first * width;
    vec acc[G][W] = {};
    for (int64_t i = 0; i < width; i += 2) {
      const T *a = extrema + rows[i] * pages, *b = extrema + rows[i + 1] * pages;
      typename D::pairs bound[W];
      if constexpr (W == 2) D::zip(a, b, bound);
      else bound[0] = D::across(a, b);
      for (int g = 0; g < G; ++g) {
        const auto weight = D::broadcast(weights + g * width + i);
        for (int w = 0; w < W; ++w) acc[g][w] = D::add(acc[g][w], bound[w], weight);
      }
    }
    for (int g = 0; g < G; ++g) {
      if constexpr (W == 2) D::unzip(acc[g]);
      for (int w = 0; w < W; ++w) store(out + g * out_stride + w * kLanes, acc[g][w]);
    }
  }

  // Softmax of the scores over tokens (each page counts once per token), summed over the group. A
  // sink is one more of its entries: a head that mostly reads its own counts for less.
  void rank(const Channels<T>& channels, int64_t group, int64_t padded, int64_t newest,
            int64_t newest_tokens, int64_t page_size, Lines& earlier, const float* sinks) {
    const int64_t share = earlier.share(2 * group * padded / kLanes);
    probability.assign(padded + kLanes, 0.0f);
    for (int64_t g = 0; g < group; ++g) {
      float* x = score.data() + g * padded;
      const float inverse = channels.inverse_temperature[g];
      vec tops = load(x);
      for (int64_t p = kLanes; p < padded; p += kLanes)
        tops = load(x + p) > tops ? load(x + p) : tops;
      const float top = largest(tops);
      vec mass = {};
      for (int64_t p = 0; p < padded; p += kLanes) {
        earlier.pull(share);
        const vec e = exp_nonpositive((load(x + p) - top) * inverse);
        store(x + p, e);
        mass += e;
      }
      float total = page_size * sum(mass) - (page_size - newest_tokens) * x[newest];
      if (sinks) total += std::exp(sinks[g] - top * inverse);
      for (int64_t p = 0; p < padded; p += kLanes)
        store(&probability[p], load(&probability[p]) + load(x + p) * (1.0f / total));
    }
  }

  // Appends the `count` most probable of the first n pages, ascending, ties to the lower page.
  void take_top(int64_t n, int64_t count, Lines& earlier) {
    const int64_t share = earlier.share(16);
    if (count <= 0) return;
    std::fill(probability.begin() + n, probability.end(), -1.0f);
    each_top(
        probability.data(), n, count, [&] { earlier.pull(share); },
        [&](int32_t page) { pages.push_back(page); });
  }
};

}  // namespace
