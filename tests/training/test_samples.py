# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What one layer hands to the loss: its rows, and attention to the chosen blocks only."""

from __future__ import annotations

from dataclasses import replace

import torch
from support.training import GEOMETRY, backbone, sequences

from vllm_sparse.training.samples import SampleSource, sample_positions


def test_sparse_forward_is_dense_when_everything_is_read():
    frozen = backbone()
    tokens = sequences()[0]
    outputs = []
    for sparse, top_k in ((False, 5), (True, 8), (True, 5)):
        seen = []
        sizes = replace(GEOMETRY, top_k=top_k)
        source = SampleSource(frozen, sizes, "fine", sparse_forward=sparse, chunk=50)
        source.visit(0, tokens, lambda sample, seen=seen: seen.append(sample.inputs))
        outputs.append(seen[2])
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[2], outputs[0], atol=1e-3)


def test_sampled_rows():
    rows = sample_positions(256, 64, 8, 160, seed=3)
    assert len(rows) == len(set(rows.tolist())) == 64
    assert rows.min() >= 160
    assert rows[-8:].tolist() == list(range(248, 256))
    assert torch.equal(rows, sample_positions(256, 64, 8, 160, seed=3))
    assert not torch.equal(rows, sample_positions(256, 64, 8, 160, seed=4))
    assert len(sample_positions(256, 500, 8, 160, seed=3)) == 96
    assert torch.equal(sample_positions(9, 0, 0, 0, seed=0), torch.arange(9))
