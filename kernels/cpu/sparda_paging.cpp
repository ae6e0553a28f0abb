// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// The page table of SparDA's device slab, and the copies that fill it, on a CPU.
// `kernels/reference/sparda_paging.py` is the readable definition.

#include <cstdint>
#include <cstring>

extern "C" {

// The members of PageTable, in order, and how many frames there are.
struct SpardaPageTable {
  int32_t* frame_of;
  int64_t* piece_of;
  int64_t* last_use;
  uint8_t* recent;
  int64_t* hand;
  int64_t num_frames;
};

// Looks the wanted pieces up and gives a frame to each that has none, by a clock hand that passes
// over frames of this step. counters: hits, misses, 1 if every frame is in use in this step.
void vllm_sparse_resolve(const int32_t* wanted, const int64_t* step, int64_t* counters,
                         int32_t* frames, int32_t* missing, int32_t* targets, int32_t* misses,
                         int64_t count, const SpardaPageTable* table) {
  const SpardaPageTable t = *table;
  const int64_t now = *step;
  int64_t hits = 0, absent = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t frame = wanted[i] < 0 ? -1 : t.frame_of[wanted[i]];
    frames[i] = frame;
    absent += wanted[i] >= 0 && frame < 0;
    if (frame < 0) continue;
    hits += t.last_use[frame] != now;
    t.last_use[frame] = now;
    t.recent[frame] = 1;
  }
  int32_t taken = 0;
  bool full = false;
  for (int64_t i = 0; absent && i < count; ++i) {
    const int32_t piece = wanted[i];
    if (piece < 0 || frames[i] >= 0) continue;
    --absent;
    if (t.frame_of[piece] < 0 && !full) {
      int64_t frame = 0;
      for (int64_t tries = 0;; ++tries) {
        full = tries > 2 * t.num_frames;
        if (full) break;
        frame = *t.hand;
        *t.hand = frame + 1 == t.num_frames ? 0 : frame + 1;
        if (t.last_use[frame] == now) continue;
        if (t.piece_of[frame] < 0 || !t.recent[frame]) break;
        t.recent[frame] = 0;
      }
      if (!full) {
        if (t.piece_of[frame] >= 0) t.frame_of[t.piece_of[frame]] = -1;
        t.piece_of[frame] = piece;
        t.frame_of[piece] = static_cast<int32_t>(frame);
        t.last_use[frame] = now;
        t.recent[frame] = 1;
        missing[taken] = piece;
        targets[taken++] = static_cast<int32_t>(frame);
      }
    }
    frames[i] = t.frame_of[piece];
  }
  *misses = taken;
  counters[0] += hits;
  counters[1] += taken;
  counters[2] += full;
}

// Copies pieces of `bytes` bytes each between two arrays of pieces.
void vllm_sparse_copy(char* target, const int32_t* target_index, const char* source,
                      const int32_t* source_index, const int32_t* count, int64_t bytes) {
  for (int32_t i = 0; i < *count; ++i)
    std::memcpy(target + target_index[i] * bytes, source + source_index[i] * bytes, bytes);
}
}
