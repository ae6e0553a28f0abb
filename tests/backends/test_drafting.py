# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Passes of a drafter: whose tokens are dense, and which queries of windows wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("vllm")
from support.policies import make_policy

from vllm_sparse.backends import drafting
from vllm_sparse.backends.drafting import note_rows, rows_of_pass, with_waiting_queries
from vllm_sparse.control import AS_SET, DENSE
from vllm_sparse.errors import IntegrityError
from vllm_sparse.policies.quest import Quest
from vllm_sparse.steps.split import StepMetadata, StepPlanner

PROMPT, WINDOW = 300, 8


class Row(NamedTuple):
    """A request with a prompt of 300 tokens.

    Tokens after the model's pass; then of the drafter's pass, positions of its tokens.
    """

    ends: int
    first: int
    length: int
    control: int = AS_SET

    @property
    def beyond(self) -> bool:
        """It has a token that the model has not seen, before the prompt is compacted."""
        return self.ends <= PROMPT < self.length or self.ends < self.length <= PROMPT

    @property
    def waits(self) -> range:
        """Positions of the window that the model has computed, of those in the pass."""
        computed = range(self.first, self.ends) if self.control == AS_SET else ()
        found = [p for p in computed if PROMPT - WINDOW <= p < PROMPT]
        return range(found[0], found[-1] + 1) if found and self.beyond else range(0)


ROWS = [
    Row(340, 340, 341),  # it decodes
    Row(300, 260, 301),  # its prompt has ended, and one token more is drafted with the last chunk
    Row(300, 301, 302),  # the pass behind that
    Row(300, 300, 301),
    Row(200, 160, 201),  # a chunk, and the token behind it
    Row(292, 252, 293),  # the window begins with that one
    Row(296, 256, 297),
    Row(298, 294, 299),
    Row(300, 260, 300),  # nothing beyond
    Row(300, 260, 301, DENSE),
]


def batch(rows, padding=0):
    counts = [row.length - row.first for row in rows] + [0] * padding
    return SimpleNamespace(
        num_reqs=len(counts), query_start_loc_cpu=torch.tensor([0, *counts]).cumsum(0).int(),
        block_table_tensor=torch.arange(len(counts) * 32).view(-1, 32).int(),
    )  # fmt: skip


def lengths_of(rows, padding=0):
    return torch.tensor([row.length for row in rows] + [0] * padding).int()


def note(rows):
    """The model's pass; what it is told of is changed behind it."""
    asked = torch.tensor([row.control for row in rows]).int()
    told = torch.tensor([row.ends for row in rows]).int(), torch.full((len(rows),), PROMPT).int()
    note_rows(*told, asked if asked.any() else None)
    for tensor in (*told, asked):
        tensor.fill_(7)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:-1]], ids=["some asked", "nobody asked"])
def test_tokens_beyond_the_model_s_are_dense_and_queries_before_them_wait(monkeypatch, rows):
    monkeypatch.setattr(drafting, "_rows", None)
    note(rows)
    planner = StepPlanner(make_policy())
    controls = [DENSE if row.beyond else row.control for row in rows]
    parking = [row.beyond and row.first < row.ends for row in rows]
    for padding in (1, 0):  # that of graphs
        common, lengths = batch(rows, padding), lengths_of(rows, padding)
        found = rows_of_pass(planner.policy, common, lengths)
        assert found.prompt_lens.tolist() == [PROMPT] * len(rows) + [0] * padding
        assert found.controls.tolist() == controls + [AS_SET] * padding
        assert found.parking.tolist() == parking + [False] * padding

    step = with_waiting_queries(StepMetadata(3, None), planner, common, lengths, found)
    expected = []
    for number, row in enumerate(rows):
        shift = int(common.query_start_loc_cpu[number]) - row.first
        if waits := row.waits:
            parked = waits[0] - (PROMPT - WINDOW)
            expected.append((number, waits[0] + shift, waits[-1] + 1 + shift, parked, False))
    assert len(expected) == 3
    assert [
        (int(x.blocks[0]) // 32, x.first_token, x.last_token, x.parked, x.compacts)
        for x in step.prompts
    ] == expected


def test_passes_that_change_nothing(monkeypatch):
    """Nobody has a token beyond, or tokens stay in place."""
    monkeypatch.setattr(drafting, "_rows", None)
    for kind, rows in ((make_policy(), [ROWS[0], ROWS[-2]]), (make_policy(Quest), ROWS[:-1])):
        note(rows)
        found = rows_of_pass(kind, batch(rows), lengths_of(rows))
        assert found.controls is None
        assert found.parking is None
        step, planner = StepMetadata(3, None), StepPlanner(kind)
        assert with_waiting_queries(step, planner, batch(rows), lengths_of(rows), found) is step


def test_requests_that_the_model_has_not_computed_are_noticed(monkeypatch):
    monkeypatch.setattr(drafting, "_rows", None)
    given = make_policy(), batch(ROWS[:2]), lengths_of(ROWS[:2])
    with pytest.raises(IntegrityError, match="--speculative-config"):
        rows_of_pass(*given)
    note(ROWS[:1])
    with pytest.raises(IntegrityError, match="--speculative-config"):
        rows_of_pass(*given)
    note(ROWS[:3])  # the last one draws no more
    assert rows_of_pass(*given).prompt_lens.tolist() == [PROMPT] * 2
