# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""When a prompt's tokens are timed, in an engine."""

from __future__ import annotations

import pytest

from benchmarks import arms, harness
from benchmarks.worker import Worker

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

COMPACTED = "vllm:sparse_prompts_compacted_total"


def test_the_time_to_the_second_token_holds_the_compaction(llama):
    arm = arms.parse_arm("rocket-64", {"min_context": 128})
    prompts = [[number] * 900 for number in (5, 6)]
    compacted, times = [], {}
    arguments = harness.engine_args(llama, 1024, 4096, enforce_eager=True, skip_tokenizer_init=True)
    with Worker(arm, arguments) as worker:
        for command, prompt in zip(("prefill", "first_two"), prompts, strict=True):
            times[command] = worker.call(command, prompt=prompt)
            compacted.append(worker.call("counters").get(COMPACTED, 0))
    assert compacted == [0, 1]
    first, second = times["first_two"]
    assert 0 < first < second
    assert times["prefill"] > 0


def test_what_a_prompt_counts_is_counted_with_it(llama):
    """Its last chunk too, and none of the prompt before it."""
    settings = {"top_k": 4, "init_blocks": 1, "local_blocks": 1, "dense_len": 0}
    arm = arms.parse_arm("prompts-4", settings)
    arguments = harness.engine_args(
        llama, 1024, 4096, enforce_eager=True, skip_tokenizer_init=True, max_num_seqs=1,
        max_num_batched_tokens=256, enable_prefix_caching=False,
    )  # fmt: skip
    with Worker(arm, arguments) as worker:
        worker.call("attach_clock")
        worker.call("prefill", prompt=[3] * 400)
        counters = worker.call("timed_prefill", prompt=[5] * 900)["counters"]
    blocks = sum(start // 64 for start in (0, 256, 512, 768))  # before each chunk
    heads, layers = 2, 3
    assert counters["vllm:sparse_prompt_blocks_visible_total"] == heads * layers * blocks
