# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a router hears of SPARDA's prefix cache, beside what it hears of stock vLLM's."""

from __future__ import annotations

import pytest
from support.scheduler import Machine, follow_events, random_lives

from vllm_sparse.policies.sparda import SpardaSettings

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

BLOCK = 32
SEEDS = (0, 1, 2, 3, 4, 6, 7)  # of traffic in which somebody is preempted
SIZES = {
    "selector": "query", "block_size": BLOCK, "kernel_stride": 16, "local_blocks": 1, "top_k": 4,
    "dense_len": 0,
}  # fmt: skip


def lives(llama, seed, **kind):
    """Prompts and events of a machine with a seed's traffic; several steps may be under way."""
    policy = "priority" if seed % 2 else "fcfs"
    machine = Machine(
        llama, blocks=24 + 4 * (seed % 3), ahead=seed // 2 % 2, seed=seed, block=BLOCK,
        scheduling_policy=policy, **kind,
    )  # fmt: skip
    _, events = follow_events(machine)
    add, prompts = machine.add, []

    def noted(prompt, *args):
        prompts.append(tuple(prompt))
        return add(prompt, *args)

    machine.add = noted
    random_lives(machine)
    assert {event[0] for event in events} == {"BlockStored", "BlockRemoved"}
    return prompts, events


@pytest.mark.parametrize("seed", SEEDS)
def test_events_are_stock_s_where_outputs_are_shared_too(llama, seed):
    """In the same order, with the same parents and tokens."""
    alike = SpardaSettings(**SIZES, sparse_prefill=True)
    assert lives(llama, seed, sparda=alike) == lives(llama, seed, stock=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_of_prompts_all_whole_blocks_are_told_of_and_of_outputs_none(llama, seed):
    prompts, events = lives(llama, seed, sparda=SpardaSettings(**SIZES))
    texts = {None: ()}
    for name, block, *further in events:
        if name == "BlockStored":
            parent, *tokens = further
            texts[block] = (*texts[parent], *tokens)
    shared = {prompt[:end] for prompt in prompts for end in range(BLOCK, len(prompt) + 1, BLOCK)}
    assert set(texts.values()) <= {(), *shared}
    assert len(texts) > 0.8 * len(shared), "all but those of requests that left early"
