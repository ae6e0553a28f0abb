// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The vllm-sparse authors
//
// The page table of SparDA's device slab, and the copies that fill it, on a CPU.
// `kernels/reference/paging.py` is the readable definition.

#include <cstdint>
#include <cstring>

extern "C" {

// Looks the wanted pieces up and gives a frame to each that has none, by a clock hand that passes
// over frames of this step. counts: resident pieces (each counted once), pieces to fetch.
// Returns 1 if every frame is in use in this step.
int vllm_sparse_resolve(int32_t* frame_of, int64_t* piece_of, int64_t* last_use, uint8_t* recent,
                        int64_t num_frames, int64_t* hand, int64_t step, const int64_t* pieces,
                        int64_t wanted, int32_t* frames, int64_t* missing, int64_t* targets,
                        int64_t* counts) {
  counts[0] = counts[1] = 0;
  for (int64_t i = 0; i < wanted; ++i) {
    frames[i] = -1;
    if (pieces[i] < 0) continue;
    const int32_t frame = frame_of[pieces[i]];
    if (frame < 0) continue;
    counts[0] += last_use[frame] != step;
    last_use[frame] = step;
    recent[frame] = 1;
    frames[i] = frame;
  }
  for (int64_t i = 0; i < wanted; ++i) {
    const int64_t piece = pieces[i];
    if (piece < 0 || frames[i] >= 0) continue;
    if (frame_of[piece] < 0) {
      int64_t tries = 0;
      int64_t frame;
      for (;; ++tries) {
        if (tries > 2 * num_frames) return 1;
        frame = *hand;
        *hand = (*hand + 1) % num_frames;
        if (last_use[frame] == step) continue;
        if (piece_of[frame] < 0 || !recent[frame]) break;
        recent[frame] = 0;
      }
      if (piece_of[frame] >= 0) frame_of[piece_of[frame]] = -1;
      piece_of[frame] = piece;
      frame_of[piece] = static_cast<int32_t>(frame);
      last_use[frame] = step;
      recent[frame] = 1;
      missing[counts[1]] = piece;
      targets[counts[1]++] = frame;
    }
    frames[i] = frame_of[piece];
  }
  return 0;
}

// Copies pieces of `bytes` bytes each between two arrays of pieces.
void vllm_sparse_copy(char* target, const int64_t* target_index, const char* source,
                      const int64_t* source_index, int64_t count, int64_t bytes) {
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(target + target_index[i] * bytes, source + source_index[i] * bytes, bytes);
}
}
