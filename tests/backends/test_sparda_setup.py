# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a worker of SPARDA says at its start, without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_sparse.kv.host.geometry import Geometry
from vllm_sparse.policies.sparda import SpardaSettings

pytest.importorskip("vllm")


def line(frames, **settings):
    """The line of one layer with eight blocks."""
    from vllm_sparse.backends.sparda_setup import start_line

    geometry = Geometry(1, 8, 1, 64, 128, 2, (frames,))
    pager = SimpleNamespace(geometry=geometry, host=torch.empty(0))
    runtime = SimpleNamespace(
        settings=SpardaSettings(**settings), pager=pager, selector=SimpleNamespace(ahead=False),
        stream=SimpleNamespace(nbytes=0), kernels=SimpleNamespace(name="reference"),
    )  # fmt: skip
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
    )
    return start_line(runtime, config)


def test_a_slab_that_holds_the_pool_says_what_a_larger_pool_would_cost():
    """On a GPU the slab may be start-up's own choice, and all of the device."""
    said = line(8, slab_gib=1.0)
    assert "the slab holds the whole pool" in said
    assert "a larger host_gib keeps more" in said
    assert "is fetched from host memory" in said
    assert "lower it, or set slab_gib" in line(8)
    assert "fetched when a layer runs" in line(7, slab_gib=1.0)
