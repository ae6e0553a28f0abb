// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// RocketKV decode attention on a CPU: append, page extrema, page scores, top-k and exact
// attention over the selection, fused so that each byte of the paged KV cache is read once and
// nothing is materialised. `kernels/reference/decode.py` is the readable definition; the tests
// hold the two together.
//
// One (block, KV head) page of the cache is a contiguous run of elements:
//     [block_size][2 * D]            one row per token: its key, then its value
//     [2 * D][block_size / page]     channel-major page extrema: D rows of minima, D of maxima

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

namespace {

struct Shape {
  int64_t tokens, kv_heads, group, dim, block_size, page, top_k;
  int64_t block_stride, head_stride, table_stride, max_tokens;
  int64_t query_stride, out_stride, key_stride;
  float scale;
};

struct Scratch {
  std::vector<float> query, selected, probability, logits, partial;
  std::vector<int32_t> channels, pages;
  std::vector<const void*> row_pointers;
};

template <typename T>
struct Decoder {
  const Shape& s;
  T* cache;
  const int32_t* table;  // block ids of this token's request, from the first kept block
  int64_t head;

  T* page_base(int64_t block) const {
    return cache + block * s.block_stride + head * s.head_stride;
  }
  T* row(int64_t slot) const {
    return page_base(table[slot / s.block_size]) + (slot % s.block_size) * 2 * s.dim;
  }
  T* extrema(int64_t block_index) const {
    return page_base(table[block_index]) + s.block_size * 2 * s.dim;
  }
  int64_t pages_per_block() const { return s.block_size / s.page; }

  // Element-wise minimum and maximum of the keys in slots [first, last).
  void page_bounds(int64_t first, int64_t last, float* low, float* high) const {
    for (int64_t j = 0; j < s.dim; ++j) {
      low[j] = INFINITY;
      high[j] = -INFINITY;
    }
    const int64_t lanes = s.dim / kLanes * kLanes;
    for (int64_t slot = first; slot < last; ++slot) {
      const T* key = row(slot);
      for (int64_t j = 0; j < lanes; j += kLanes) {
        const vec x = load(key + j);
        vec& least = *reinterpret_cast<vec*>(low + j);
        vec& most = *reinterpret_cast<vec*>(high + j);
        least = x < least ? x : least;
        most = x > most ? x : most;
      }
      for (int64_t j = lanes; j < s.dim; ++j) {
        const float x = to_float(key[j]);
        low[j] = std::min(low[j], x);
        high[j] = std::max(high[j], x);
      }
    }
  }

  void write_newest_page(int64_t num_tokens, Scratch& tmp) const {
    const int64_t page = (num_tokens - 1) / s.page;
    float* low = tmp.query.data();
    float* high = low + s.dim;
    page_bounds(page * s.page, num_tokens, low, high);
    const int64_t stride = pages_per_block();
    T* base = extrema(page / stride) + page % stride;
    for (int64_t j = 0; j < s.dim; ++j) {
      base[j * stride] = from_float<T>(low[j]);
      base[(s.dim + j) * stride] = from_float<T>(high[j]);
    }
  }

  template <int G>
  void score_tiles(const float* selected, const int32_t* channels, int64_t top_r,
                   int64_t block_index, int64_t first_head, float* out, int64_t out_stride) const {
    const int64_t stride = pages_per_block();
    const T* base = extrema(block_index);
    int64_t tile = 0;
    for (; stride - tile >= 2 * kLanes; tile += 2 * kLanes) {
      vec low[G] = {}, high[G] = {};
      for (int64_t j = 0; j < top_r; ++j) {
        const T* bound = base + channels[j] * stride + tile;
        const vec first = load(bound), second = load(bound + kLanes);
        for (int g = 0; g < G; ++g) {
          const float weight = selected[(first_head + g) * s.dim + j];
          low[g] += first * weight;
          high[g] += second * weight;
        }
      }
      for (int g = 0; g < G; ++g) {
        float* target = out + (first_head + g) * out_stride + tile;
        *reinterpret_cast<vec*>(target) = low[g];
        *reinterpret_cast<vec*>(target + kLanes) = high[g];
      }
    }
    for (; tile < stride; tile += kLanes) {
      if (stride - tile >= kLanes) {
        vec acc[G] = {};
        for (int64_t j = 0; j < top_r; ++j) {
          const vec bound = load(base + channels[j] * stride + tile);
          for (int g = 0; g < G; ++g) acc[g] += bound * selected[(first_head + g) * s.dim + j];
        }
        for (int g = 0; g < G; ++g)
          *reinterpret_cast<vec*>(out + (first_head + g) * out_stride + tile) = acc[g];
      } else {
        for (int64_t p = tile; p < stride; ++p)
          for (int g = 0; g < G; ++g) {
            float total = 0;
            for (int64_t j = 0; j < top_r; ++j)
              total += to_float(base[channels[j] * stride + p]) * selected[(first_head + g) * s.dim + j];
            out[(first_head + g) * out_stride + p] = total;
          }
      }
    }
  }

  void score_block(const float* selected, const int32_t* channels, int64_t top_r,
                   int64_t block_index, float* out, int64_t out_stride) const {
    int64_t g = 0;
    for (; s.group - g >= 8; g += 8)
      score_tiles<8>(selected, channels, top_r, block_index, g, out, out_stride);
    switch (s.group - g) {
      case 1: return score_tiles<1>(selected, channels, top_r, block_index, g, out, out_stride);
      case 2: return score_tiles<2>(selected, channels, top_r, block_index, g, out, out_stride);
      case 3: return score_tiles<3>(selected, channels, top_r, block_index, g, out, out_stride);
      case 4: return score_tiles<4>(selected, channels, top_r, block_index, g, out, out_stride);
      case 5: return score_tiles<5>(selected, channels, top_r, block_index, g, out, out_stride);
      case 6: return score_tiles<6>(selected, channels, top_r, block_index, g, out, out_stride);
      case 7: return score_tiles<7>(selected, channels, top_r, block_index, g, out, out_stride);
    }
  }

  // Hybrid sparse attention, step 1 to 6: fills tmp.pages with the chosen pages, newest first;
  // returns how many tokens of the last one belong to the selection.
  int64_t select_pages(const float* query, int64_t num_tokens, int64_t top_r, Scratch& tmp) const {
    const int64_t dim = s.dim, group = s.group;
    const int64_t num_pages = (num_tokens + s.page - 1) / s.page;
    const int64_t newest = num_pages - 1;
    const int64_t newest_tokens = num_tokens - newest * s.page;

    // Channels with the largest group magnitude; minima rows for a non-positive group sum.
    float magnitude[1024 + kLanes], total[1024];
    for (int64_t j = 0; j < dim; ++j) {
      float a = 0, b = 0;
      for (int64_t g = 0; g < group; ++g) {
        a += std::fabs(query[g * dim + j]);
        b += query[g * dim + j];
      }
      magnitude[j] = a;
      total[j] = b;
    }
    // Rank by counting larger magnitudes: branch-free, and the kept channels come out ascending.
    for (int64_t j = dim; j < dim + kLanes; ++j) magnitude[j] = -1.0f;
    int32_t order[1024];
    int64_t kept_channels = 0;
    for (int64_t j = 0; j < dim && kept_channels < top_r; ++j) {
      int64_t rank = 0;
      for (int64_t i = 0; i < dim; i += kLanes)
        rank += __builtin_popcount(lane_bits(load(magnitude + i) > magnitude[j]));
      for (int64_t i = 0; i < j && rank < top_r; ++i) rank += magnitude[i] == magnitude[j];
      if (rank < top_r) order[kept_channels++] = static_cast<int32_t>(j);
    }
    int32_t* channels = tmp.channels.data();
    float* selected = tmp.selected.data();
    for (int64_t g = 0; g < group; ++g) {
      float kept = 0, all = 0;
      for (int64_t j = 0; j < top_r; ++j) kept += std::fabs(query[g * dim + order[j]]);
      for (int64_t j = 0; j < dim; ++j) all += std::fabs(query[g * dim + j]);
      const float temperature = all > 0 ? std::sqrt(dim * (kept / all)) : 1.0f;
      for (int64_t j = 0; j < top_r; ++j)
        selected[g * dim + j] = query[g * dim + order[j]] / temperature;
    }
    const int64_t stride = pages_per_block();
    for (int64_t j = 0; j < top_r; ++j)
      channels[j] = order[j] + (total[order[j]] > 0 ? static_cast<int32_t>(dim) : 0);

    const int64_t blocks = (num_pages + stride - 1) / stride;
    const int64_t padded = (blocks * stride + kLanes - 1) / kLanes * kLanes;
    float* score = tmp.logits.data();
    for (int64_t b = 0; b < blocks; ++b) {
      if (b + 1 < blocks) {
        const T* next = extrema(b + 1);
        for (int64_t j = 0; j < top_r; ++j) __builtin_prefetch(next + channels[j] * stride);
      }
      score_block(selected, channels, top_r, b, score + b * stride, padded);
    }
    // The newest page may have grown since (or, for a replayed token, shrunk to what it saw).
    float* low = tmp.partial.data();
    float* high = low + dim;
    page_bounds(newest * s.page, num_tokens, low, high);
    for (int64_t g = 0; g < group; ++g) {
      float value = 0;
      for (int64_t j = 0; j < top_r; ++j) {
        const int64_t channel = channels[j];
        value += selected[g * dim + j] *
                 to_float(from_float<T>(channel < dim ? low[channel] : high[channel - dim]));
      }
      score[g * padded + newest] = value;
      for (int64_t p = num_pages; p < padded; ++p) score[g * padded + p] = -INFINITY;
    }

    // Softmax over tokens (each page counts once per token), summed over the group.
    float* probability = tmp.probability.data();
    std::fill(probability, probability + padded, 0.0f);
    for (int64_t g = 0; g < group; ++g) {
      float* x = score + g * padded;
      vec tops = load(x);
      for (int64_t p = kLanes; p < padded; p += kLanes) {
        const vec next = load(x + p);
        tops = next > tops ? next : tops;
      }
      float top = tops[0];
      for (int i = 1; i < kLanes; ++i) top = std::max(top, tops[i]);
      vec mass = {};
      for (int64_t p = 0; p < padded; p += kLanes) {
        const vec e = exp_nonpositive(load(x + p) - top);
        *reinterpret_cast<vec*>(x + p) = e;
        mass += e;
      }
      const float denominator =
          s.page * (sum(mass) - x[newest]) + newest_tokens * x[newest];
      const float inverse = 1.0f / denominator;
      for (int64_t p = 0; p < padded; p += kLanes)
        *reinterpret_cast<vec*>(probability + p) = load(probability + p) + load(x + p) * inverse;
    }

    // Top-k: the newest page first, then by score, ties to the lower page.
    tmp.pages.assign(1, static_cast<int32_t>(newest));
    const int64_t rest = s.top_k - newest_tokens;
    if (rest <= 0) return s.top_k;
    const int64_t full = std::min(rest / s.page, newest);
    const int64_t remainder = full < newest ? rest - full * s.page : 0;
    take_top_pages(probability, newest, full + (remainder > 0), tmp.pages);
    if (tmp.pages.size() < 2) return newest_tokens;  // NaN scores rank nothing
    if (!remainder) return s.page;
    // The lowest-ranked page is the one taken in part; it goes last.
    size_t lowest = 1;
    for (size_t i = 2; i < tmp.pages.size(); ++i)
      if (probability[tmp.pages[i]] <= probability[tmp.pages[lowest]]) lowest = i;
    std::rotate(tmp.pages.begin() + lowest, tmp.pages.begin() + lowest + 1, tmp.pages.end());
    return remainder;
  }

  // Appends the `count` largest of score[0, n) to `pages`, ascending, ties to the lower page.
  // Non-negative floats order as integers, so bisecting the bit pattern of the count-th largest
  // takes at most 31 branch-free passes.
  static void take_top_pages(float* score, int64_t n, int64_t count, std::vector<int32_t>& pages) {
    if (count <= 0) return;
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    for (int64_t p = n; p < padded; ++p) score[p] = -1.0f;
    auto bits = [&](int64_t p) { return (ivec)load(score + p); };
    auto at_least = [&](int32_t threshold) {
      int64_t found = 0;
      for (int64_t p = 0; p < padded; p += kLanes)
        found += __builtin_popcount(lane_bits(bits(p) >= threshold));
      return found;
    };
    int32_t low = 0, high = 0x7f800000;  // at_least(low) >= count > at_least(high)
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      const int64_t found = at_least(middle);
      if (found >= count) low = middle;
      else high = middle;
      if (found == count) break;
    }
    int64_t ties = count - at_least(low + 1);
    for (int64_t p = 0; p < padded; p += kLanes) {
      uint32_t larger = lane_bits(bits(p) > low);
      for (uint32_t rest = larger | lane_bits(bits(p) == low); rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        // If more than `count` share the smallest kept value, the first ones win.
        if ((larger >> lane & 1) || ties-- > 0) pages.push_back(static_cast<int32_t>(p + lane));
      }
    }
  }

  // Exact attention of up to four query heads over the tokens of tmp.pages. V is the number of
  // vectors in a head (0: not known at compile time); with it, queries and sums stay in registers.
  template <int G, int V>
  void attend_heads(const float* query, int64_t num_tokens, int64_t last_page_tokens, T* out,
                    int64_t first_head, Scratch& tmp) const {
    const int64_t dim = s.dim;
    const int64_t count = static_cast<int64_t>(tmp.pages.size());
    const int64_t vectors = V ? V : dim / kLanes;
    float* logits = tmp.logits.data();  // [token][4]
    const float* q = query + first_head * dim;
    auto tokens_in = [&](int64_t i) {
      const int64_t visible = std::min(s.page, num_tokens - tmp.pages[i] * s.page);
      return i + 1 == count ? std::min(visible, last_page_tokens) : visible;
    };
    const T** rows = reinterpret_cast<const T**>(tmp.row_pointers.data());
    auto find = [&](int64_t i) {  // and ask for its bytes
      if (i >= count) return;
      rows[i] = row(tmp.pages[i] * s.page);
      const char* p = reinterpret_cast<const char*>(rows[i]);
      for (int64_t b = 0; b < s.page * 2 * dim * static_cast<int64_t>(sizeof(T)); b += 64)
        __builtin_prefetch(p + b);
    };
    constexpr int kAhead = 4;
    for (int64_t i = 0; i < kAhead; ++i) find(i);
    int64_t n = 0;
    vec top4 = vec{} - INFINITY;
    for (int64_t i = 0; i < count; ++i) {
      find(i + kAhead);
      const T* key = rows[i];
      const int64_t here = tokens_in(i);
      for (int64_t t = 0; t < here; ++t, key += 2 * dim, ++n) {
        vec acc[4] = {};
        for (int64_t v = 0; v < vectors; ++v) {
          const vec k = load(key + v * kLanes);
          for (int g = 0; g < G; ++g) acc[g] += k * load(q + g * dim + v * kLanes);
        }
        v4 dots = sum4(acc[0], acc[1], acc[2], acc[3]);
        for (int64_t j = vectors * kLanes; j < dim; ++j)
          for (int g = 0; g < G; ++g) dots[g] += to_float(key[j]) * q[g * dim + j];
        *reinterpret_cast<v4*>(logits + 4 * n) = dots * s.scale;
      }
    }
    // Softmax of the four columns at once: a vector holds four tokens.
    const int64_t total = 4 * n, padded = (total + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = total; i < padded; ++i) logits[i] = -INFINITY;
    for (int64_t i = 0; i < padded; i += kLanes) {
      const vec x = load(logits + i);
      top4 = x > top4 ? x : top4;
    }
    float top[4], inverse[4];
    for (int g = 0; g < 4; ++g)
      top[g] = std::max(std::max(top4[g], top4[g + 4]), std::max(top4[g + 8], top4[g + 12]));
    vec shift;
    for (int i = 0; i < kLanes; ++i) shift[i] = top[i % 4];
    vec mass = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const vec e = exp_nonpositive(load(logits + i) - shift);
      *reinterpret_cast<vec*>(logits + i) = e;
      mass += e;
    }
    for (int g = 0; g < 4; ++g)
      inverse[g] = 1.0f / ((mass[g] + mass[g + 4]) + (mass[g + 8] + mass[g + 12]));

    float* acc = tmp.partial.data();
    int64_t v = 0;
    for (; vectors - v >= 4; v += 4) weigh<G, 4>(rows, count, tokens_in, logits, v, acc);
    for (; v < vectors; ++v) weigh<G, 1>(rows, count, tokens_in, logits, v, acc);
    for (int64_t j = vectors * kLanes; j < dim; ++j)
      for (int g = 0; g < G; ++g) {
        float value = 0;
        for (int64_t i = 0, m = 0; i < count; ++i)
          for (int64_t t = 0; t < tokens_in(i); ++t, ++m)
            value += to_float(rows[i][(2 * t + 1) * dim + j]) * logits[4 * m + g];
        acc[g * dim + j] = value;
      }
    for (int g = 0; g < G; ++g)
      for (int64_t j = 0; j < dim; ++j)
        out[(first_head + g) * dim + j] = from_float<T>(acc[g * dim + j] * inverse[g]);
  }

  // Weighted sum of W vectors of the values, from vector `first` of the head.
  template <int G, int W, typename TokensIn>
  void weigh(const T* const* rows, int64_t count, TokensIn tokens_in, const float* weights,
             int64_t first, float* acc) const {
    vec sums[G][W] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T* value = rows[i] + s.dim + first * kLanes;
      const int64_t here = tokens_in(i);
      for (int64_t t = 0; t < here; ++t, value += 2 * s.dim, weights += 4)
        for (int w = 0; w < W; ++w) {
          const vec v = load(value + w * kLanes);
          for (int g = 0; g < G; ++g) sums[g][w] += v * weights[g];
        }
    }
    for (int g = 0; g < G; ++g)
      for (int w = 0; w < W; ++w)
        *reinterpret_cast<vec*>(acc + g * s.dim + (first + w) * kLanes) = sums[g][w];
  }

  template <int G>
  void attend_tile(const float* query, int64_t num_tokens, int64_t last, T* out, int64_t g,
                   Scratch& tmp) const {
    switch (s.dim) {
      case 64: return attend_heads<G, 4>(query, num_tokens, last, out, g, tmp);
      case 128: return attend_heads<G, 8>(query, num_tokens, last, out, g, tmp);
      default: return attend_heads<G, 0>(query, num_tokens, last, out, g, tmp);
    }
  }

  void attend(const float* query, int64_t num_tokens, int64_t last, T* out, Scratch& tmp) const {
    int64_t g = 0;
    for (; s.group - g >= 4; g += 4) attend_tile<4>(query, num_tokens, last, out, g, tmp);
    switch (s.group - g) {
      case 1: return attend_tile<1>(query, num_tokens, last, out, g, tmp);
      case 2: return attend_tile<2>(query, num_tokens, last, out, g, tmp);
      case 3: return attend_tile<3>(query, num_tokens, last, out, g, tmp);
    }
  }
};

// last_of_request[t] is the physical length of t's request after this step: a replayed request
// brings several tokens, and only the last token of a page stores that page's extrema.
template <typename T>
void decode(const Shape& s, T* cache, const T* query, const T* key, const T* value, T* out,
            const int32_t* table, const int32_t* lengths, const int32_t* last_of_request,
            const int32_t* top_r, int dense) {
  const int64_t tasks = s.tokens * s.kv_heads;
  const int64_t padded = (s.max_tokens / s.page + 2 * s.block_size + 2 * kLanes);
  const int64_t logits = std::max(s.group * padded, 4 * (s.max_tokens + kLanes));
  bool replays = false;
  for (int64_t t = 0; t < s.tokens; ++t) replays |= lengths[t] != last_of_request[t];
  auto append = [&](int64_t task) {
    const int64_t t = task / s.kv_heads, h = task % s.kv_heads;
    if (lengths[t] <= 0) return;
    T* row = Decoder<T>{s, cache, table + t * s.table_stride, h}.row(lengths[t] - 1);
    std::memcpy(row, key + t * s.key_stride + h * s.dim, s.dim * sizeof(T));
    std::memcpy(row + s.dim, value + t * s.key_stride + h * s.dim, s.dim * sizeof(T));
  };
  auto refresh = [&](int64_t task, Scratch& tmp) {
    const int64_t t = task / s.kv_heads, h = task % s.kv_heads, n = lengths[t];
    if (n > 0 && top_r[t] > 0 && (n == last_of_request[t] || n % s.page == 0))
      Decoder<T>{s, cache, table + t * s.table_stride, h}.write_newest_page(n, tmp);
  };
#pragma omp parallel
  {
    // Kept between calls: allocating and clearing it would cost as much as a small selection.
    static thread_local Scratch tmp;
    tmp.query.resize(std::max<int64_t>(s.group, 2) * s.dim + kLanes);
    tmp.selected.resize(s.group * s.dim + kLanes);
    tmp.partial.resize(std::max<int64_t>(4, 2) * s.dim + kLanes);
    tmp.probability.resize(padded + kLanes);
    tmp.logits.resize(logits + kLanes);
    tmp.channels.resize(s.dim);
    tmp.row_pointers.resize(s.max_tokens / s.page + 1);
    tmp.pages.reserve(s.max_tokens / s.page + 2);
    if (replays) {
      // A row may read what another row of its request appends: all of them append first.
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; ++task) append(task);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; ++task) refresh(task, tmp);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      if (!replays) {
        append(task);
        refresh(task, tmp);
      }
      const int64_t t = task / s.kv_heads, h = task % s.kv_heads;
      T* target = out + t * s.out_stride + h * s.group * s.dim;
      const int64_t n = lengths[t];
      if (n <= 0) {
        std::memset(static_cast<void*>(target), 0, s.group * s.dim * sizeof(T));
        continue;
      }
      Decoder<T> d{s, cache, table + t * s.table_stride, h};
      const T* q = query + t * s.query_stride + h * s.group * s.dim;
      for (int64_t i = 0; i < s.group * s.dim; ++i) tmp.query[i] = to_float(q[i]);
      int64_t last;
      if (dense || top_r[t] <= 0 || n <= s.top_k) {
        const int64_t pages = (n + s.page - 1) / s.page;
        tmp.pages.resize(pages);
        for (int64_t p = 0; p < pages; ++p) tmp.pages[p] = static_cast<int32_t>(p);
        last = s.page;
      } else {
        last = d.select_pages(tmp.query.data(), n, top_r[t], tmp);
      }
      d.attend(tmp.query.data(), n, last, target, tmp);
    }
  }
}

// Exact attention over all tokens of a block table of its own for each (token, KV head): the frames
// that SparDA has selected and fetched. Nothing is appended.
template <typename T>
void attend_frames(const Shape& s, T* frames, const T* query, T* out, const int32_t* table,
                   const int32_t* lengths) {
  const int64_t tasks = s.tokens * s.kv_heads;
#pragma omp parallel
  {
    static thread_local Scratch tmp;
    tmp.query.resize(s.group * s.dim + kLanes);
    tmp.partial.resize(4 * s.dim + kLanes);
    tmp.logits.resize(4 * (s.max_tokens + kLanes) + kLanes);
    tmp.row_pointers.resize(s.max_tokens / s.page + 1);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t t = task / s.kv_heads, h = task % s.kv_heads, n = lengths[t];
      T* target = out + t * s.out_stride + h * s.group * s.dim;
      if (n <= 0) {
        std::memset(static_cast<void*>(target), 0, s.group * s.dim * sizeof(T));
        continue;
      }
      const T* q = query + t * s.query_stride + h * s.group * s.dim;
      for (int64_t i = 0; i < s.group * s.dim; ++i) tmp.query[i] = to_float(q[i]);
      tmp.pages.resize((n + s.page - 1) / s.page);
      for (size_t p = 0; p < tmp.pages.size(); ++p) tmp.pages[p] = static_cast<int32_t>(p);
      Decoder<T>{s, frames, table + task * s.table_stride, 0}.attend(tmp.query.data(), n, s.page,
                                                                     target, tmp);
    }
  }
}

}  // namespace

extern "C" {

// dtype: 0 float32, 1 bfloat16, 2 float16. Strides count elements.
int vllm_sparse_rocketkv_decode(int dtype, void* cache, const void* query, const void* key,
                                const void* value, void* out, const int32_t* table,
                                const int32_t* lengths, const int32_t* last_of_request,
                                const int32_t* top_r, const int64_t* sizes, float scale,
                                int dense) {
  Shape s;
  int64_t* fields[] = {&s.tokens,       &s.kv_heads,    &s.group,        &s.dim,
                       &s.block_size,   &s.page,        &s.top_k,        &s.block_stride,
                       &s.head_stride,  &s.table_stride, &s.max_tokens,  &s.query_stride,
                       &s.out_stride,   &s.key_stride};
  for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); ++i) *fields[i] = sizes[i];
  s.scale = scale;
  if (s.dim > 1024) return 1;
#define VLLM_SPARSE_RUN(T)                                                                    \
  decode<T>(s, static_cast<T*>(cache), static_cast<const T*>(query), static_cast<const T*>(key), \
            static_cast<const T*>(value), static_cast<T*>(out), table, lengths,               \
            last_of_request, top_r, dense)
  switch (dtype) {
    case 0: VLLM_SPARSE_RUN(float); return 0;
    case 1: VLLM_SPARSE_RUN(bf16); return 0;
    case 2: VLLM_SPARSE_RUN(_Float16); return 0;
  }
#undef VLLM_SPARSE_RUN
  return 2;
}

// Frames are contiguous pages of [block_size][2 * D]; table is [tokens][kv_heads][table_stride].
int vllm_sparse_attend_frames(int dtype, void* frames, const void* query, void* out,
                              const int32_t* table, const int32_t* lengths, const int64_t* sizes,
                              float scale) {
  Shape s = {};
  int64_t* fields[] = {&s.tokens,       &s.kv_heads,   &s.group,     &s.dim, &s.block_size,
                       &s.table_stride, &s.max_tokens, &s.query_stride, &s.out_stride};
  for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); ++i) *fields[i] = sizes[i];
  s.page = s.block_size;
  s.block_stride = s.block_size * 2 * s.dim;
  s.scale = scale;
  if (s.dim > 1024) return 1;
#define VLLM_SPARSE_RUN(T)                                                             \
  attend_frames<T>(s, static_cast<T*>(frames), static_cast<const T*>(query),           \
                   static_cast<T*>(out), table, lengths)
  switch (dtype) {
    case 0: VLLM_SPARSE_RUN(float); return 0;
    case 1: VLLM_SPARSE_RUN(bf16); return 0;
    case 2: VLLM_SPARSE_RUN(_Float16); return 0;
  }
#undef VLLM_SPARSE_RUN
  return 2;
}
}
