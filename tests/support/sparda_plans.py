# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Batches of SPARDA and their plans."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm_sparse.kernels.types import Blocks, Ranking

from support.kernels import REFERENCE
from vllm_sparse.policies.sparda import SpardaSettings
from vllm_sparse.steps.host import SpardaPlanner

if TYPE_CHECKING:
    from vllm_sparse.steps.host_step import SpardaStep

NUM_BLOCKS = 200


class Row(NamedTuple):
    """One request's part of a step."""

    start: int
    count: int
    prompt_len: int
    blocks: list[int]
    dense: bool = False

    @property
    def end(self) -> int:
        return self.start + self.count


def plan(
    options: SpardaSettings,
    rows: list[Row],
    garbage: list[int] | None = None,
    split_fresh: bool = False,
    replayed: list[bool] | None = None,
) -> tuple[SpardaStep, Counter]:
    """The step and what was counted.

    Args:
        options: Settings.
        rows: The batch.
        garbage: What stands in the block table beyond each row's blocks.
        split_fresh: See the planner.
    """
    counts: Counter = Counter()

    def count(name: str, amount: float, reason: str = "") -> None:
        counts[name, reason] += amount

    width = max(len(row.blocks) for row in rows) + 2
    filler = itertools.cycle(garbage or [0])
    table = [row.blocks + [next(filler) for _ in range(width - len(row.blocks))] for row in rows]
    starts = list(itertools.accumulate((row.count for row in rows), initial=0))
    step = SpardaPlanner(options, NUM_BLOCKS, count, split_fresh).plan(
        torch.tensor(starts).int(),
        torch.tensor([row.end for row in rows]).int(),
        torch.tensor([row.prompt_len for row in rows]).int(),
        torch.tensor(table).int(),
        dense=asked_to_be_dense(rows),
        replayed=None if replayed is None else torch.tensor(replayed),
    )
    return step, counts


def asked_to_be_dense(rows: list[Row]) -> torch.Tensor | None:
    asked = torch.tensor([row.dense for row in rows])
    return asked if bool(asked.any()) else None


def simple(**changes) -> SpardaSettings:
    return SpardaSettings(
        **{
            "selector": "query",
            "block_size": 8,
            "kernel_stride": 2,
            "local_blocks": 1,
            "top_k": 4,
            "dense_len": 0,
            "staging_blocks": 2,
            **changes,
        }
    )


def assert_tokens(found, mine, tokens, rows, size) -> None:
    """Tokens and the ones before them."""
    assert found.index.tolist() == [tokens.index(token) for token in mine]
    assert found.positions.tolist() == [p for _, p in mine]
    slots = [rows[r].blocks[p // size] * size + p % size for r, p in tokens]
    for at, (r, p) in enumerate(mine):
        slot = rows[r].blocks[(p - 1) // size] * size + (p - 1) % size if p else -1
        before = slots.index(slot) if slot in slots else -1  # another row's, if they share it
        assert found.previous_index[at] == before
        if p:
            assert found.previous_blocks[at] == rows[r].blocks[(p - 1) // size]


def what_kernels_choose(step, options):
    """The selection of decode rows, of which not every score is known."""
    compressed = torch.zeros(NUM_BLOCKS, 1, options.block_size // options.kernel_stride, 4)
    vectors = torch.zeros(len(step.decode.framed), 1, 4) if step.decode.scored else None
    blocks = Blocks(
        options.block_size, options.kernel_stride, options.init_blocks, options.local_blocks,
        options.blocks_read,
    )  # fmt: skip
    return REFERENCE.select_blocks(
        compressed, vectors, step.decode.table, step.decode.framed, Ranking(False), blocks,
        dense_len=options.dense_len,
    )  # fmt: skip
