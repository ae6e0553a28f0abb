# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Steps of three requests, planned."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_sparse.steps.split import StepPlanner

PROMPTS = torch.tensor([300, 520, 411])
STARTS = torch.zeros(4, dtype=torch.int64)  # as vLLM has it: each step writes over the last one's


def plan(
    planner: StepPlanner, seq_lens, query_lens, prompts=PROMPTS, table=None, controls=None,
    drafts=None,
):  # fmt: skip
    """A step's plan, and what it counted."""
    STARTS[1:] = torch.tensor(query_lens).cumsum(0)
    counted: Counter[str] = Counter()

    def count(name, amount, reason=""):
        counted["/".join(filter(None, (name, reason)))] += amount

    if table is None:
        table = torch.arange(1, 1 + 3 * 40, dtype=torch.int32).view(3, 40)
    slots = torch.arange(int(STARTS[-1]))
    step = planner.split(
        STARTS, torch.tensor(seq_lens), prompts, table, slots, lambda *part: part, count,
        None if controls is None else torch.tensor(controls), drafts,
    )  # fmt: skip
    return step, counted
