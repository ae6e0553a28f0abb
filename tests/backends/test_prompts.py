# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Prompt lengths on the host, and steps with a new request."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from vllm.v1.worker.gpu.states import RequestState

from vllm_sparse.backends import prompts


@pytest.fixture
def table(monkeypatch):
    """A table of requests in which index 2 was given away."""
    seen = []
    monkeypatch.setattr(RequestState, "add_request", lambda self, *given, **_: seen.append(given))
    monkeypatch.setattr(RequestState, "remove_request", RequestState.remove_request)
    monkeypatch.setattr(prompts, "_at_work", None)
    prompts.watch_requests()
    watching = RequestState.add_request
    prompts.watch_requests()
    assert RequestState.add_request is watching

    class Table:
        prompt_len = SimpleNamespace(np=np.array([7, 300, 41, 0], dtype=np.int32))
        max_num_reqs = 4
        req_id_to_index = {"new": 2}  # noqa: RUF012

    table = Table()
    prompts.turn_to(table)
    watching(table, "new", prompt_len=41)
    assert seen == [("new",)]
    return table


def batch(**fields):
    lens = torch.full((3,), -1, dtype=torch.int32)  # the device's, which nobody may read
    common = {"num_reqs": 3, "req_idx": np.array([2, 0, 1]), "rswa_prefix_lens": lens}
    return SimpleNamespace(**{**common, **fields})


def test_lengths_are_those_of_the_runner_s_own_table(table):
    assert prompts.prompt_lengths_on_host(batch()).tolist() == [41, 7, 300]
    table.prompt_len.np[2] = 9  # another request got the index
    assert prompts.prompt_lengths_on_host(batch()).tolist() == [9, 7, 300]


def test_padding_rows_have_no_prompt(table):
    assert prompts.prompt_lengths_on_host(batch(num_reqs=5)).tolist() == [41, 7, 300, 0, 0]
    assert prompts.prompt_lengths_on_host(batch(num_reqs=2)).tolist() == [41, 7]


@pytest.mark.parametrize("gone", [True, False])
def test_what_the_runner_hands_over_is_read_where_the_table_is_unknown(table, gone, monkeypatch):
    """Model Runner V1 gives no indices, but keeps the lengths on the host."""
    common = batch(rswa_prefix_lens=torch.tensor([5, 6, 7]), **({} if gone else {"req_idx": None}))
    if gone:
        monkeypatch.setattr(prompts, "_at_work", None)
    assert prompts.prompt_lengths_on_host(common).tolist() == [5, 6, 7]


def test_rows_are_told_beside_states(monkeypatch):
    """Model Runner V2 leaves them out there and nowhere else."""
    from vllm.v1.worker.gpu.model_states import mamba_hybrid

    state = mamba_hybrid.MambaHybridModelState
    monkeypatch.setattr(mamba_hybrid, "build_attn_metadata", lambda **given: given)
    monkeypatch.setattr(
        state, "prepare_attn", lambda self, batch, x: mamba_hybrid.build_attn_metadata(x=x)
    )
    for _ in range(2):
        prompts.tell_rows_beside_states()
    for rows in ([3, 1], [0]):
        told = state.prepare_attn(None, SimpleNamespace(idx_mapping_np=rows), 5)
        assert told == {"x": 5, "req_idx": rows}


def test_steps_with_a_new_request(table):
    newcomers, untold = prompts.Newcomers(True), prompts.Newcomers(False)
    assert newcomers.arrived()  # the builder is younger than its first request
    assert not newcomers.arrived()
    RequestState.add_request(table, "new", prompt_len=41)  # preempted, and taken up again
    RequestState.add_request(table, "new", prompt_len=7)
    assert newcomers.arrived()
    assert not newcomers.arrived()
    assert prompts.Newcomers(True).arrived()
    # Where nobody tells, any step may have one.
    assert untold.arrived()
    assert untold.arrived()


def test_a_table_that_has_gone_tells_nothing(table, monkeypatch):
    monkeypatch.setattr(prompts, "_at_work", lambda: None)  # as a dead weak reference
    common = batch(rswa_prefix_lens=torch.tensor([5, 6, 7]))
    assert prompts.prompt_lengths_on_host(common).tolist() == [5, 6, 7]
