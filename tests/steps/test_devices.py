# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Every tensor of a plan is where the layers compute, and planning reads none of them back.

The block table is on the device ``meta``, whose tensors have no content: who asks for some fails.
"""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from support.devices import META, elsewhere, tensors_of, upload_to_meta
from support.policies import make_policy
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_sparse.backends.policy import Planning
from vllm_sparse.control import DENSE
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.policies.snapkv import SnapKV
from vllm_sparse.policies.sparda import SpardaSettings
from vllm_sparse.policies.streamingllm import StreamingLLM
from vllm_sparse.steps import split as steps_split
from vllm_sparse.steps.drafts import Drafts
from vllm_sparse.steps.host import SpardaPlanner
from vllm_sparse.steps.host_rows import RowPlanner
from vllm_sparse.steps.split import StepPlanner

SIZE = 16
# Tokens before the step, tokens of it, tokens of the prompt.
FRESH, CHUNK, ENDING = (0, 40, 90), (40, 40, 300), (280, 20, 300)
LONE, DECODE, DRAFTED = (299, 1, 300), (320, 1, 300), (320, 4, 300)
BATCHES = {
    "fresh": [FRESH, FRESH],
    "chunks": [CHUNK, FRESH],
    "ending": [ENDING, FRESH, CHUNK],
    "mixed": [DECODE, CHUNK, FRESH, ENDING, DRAFTED],
    "replayed": [DRAFTED, DECODE],
    "lone": [LONE, DECODE],
    "decode": [DECODE, DECODE, DECODE],
}


@pytest.fixture(autouse=True)
def _meta(monkeypatch):
    upload_to_meta(monkeypatch)


def batch(rows):
    """Starts, lengths and prompts on the host; the block table on the device."""
    past, count, prompts = torch.tensor(rows).unbind(1)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), count.cumsum(0)))
    table = torch.zeros(len(rows), 40, dtype=torch.int32, device=META)
    return starts.int(), (past + count).int(), prompts.int(), table


@pytest.mark.parametrize("asked", [None, 0], ids=["none", "dense"])
@pytest.mark.parametrize("sparse_prefill", [False, True, 6])
@pytest.mark.parametrize("name", BATCHES)
def test_sparda(name, sparse_prefill, asked):
    settings = SpardaSettings(
        selector="query" if sparse_prefill else "previous", block_size=SIZE,
        kernel_stride=4, top_k=5, dense_len=0, local_blocks=1, staging_blocks=2,
        sparse_prefill=sparse_prefill,
    )  # fmt: skip
    rows = BATCHES[name]
    starts, ends, prompts, table = batch(rows)
    dense = None if asked is None else torch.arange(len(rows)) == asked
    planner = SpardaPlanner(settings, 200, lambda *_: None, split_fresh=True)
    # Who is new may share blocks with another row, which takes a look at the table.
    step = planner.plan(starts, ends, prompts, table, False, dense).to(META)
    assert not elsewhere(step)
    assert sum(1 for _ in tensors_of(step)) > 5
    whole = [row for row in rows if row == FRESH]
    if sparse_prefill is not False:
        whole = [row for row in whole[:1] if dense is not None and rows[0] == FRESH]
    assert (step.fresh is None) == (not whole)
    if all(count == 1 for _, count, _ in rows):
        there = RowPlanner(settings, 8, META, captured=True)
        lone = LONE in rows
        lens = ends.to(META), ends, prompts if lone else prompts.to(META)
        single = there.plan(planner, *lens, table, lone, dense)
        streamed = sparse_prefill is not False and (
            dense is not None or (lone and not settings.prompts_like_outputs)
        )
        assert (single is None) == streamed
        assert not elsewhere(single)


@pytest.fixture
def uploaded(monkeypatch):
    """How many numbers were uploaded at a time."""
    counts, there = [], steps_split.upload

    def counting(tensor, device):
        if tensor.device.type == "cpu":
            counts.append(tensor.numel())
        return there(tensor, device)

    monkeypatch.setattr(steps_split, "upload", counting)
    return counts


@pytest.mark.parametrize("kind", [RocketKV, Quest, SnapKV, StreamingLLM])
def test_what_is_uploaded_is_a_number_for_each_token(kind, uploaded):
    """Not one for each block that the longest row holds, of each of a thousand rows."""
    planner = StepPlanner(make_policy(kind))
    for rows in ([DECODE, CHUNK], [DECODE] * 3, [DECODE] * 3):
        split(planner, rows, None, False)
        assert 0 < max(uploaded) <= sum(count for _, count, _ in rows)
        uploaded.clear()


@pytest.mark.parametrize("drafts", [False, True], ids=["exact", "drafts"])
@pytest.mark.parametrize("kind", [RocketKV, Quest, SnapKV, StreamingLLM])
def test_policies(kind, drafts):
    skipping = {"skip_layers": 1} if kind in (RocketKV, Quest) else {}
    planner = StepPlanner(make_policy(kind, **skipping))
    for (name, rows), control in product(BATCHES.items(), (None, DENSE, 96)):
        controls = None if control is None else torch.tensor([control] + [0] * (len(rows) - 1))
        # The second time from what is remembered of the first, if the rows are the same.
        for _ in range(2):
            step = split(planner, rows, controls, drafts)
            assert not elsewhere(step), (name, control)
            assert sum(1 for _ in tensors_of(step)) > 3
        remembered = name == "decode" and control is None and not drafts and kind.moves
        assert (planner._steady is not None) == remembered


def split(planner, rows, controls, drafts):
    """As a backend does it, whose stock builder returns what it is given."""
    starts, ends, prompts, table = batch(rows)
    total = int(starts[-1])
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(META), query_start_loc_cpu=starts, seq_lens=ends.to(META),
        num_reqs=len(rows), num_actual_tokens=total, max_query_len=int(starts.diff().max()),
        max_seq_len=int(ends.max()), block_table_tensor=table,
        slot_mapping=torch.zeros(total, dtype=torch.int64, device=META),
    )  # fmt: skip
    counted = torch.zeros(3, dtype=torch.int64, device=META) if drafts else None
    mine = SimpleNamespace(planner=planner, count=lambda *_: None)
    return Planning.split(mine, common, ends, prompts, controls, lambda *given: given[1], counted)


def test_what_stays_behind_is_seen():
    assert elsewhere(Drafts(torch.zeros(1), torch.zeros(1, device=META))) == ["step.off"]
