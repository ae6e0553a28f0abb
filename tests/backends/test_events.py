# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""KV events of engines with SPARDA beside those that stock vLLM publishes for the same requests."""

from __future__ import annotations

import json

import pytest
from support.engine import BLOCK_SIZE, run_engine
from support.masked_sparda import run_sparda
from support.stand_ins import EVENTS

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

POOL = 48  # blocks, of which three requests want more


def published(run, model, prompts, path, **options):
    """Events of an engine, in order, and what it did."""
    done = run(
        model, prompts, waves=2, max_num_batched_tokens=100, stand_ins=("noted_events",),
        kv_events_config={"enable_kv_cache_events": True}, max_num_seqs=6,
        env={EVENTS: str(path), "PYTHONHASHSEED": "0"}, **options,
    )  # fmt: skip
    return [json.loads(line) for line in path.read_text().splitlines()], done


def test_sparda_s_are_stock_s_where_outputs_are_shared_too(llama, prompts, tmp_path):
    """Everything is read, so that outputs are the same; blocks leave the cache, and requests."""
    shared = {"new_tokens": 60, "num_gpu_blocks_override": POOL}
    ours, run = published(
        run_sparda, llama, prompts[:3], tmp_path / "ours", selector="query", sparse_prefill=True,
        top_k=64, slab_gib=0.02, **shared,
    )  # fmt: skip
    theirs, stock = published(
        run_engine, llama, prompts[:3], tmp_path / "stock", block_size=BLOCK_SIZE, **shared
    )
    assert run["tokens"] == stock["tokens"]
    assert run["preemptions"] == stock["preemptions"] > 0
    assert ours == theirs
    assert {event["type"] for event in ours} == {"BlockStored", "BlockRemoved"}


def test_sparda_tells_of_prompts_as_stock_does_and_of_sparse_outputs_nothing(
    llama, prompts, tmp_path
):
    ours, run = published(run_sparda, llama, prompts[:3], tmp_path / "ours", selector="query")
    theirs, _ = published(run_engine, llama, prompts[:3], tmp_path / "stock", block_size=BLOCK_SIZE)
    assert min(run["cached"][1]) > 0
    ours, theirs = (_blocks(events) for events in (ours, theirs))
    whole = {
        tuple(prompt[:end])
        for prompt in prompts[:3]
        for end in range(BLOCK_SIZE, len(prompt) + 1, BLOCK_SIZE)
    }
    assert ours == [block for block in theirs if block[1] in whole]
    assert {text for _, text in ours} == whole != {text for _, text in theirs}


def _blocks(events):
    """Of every block that is stored its hash and the text up to its end; nothing is removed."""
    found, texts = [], {None: ()}
    for event in events:
        size, parent, tokens = (
            event[key] for key in ("block_size", "parent_block_hash", "token_ids")
        )
        assert (event["type"], size) == ("BlockStored", BLOCK_SIZE)
        for index, block in enumerate(event["block_hashes"]):
            texts[block] = (*texts[parent], *tokens[index * size : (index + 1) * size])
            found.append((block, texts[block]))
            parent = block
    return found
