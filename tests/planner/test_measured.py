# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What ``vllm-sparse plan`` says, held to what was counted in engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.published import result
from vllm_sparse.planner.devices import CPU
from vllm_sparse.planner.model import Model
from vllm_sparse.planner.plan import Question, answer

GIB = 1 << 30
NAMES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip
SIZES = {
    "smollm2": (30, 576, 1536, 9, 3, 49152, 8192),
    "qwen": (24, 896, 4864, 14, 2, 151936, 32768),
}


def planned(model, backend, tokens, output, settings, requests=1, pool=4 * GIB):
    config = {
        "architectures": ["LlamaForCausalLM"], **dict(zip(NAMES, SIZES[model], strict=True))
    }  # fmt: skip
    question = Question(
        Model(Path("/nowhere"), config, tokens + output), model, tokens, output, requests, CPU,
        0, 64 * GIB, kv_bytes=pool, settings=settings,
    )  # fmt: skip
    found = answer(question, backend)
    assert not found.refused
    return found


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("sparda-memory", "sparda-96-local-32"),
        ("sparda-memory", "sparda-32"),
        ("sparda-memory-qwen-32k", "sparda-32"),
    ],
)
def test_device_bytes_are_those_of_live_tensors(file, name):
    """Stock's blocks; SPARDA's compressed keys and the frames of a step."""
    (cell,) = result(file)["cells"]
    measured = cell["arms"][name]
    tokens = measured["measured"]["blocks"] * measured["measured"]["block_tokens"]
    ours = planned(cell["model"], "SPARDA", tokens - 1, 1, measured["settings"])
    assert ours.request_bytes == sum(measured["parts"][of] for of in ("compressed_keys", "frames"))
    assert ours.request_host_bytes == measured["host_bytes"]
    stock = planned(cell["model"], "dense", cell["tokens"] - 1, 1, {})
    assert stock.request_bytes == cell["arms"]["dense"]["device_bytes"]


def test_requests_of_a_pool_are_those_that_ran():
    """The mean over an answer lies between the blocks of its first and of its last token."""
    found = result("capacity")
    prompt, output, blocks = (
        found[key] for key in ("prompt_tokens", "generated_tokens", "pool_blocks")
    )
    memory = blocks * planned("smollm2", "dense", prompt, output, {}).block_bytes
    for arm in found["arms"].values():
        backend, settings = ("ROCKETKV", arm["settings"]) if arm["settings"] else ("dense", {})
        ours = planned("smollm2", backend, prompt, output, settings, found["requests"], memory)
        assert ours.pool_blocks == arm["pool_blocks"]
        if backend == "dense":
            assert ours.fits == int(arm["log"]["maximum_concurrency"])
            assert ours.fits <= arm["peak_running"]  # the last were preempted
        else:
            assert ours.fits == arm["peak_running"]
            held = arm["blocks_per_decoding_request"]
            assert ours.request_blocks - 1 <= held <= ours.request_blocks
