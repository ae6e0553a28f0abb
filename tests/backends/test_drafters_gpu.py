# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Drafters with layers on the GPU's path, interpreted on a CPU; compared with the CPU's path."""

from __future__ import annotations

import pytest
from reference.random_models import save_random_model
from support.drafters import DRAFTS, drafts, save_knowing_eagle
from support.engine import BLOCK_SIZE, EVERYTHING, SETTINGS, run_engine
from support.gpu_path import run_gpu_path

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

TOKENS = 16


@pytest.mark.parametrize(
    ("v2", "chunk", "settings"),
    [(False, 202, EVERYTHING), (True, 101, SETTINGS)],
)
def test_heads_are_accepted_as_on_cpus(prompts, tmp_path, v2, chunk, settings):
    """All is kept and read, but compacted; or evicted, by the head's own votes in its layer.

    Of 607 tokens the last comes alone in chunks of 101. Random attention is flat: without what is
    evicted, a head that knows its model says something else than the model.
    """
    model = save_random_model(tmp_path / "model", layers=1)
    head = save_knowing_eagle(tmp_path / "eagle", model)
    shared = {
        "settings": settings,
        "speculative_config": drafts(head, "eagle"),
        "new_tokens": TOKENS,
    }
    plain = run_engine(model, prompts[1:2], block_size=BLOCK_SIZE, **shared)
    further = ("loose_lengths", *(("profiled_graphs", "no_read_backs") if v2 else ()))
    run = run_gpu_path(
        model, prompts[1:2], v2=v2, further=further, max_num_batched_tokens=chunk, **shared
    )
    assert run["tokens"] == plain["tokens"]
    assert run["drafted"] - run["accepted"] <= plain["drafted"] - plain["accepted"] + DRAFTS
    evicts = settings is SETTINGS
    assert run["accepted"] > (0 if evicts else TOKENS // 2)
    assert (run["counters"]["blocks_evicted"] > 0) == evicts
    assert run["free_blocks"][0] == run["free_blocks"][1]
