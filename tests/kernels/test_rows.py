# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Planning a batch of single tokens on the device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.kernels import DEVICE
from vllm_sparse.kernels.reference import rows as ref_rows
from vllm_sparse.kernels.triton import rows as rows_kernel
from vllm_sparse.kernels.types import Rows


def make_rows(count, width, several=False):
    """Buffers that hold what an earlier step left there."""
    table = torch.full((count, width), 1 << 30, dtype=torch.int32, device=DEVICE)
    fields = ["lengths", "top_r", "parked", *["final_lengths"] * several]
    left = {name: torch.full((count,), 7, dtype=torch.int32, device=DEVICE) for name in fields}
    return Rows(table, **left)


@pytest.mark.parametrize(("window", "width"), [(8, 25), (0, 25), (8, 1100)])
def test_planned_rows_equal_reference(window, width):
    """Sparse, dense, inside the prompt, inside its window, padding; tables of two tiles."""
    generator = torch.Generator().manual_seed(0)
    rules = torch.zeros(301, 3, dtype=torch.int32)
    rules[100:, 0] = torch.arange(201) // 40
    rules[100:, 1] = torch.randint(1, 64, (201,), generator=generator)
    rules[100:, 2] = rules[100:, 0] // 2
    seq_lens = torch.tensor([0, 51, 299, 180, 201, 196, 191, 192, 200, 300, 260])
    prompts = torch.tensor([9, 50, 120, 200, 200, 200, 200, 199, 200, 299, 1000])
    table = torch.randint(1, 999, (len(seq_lens), width), generator=generator).int().to(DEVICE)
    table = with_gaps_int(table)
    arguments = [part.int().to(DEVICE) for part in (seq_lens, prompts)]
    options = {"block_size": 16, "window": window, "per_block": 3, "top_k": 90}
    results = []
    for module in (ref_rows, rows_kernel):
        rows = make_rows(len(seq_lens), width)
        counted = torch.ones(3, dtype=torch.int64, device=DEVICE)
        module.plan_rows(rows, *arguments, table, rules.to(DEVICE), counted, **options)
        results.append((*rows, counted))
    for expected, actual in zip(*results, strict=True):
        assert expected is actual is None or torch.equal(expected, actual)
    table_out, lengths, top_r, parked, _, counted = results[1]
    assert lengths.tolist()[:5] == [0, 51, 299, 180, 201 - 2 * 16]
    assert top_r.bool().tolist() == [False, False, True, False, True, *[False] * 3, False, True,
                                     False]  # fmt: skip
    assert int(table_out[4, 0]) == int(table[4, 2])
    window_rows = [5, 7, 8] if window else []
    assert (parked >= 0).nonzero()[:, 0].tolist() == window_rows
    assert counted.tolist() == [1 + 3, 1 + 299 + 201 + 300, 1 + 3 * 90]


@pytest.mark.parametrize("module", [ref_rows, rows_kernel])
def test_several_tokens_of_a_request_are_rows_of_their_own(module):
    """Each as if it came alone, with its request's last length; tokens behind are padding."""
    generator = torch.Generator().manual_seed(0)
    rules = torch.zeros(301, 3, dtype=torch.int32)
    rules[100:] = torch.tensor([2, 5, 1])
    counts, lens, prompts = [3, 1, 4, 2, 0, 3], [230, 150, 200, 60, 0, 203], [200, 149, 200, 50, 0]
    prompts.append(200)
    table = torch.randint(1, 999, (6, 25), generator=generator).int()
    start = torch.tensor([0, *counts]).cumsum(0).int()
    options = {"block_size": 16, "window": 8, "per_block": 3, "top_k": 90}
    fixed = [part.to(DEVICE) for part in (table, rules)]
    rows, counted = make_rows(15, 25, several=True), torch.zeros(3, dtype=torch.int64).to(DEVICE)
    length, prompt = (torch.tensor(part).int().to(DEVICE) for part in (lens, prompts))
    module.plan_rows(rows, length, prompt, *fixed, counted, **options, query_start=start.to(DEVICE))

    owner = [row for row, count in enumerate(counts) for _ in range(count)]
    single = [lens[row] - (int(start[row + 1]) - 1 - t) for t, row in enumerate(owner)]
    alone, counts_alone = make_rows(13, 25), torch.zeros_like(counted)
    one = torch.tensor(single).int().to(DEVICE)
    ref_rows.plan_rows(
        alone, one, prompt[owner], fixed[0][owner], fixed[1], counts_alone, **options
    )
    for name in ("block_table", "lengths", "top_r", "parked"):
        assert torch.equal(getattr(rows, name)[:13], getattr(alone, name))
    gone = torch.tensor([2 * 16 if n > prompts[row] >= 100 else 0
                         for n, row in zip(single, owner, strict=True)])  # fmt: skip
    assert rows.final_lengths[:13].tolist() == (torch.tensor(lens)[owner] - gone).tolist()
    assert rows.lengths[13:].tolist() == rows.final_lengths[13:].tolist() == [0, 0]
    assert rows.parked[13:].tolist() == [-1, -1]
    assert torch.equal(counted, counts_alone)


def with_gaps_int(table: torch.Tensor) -> torch.Tensor:
    wide = torch.full((len(table), table.shape[1] + 3), -5, dtype=table.dtype, device=DEVICE)
    return wide[:, : table.shape[1]].copy_(table)
