# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Attention over slots in Triton."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.kernels import DEVICE, close, with_gaps
from support.pages import batch_on_device
from vllm_sparse.kernels.reference import attention as ref_attention
from vllm_sparse.kernels.triton import attention


@pytest.mark.usefixtures("_splitting_rows")
@pytest.mark.parametrize("listed", [True, False])
def test_attention_over_slots_equals_reference(listed):
    batch = batch_on_device(rows=3, group=3, dim=80, longest=190)
    lengths = batch.lengths - 1
    lengths[1] = 0
    top_k = 133
    slots = None
    if listed:
        generator = torch.Generator().manual_seed(0)
        slots = torch.full((3, 2, top_k), 1 << 30, dtype=torch.int32)
        for row in range(3):
            count = min(int(lengths[row]), top_k)
            for head in range(2):
                token = torch.randperm(int(lengths[row]), generator=generator)[:count]
                block = batch.table[row].cpu().long()[token // 32]
                slots[row, head, :count] = block * 32 + token % 32
        slots = slots.to(DEVICE)
    outputs = [with_gaps(torch.empty_like(batch.query.contiguous()), 2) for _ in range(2)]
    for kernel, output in zip((ref_attention, attention), outputs, strict=True):
        kernel.attend_slots(batch.cache, batch.query, output, slots, batch.table, lengths,
                            batch.top_r, layout=batch.layout, top_k=top_k, scale=0.2)  # fmt: skip
    close(outputs[1], outputs[0], torch.float32)
    assert not outputs[1][1].any()
