# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Prompt lengths are read back from a device when a request is new, and only then."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

STALE = 7777


def step(rows, *, padding=0):
    """Rows are ``(index, start, tokens, prompt length)``, as the runner describes them."""
    index, start, tokens, prompt = (np.array(column) for column in zip(*rows, strict=True))
    ends = torch.from_numpy(start + tokens)
    return SimpleNamespace(
        num_reqs=len(rows) + padding,
        req_idx=index,
        query_start_loc_cpu=torch.tensor([0, *np.cumsum(tokens)] + [int(tokens.sum())] * padding),
        seq_lens_cpu_upper_bound=torch.cat((ends, torch.zeros(padding, dtype=torch.int64))),
        is_prefilling=torch.from_numpy(start < prompt),
        rswa_prefix_lens=torch.from_numpy(prompt).int(),
    )


def test_only_new_requests_are_read_back():
    from vllm_sparse.backends.base import KnownPrompts

    known = KnownPrompts(8, waits=True)

    def read(*rows, stale=False, padding=0):
        common = step(rows, padding=padding)
        if stale:  # as if it were never looked at
            common.rswa_prefix_lens.fill_(STALE)
        lengths, new = known.read(common)
        return lengths.tolist(), new

    assert read((3, 0, 100, 250)) == ([250], True)
    assert read((3, 100, 100, 250), stale=True) == ([250], False)
    assert read((3, 200, 50, 250), (0, 64, 30, 90)) == ([250, 90], True)
    # Decoding, in another order, with a padding row; then one row rests for a step.
    assert read((0, 94, 1, 90), (3, 250, 1, 250), stale=True, padding=2) == ([90, 250, 0, 0], False)
    assert read((0, 95, 1, 90), stale=True) == ([90], False)
    assert read((3, 251, 1, 250), (0, 96, 1, 90), stale=True) == ([250, 90], False)
    # Another request with a known index: it goes on elsewhere, or is prefilling where the last one
    # was not.
    assert read((3, 0, 10, 20)) == ([20], True)
    assert read((0, 97, 3, 100)) == ([100], True)
    assert read((0, 100, 1, 100), (3, 10, 10, 20), stale=True) == ([100, 20], False)
    # Preempted and replayed from its start, or from a cached block on.
    assert read((3, 0, 20, 20)) == ([20], True)


def test_where_nothing_waits_every_step_is_read():
    from vllm_sparse.backends.base import KnownPrompts

    known = KnownPrompts(8, waits=False)
    for prompt in (250, 251):
        lengths, new = known.read(step([(3, 100, 1, prompt)]))
        assert (lengths.tolist(), new) == ([prompt], True)
