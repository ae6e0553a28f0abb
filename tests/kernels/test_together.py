# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""All Triton kernels of policies: they compile without a GPU, and nothing compiles twice."""

from __future__ import annotations

import collections
import re
import sys

import pytest
import torch

pytest.importorskip("triton")

from support.ahead_of_time import compile_only, compiled, name_only
from support.pages import packed_views
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.triton import compaction
from vllm_sparse.kernels.triton import decode as decode_kernel
from vllm_sparse.kernels.triton import rows as rows_kernel
from vllm_sparse.kernels.types import Rows


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu(capability, triton_cache):
    lines = compiled(__file__, capability, triton_cache)
    names = {line.split()[0] for line in lines}
    assert len(names) == 11, names
    most = 166912 if capability == 80 else 232448  # shared memory that one program may have
    assert all(int(line.split()[1]) <= most for line in lines), lines
    # What gathers rows or channels overlaps that with math, and fits into sm_86 and sm_89 as well.
    gathering = [line.split() for line in lines if re.match("_select_slots|_attend", line)]
    assert len(gathering) >= 9, lines
    assert all(int(shared) <= 101376 and int(copies) > 0 for _, shared, copies in gathering), lines


def compile_everything(capability: int) -> None:
    """Launch every kernel, and those of decode with large heads too."""
    compile_only(capability)
    for dtype in (torch.bfloat16, torch.float32):
        layout = PageLayout(64, 256, 4)
        cache = torch.zeros(9, 2, 64, 2 * 256 + 2 * 64, dtype=dtype)
        query, key = torch.zeros(3, 8, 256, dtype=dtype), torch.zeros(3, 2, 256, dtype=dtype)
        table, lengths = torch.zeros(3, 8, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
        decode_kernel.decode_attention(cache, query, key, key, query, table, lengths, lengths,
                                       lengths, layout=layout, top_k=128, scale=0.1)  # fmt: skip
    layout = PageLayout(64, 128, 4)
    cache = torch.zeros(9, 2, 64, 2 * 128 + 2 * 32, dtype=torch.bfloat16)
    query, key = torch.zeros(3, 8, 128).bfloat16(), torch.zeros(3, 2, 128).bfloat16()
    table, lengths = torch.zeros(3, 8, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    rows = Rows(table, lengths, lengths, lengths)
    rules, counted = torch.zeros(9, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    for planned, start in ((rows, None), (rows._replace(final_lengths=lengths), lengths)):
        rows_kernel.plan_rows(planned, lengths, lengths, table, rules, counted, block_size=64,
                              window=32, per_block=8, top_k=128, query_start=start)  # fmt: skip
    alone = {"replays": False, "parked": lengths, "per_block": 8}
    learned = {"sinks": torch.zeros(8).bfloat16()}
    for options in ({}, {"replays": False, "read_all": True}, alone, learned):
        decode_kernel.decode_attention(
            cache, query, key, key, query, table, lengths, lengths, lengths, layout=layout,
            top_k=128, scale=0.1, **options,
        )  # fmt: skip
    window = torch.zeros(3, 8, 32, 128).bfloat16()
    compaction.compact_prompts(cache, *packed_views(cache, layout), window, table, lengths, lengths,
                             layout=layout, pool_kernel=63, scale=0.1, max_kept=300)  # fmt: skip


def test_no_shape_of_a_batch_compiles_another_kernel(triton_cache):
    """Batches and prompts of any size run what the first one compiled."""
    lines = compiled(__file__, "variants", triton_cache)
    counts = collections.Counter(line.split()[0] for line in lines)
    assert len(counts) == 11, counts
    # Tokens and extrema are written by two launches or by one; rows share blocks or do not.
    several = {"_append_kernel": 3, "_select_slots_kernel": 2}
    expected = {name: several.get(name, 1) for name in counts}
    assert counts == expected, lines


def launch_many_shapes() -> None:
    """What changes from step to step: rows and the width of their table; and prompt by prompt."""
    name_only()
    layout = PageLayout(64, 128, 4)
    cache = torch.zeros(9, 2, 64, 2 * 128 + 2 * 32, dtype=torch.bfloat16)
    rules, counted = torch.zeros(9, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    for count in (1, 2, 3, 16, 17, 160, 600):
        fused = torch.zeros(count, 12 * 128).bfloat16()
        query, key, value = (
            part.unflatten(1, (-1, 128)) for part in fused.split([8 * 128, 256, 256], 1)
        )
        lengths = torch.zeros(count, dtype=torch.int32)
        for width in (1, 2, 15, 16, 17, 160, 2048):
            table = torch.zeros(count, width, dtype=torch.int32)
            rows = Rows(table, lengths, lengths, lengths)
            rows_kernel.plan_rows(rows, lengths, lengths, table, rules, counted, block_size=64,
                                  window=32, per_block=8, top_k=128)  # fmt: skip
            for options in ({}, {"replays": False}):
                decode_kernel.decode_attention(
                    cache, query, key, value, torch.zeros_like(query), table, lengths, lengths,
                    lengths, layout=layout, top_k=512, scale=0.1, **options,
                )  # fmt: skip
    for count, length in ((1, 100), (1, 6544), (2, 4096), (3, 12345), (1, 131072)):
        window = torch.zeros(count, 8, 32, 128).bfloat16()
        width = -(-length // 64)
        # Rows of a step's table, which start wherever its width puts them.
        table = torch.zeros(count + 1, width + width % 2 + 2, dtype=torch.int32)[1:, :width]
        lengths = torch.zeros(count, dtype=torch.int32)
        compaction.compact_prompts(cache, *packed_views(cache, layout), window, table, lengths,
                                 lengths, layout=layout, pool_kernel=63, scale=0.1,
                                 max_kept=length // 2 + 3)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "variants":
        launch_many_shapes()
    else:
        compile_everything(int(sys.argv[1]))
