# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The largest entries of rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.kernels import DEVICE, with_gaps
from vllm_sparse.kernels.reference import topk as ref_topk
from vllm_sparse.kernels.triton import topk

SIZES = [
    (size, kind) for size in (1, 31, 2049) for kind in ("random", "plateaus", "zeros", "equal")
]


@pytest.mark.parametrize(("size", "kind"), [*SIZES, (131072, "plateaus")])
def test_top_indices_equal_reference(size, kind):
    generator = torch.Generator().manual_seed(size)
    score = torch.randn(3, 2, size, generator=generator)
    if kind == "plateaus":
        score = torch.nn.functional.max_pool1d(score.clamp(max=1.0), 63, stride=1, padding=31)
    elif kind == "zeros":
        score = torch.where(score > 0.5, 0.0, -0.0)
    elif kind == "equal":
        score = torch.full_like(score, 0.25)
    score[0, 0, size // 2] = torch.inf
    score[1, 1, size // 3] = -torch.inf
    score = with_gaps(score.to(DEVICE), 3)
    counts = torch.tensor([max(size // 3, 1), 0, size], dtype=torch.int32, device=DEVICE)
    sizes = torch.tensor([size, size, max(size - 1, 1)], dtype=torch.int32, device=DEVICE)
    counts = counts.minimum(sizes)
    expected = ref_topk.top_indices(score, sizes, counts, size)
    assert torch.equal(topk.top_indices(score, sizes, counts, size), expected)


def test_top_indices_of_padding_rows_are_empty():
    score = torch.full((2, 2, 40), torch.nan, device=DEVICE)
    nothing = torch.tensor([-8, 0], dtype=torch.int32, device=DEVICE)
    index = topk.top_indices(score, nothing, nothing - 64, 10)
    assert torch.equal(index, torch.full_like(index, -1))
    assert topk.top_indices(score, nothing, nothing, 0).shape == (2, 2, 0)
