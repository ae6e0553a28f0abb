// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// RocketKV decode attention on a CPU: append, page extrema, page scores, top-k and exact
// attention over the selection, fused so that each byte of the paged KV cache is read once and
// nothing is materialised. `kernels/reference/rocketkv.py` is the readable definition; the tests
// hold the two together.
//
// One (block, KV head) page of the cache is a contiguous run of elements:
//     [block_size][2 * D]            one row per token: its key, then its value
//     [2 * D][block_size / page]     channel-major page extrema: D rows of minima, D of maxima

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int kLanes = 16;
typedef float vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(kLanes * sizeof(uint32_t)), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4)));

struct bf16 {
  uint16_t bits;
};
typedef uint16_t bf16_vec __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(2)));
typedef _Float16 half_vec __attribute__((vector_size(kLanes * sizeof(_Float16)), aligned(2)));

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline vec load(const bf16* p) {
  bf16_vec raw = *reinterpret_cast<const bf16_vec*>(p);
  return (vec)(__builtin_convertvector(raw, uvec) << 16);
}
inline vec load(const _Float16* p) {
  return __builtin_convertvector(*reinterpret_cast<const half_vec*>(p), vec);
}

inline float to_float(float x) { return x; }
inline float to_float(_Float16 x) { return static_cast<float>(x); }
inline float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
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

// Pairwise, so that the lanes are added by shuffles instead of one by one.
inline float sum(vec v) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  const v8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

// exp for arguments <= 0: range reduction by powers of two and a degree-6 polynomial, about
// 1 ulp; flushes to zero below -87.
inline vec exp_nonpositive(vec x) {
  const vec scaled = x * 1.44269504088896341f;
  ivec n = __builtin_convertvector(scaled - 0.5f, ivec);
  n = n < -126 ? (ivec{} - 126) : n;
  const vec nf = __builtin_convertvector(n, vec);
  vec r = x - nf * 0.693359375f;
  r = r - nf * -2.12194440e-4f;
  vec p = vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vec power = (vec)((n + 127) << 23);
  const vec value = p * power;
  return x < -87.0f ? vec{} : value;
}

struct Shape {
  int64_t tokens, kv_heads, group, dim, block_size, page, top_k;
  int64_t block_stride, head_stride, table_stride, max_tokens;
  int64_t query_stride, out_stride, key_stride;
  float scale;
};

struct Scratch {
  std::vector<float> query, selected, probability, logits, partial;
  std::vector<int32_t> channels, pages;
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
    for (int64_t tile = 0; tile < stride; tile += kLanes) {
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
      ivec larger = {};
      for (int64_t i = 0; i < dim; i += kLanes) larger -= load(magnitude + i) > magnitude[j];
      int64_t rank = 0;
      for (int i = 0; i < kLanes; ++i) rank += larger[i];
      if (rank >= top_r) continue;
      for (int64_t i = 0; i < j; ++i) rank += magnitude[i] == magnitude[j];
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
      float top = -INFINITY;
      for (int64_t p = 0; p < num_pages; ++p) top = std::max(top, x[p]);
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
    if (!remainder) return full ? s.page : newest_tokens;
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
      ivec total = {};
      for (int64_t p = 0; p < padded; p += kLanes) total -= bits(p) >= threshold;
      int64_t sum = 0;
      for (int i = 0; i < kLanes; ++i) sum += total[i];
      return sum;
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
    const bool exact = at_least(low) == count;
    for (int64_t p = 0; p < n; ++p) {
      int32_t value;
      std::memcpy(&value, score + p, 4);
      if (value > low || (value == low && (exact || ties-- > 0)))
        pages.push_back(static_cast<int32_t>(p));
    }
  }

  // Exact attention of one query head tile over the tokens of tmp.pages.
  template <int G>
  void attend_heads(const float* query, int64_t num_tokens, int64_t last_page_tokens, T* out,
                    int64_t first_head, Scratch& tmp) const {
    const int64_t dim = s.dim;
    const int64_t count = static_cast<int64_t>(tmp.pages.size());
    const int64_t lanes = dim / kLanes * kLanes;
    const int64_t stride = s.max_tokens + kLanes;
    float* logits = tmp.logits.data();
    const float* q = query + first_head * dim;
    int64_t n = 0;
    auto prefetch = [&](int64_t i) {
      if (i >= count) return;
      const char* p = reinterpret_cast<const char*>(row(tmp.pages[i] * s.page));
      for (int64_t b = 0; b < s.page * 2 * dim * static_cast<int64_t>(sizeof(T)); b += 64)
        __builtin_prefetch(p + b);
    };
    auto tokens_in = [&](int64_t i) {
      const int64_t visible = std::min(s.page, num_tokens - tmp.pages[i] * s.page);
      return i + 1 == count ? std::min(visible, last_page_tokens) : visible;
    };
    for (int64_t i = 0; i < std::min<int64_t>(4, count); ++i) prefetch(i);
    for (int64_t i = 0; i < count; ++i) {
      prefetch(i + 4);
      const T* key = row(tmp.pages[i] * s.page);
      const int64_t here = tokens_in(i);
      for (int64_t t = 0; t < here; ++t, key += 2 * dim, ++n) {
        vec acc[G] = {};
        for (int64_t j = 0; j < lanes; j += kLanes) {
          const vec k = load(key + j);
          for (int g = 0; g < G; ++g) acc[g] += k * load(q + g * dim + j);
        }
        for (int g = 0; g < G; ++g) {
          float dot = sum(acc[g]);
          for (int64_t j = lanes; j < dim; ++j) dot += to_float(key[j]) * q[g * dim + j];
          logits[g * stride + n] = dot * s.scale;
        }
      }
    }
    float inverse[G];
    for (int g = 0; g < G; ++g) {
      float* x = logits + g * stride;
      float top = -INFINITY;
      for (int64_t i = 0; i < n; ++i) top = std::max(top, x[i]);
      for (int64_t i = n; i < n + kLanes; ++i) x[i] = -INFINITY;
      vec mass = {};
      for (int64_t i = 0; i < n; i += kLanes) {
        const vec e = exp_nonpositive(load(x + i) - top);
        *reinterpret_cast<vec*>(x + i) = e;
        mass += e;
      }
      inverse[g] = 1.0f / sum(mass);
    }
    float* acc = tmp.partial.data();
    std::fill(acc, acc + G * dim, 0.0f);
    for (int64_t base = 0; base < lanes; base += 4 * kLanes) {
      const int64_t width = std::min<int64_t>(4, (lanes - base) / kLanes);
      vec sums[G][4] = {};
      n = 0;
      for (int64_t i = 0; i < count; ++i) {
        const T* value = row(tmp.pages[i] * s.page) + dim + base;
        const int64_t here = tokens_in(i);
        for (int64_t t = 0; t < here; ++t, value += 2 * dim, ++n) {
          for (int64_t w = 0; w < width; ++w) {
            const vec v = load(value + w * kLanes);
            for (int g = 0; g < G; ++g) sums[g][w] += v * logits[g * stride + n];
          }
        }
      }
      for (int g = 0; g < G; ++g)
        for (int64_t w = 0; w < width; ++w)
          *reinterpret_cast<vec*>(acc + g * dim + base + w * kLanes) = sums[g][w];
    }
    if (lanes < dim) {
      n = 0;
      for (int64_t i = 0; i < count; ++i) {
        const T* value = row(tmp.pages[i] * s.page) + dim;
        const int64_t here = tokens_in(i);
        for (int64_t t = 0; t < here; ++t, value += 2 * dim, ++n)
          for (int g = 0; g < G; ++g)
            for (int64_t j = lanes; j < dim; ++j)
              acc[g * dim + j] += to_float(value[j]) * logits[g * stride + n];
      }
    }
    for (int g = 0; g < G; ++g)
      for (int64_t j = 0; j < dim; ++j)
        out[(first_head + g) * dim + j] = from_float<T>(acc[g * dim + j] * inverse[g]);
  }

  void attend(const float* query, int64_t num_tokens, int64_t last, T* out, Scratch& tmp) const {
    int64_t g = 0;
    for (; s.group - g >= 4; g += 4) attend_heads<4>(query, num_tokens, last, out, g, tmp);
    switch (s.group - g) {
      case 1: return attend_heads<1>(query, num_tokens, last, out, g, tmp);
      case 2: return attend_heads<2>(query, num_tokens, last, out, g, tmp);
      case 3: return attend_heads<3>(query, num_tokens, last, out, g, tmp);
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
  const int64_t logits = std::max(s.group * padded, std::min<int64_t>(s.group, 4) *
                                                        (s.max_tokens + 2 * kLanes));
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
    if (n > 0 && (n == last_of_request[t] || n % s.page == 0))
      Decoder<T>{s, cache, table + t * s.table_stride, h}.write_newest_page(n, tmp);
  };
#pragma omp parallel
  {
    Scratch tmp;
    tmp.query.resize(std::max<int64_t>(s.group, 2) * s.dim + kLanes);
    tmp.selected.resize(s.group * s.dim + kLanes);
    tmp.partial.resize(std::max<int64_t>(4, 2) * s.dim + kLanes);
    tmp.probability.resize(padded + kLanes);
    tmp.logits.resize(logits + kLanes);
    tmp.channels.resize(s.dim);
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
      if (dense || n <= s.top_k) {
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
}
