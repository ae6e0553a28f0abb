# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""ROCKETKV beside recurrent states on the GPU's path, interpreted on a CPU."""

from __future__ import annotations

import re

import pytest
from support.gpu_path import run_gpu_path
from support.masked import assert_tokens_of_hugging_face

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(("v2", "count"), [(False, 2), (True, 1)], ids=["v1", "v2"])
def test_blocks_taken_in_parts_equal_hugging_face(hybrid, prompts, v2, count):
    """Blocks of 96, which hold a state, beside it in one pool; in chunks, then decoding together.

    Without prefix caching, with which vLLM 0.32 fails on Mamba-2 layers on a CPU.
    """
    run = run_gpu_path(
        hybrid, prompts[:count], v2=v2, block_size=48, max_num_batched_tokens=200,
        enable_prefix_caching=False, new_tokens=4, further=("zeroed_parts",),
    )  # fmt: skip
    size = int(re.search(r"ROCKETKV: .* block size (\d+) in parts of 32", run["log"])[1])
    assert size == 96
    assert_tokens_of_hugging_face(hybrid, prompts[:count], run["tokens"][0], block_size=size)
    assert run["counters"]["prompts_compacted"] == count
    assert run["counters"]["blocks_evicted"] > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]
