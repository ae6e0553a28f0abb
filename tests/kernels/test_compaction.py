# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Moving kept tokens into tails."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.kernels import DEVICE, same, with_gaps
from support.pages import PROMPTS, make_prompts, packed_views
from support.policies import make_policy
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.reference import compaction as ref_compaction
from vllm_sparse.kernels.triton import compaction

from vllm_sparse.kv.tail.codec import PageCodec
from vllm_sparse.kv.tail.compaction import compact_prompt


@pytest.mark.parametrize("shape", PROMPTS, ids=lambda s: f"{s['dim']}-{s['group']}-{s['dtype']}")
def test_compaction_equals_reference_and_the_cpu_path(shape):
    block_size, dim = shape["block_size"], shape["dim"]
    lengths = [4 * block_size + 3, 0, 3 * block_size, 2 * block_size - 1]
    gone = [2, 0, 1, 0]
    cache, table, lens, query = make_prompts(lengths, **shape)
    layout = PageLayout(block_size, dim, shape["page_size"])
    dropped = torch.tensor(gone, dtype=torch.int32, device=DEVICE)
    max_kept = max(n - d * block_size for n, d in zip(lengths, gone, strict=True)) + 5
    caches = [with_gaps(cache, 2) for _ in range(2)]
    for kernel, result in zip((ref_compaction, compaction), caches, strict=True):
        kernel.compact_prompts(result, *packed_views(result, layout), query, table, lens, dropped,
                               layout=layout, pool_kernel=5, scale=0.3,
                               max_kept=max_kept)  # fmt: skip
    assert same(*caches)

    def pack(key, value, pages):
        key_pages, value_pages = pages.chunk(2, 2)
        key_pages[0], value_pages[0] = key.transpose(0, 1), value.transpose(0, 1)

    codec = PageCodec(pack, block_size, dim, shape["dtype"], DEVICE)
    for row in (0, 2, 3):
        blocks = table[row, : -(-lengths[row] // block_size)]
        policy = make_policy(pool_kernel=5, head_dim=dim, scale=0.3)
        compact_prompt(cache, blocks, lengths[row], gone[row], query[row], reader=codec,
                       layout=layout, policy=policy)  # fmt: skip
    assert same(caches[1], cache)
