# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What Model Runner V2 hands a metadata builder, with a device whose tensors have no content."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.states import RequestState

from support.devices import META
from vllm_sparse.backends import prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPT = 300


def table_of(monkeypatch: Any, *names: str) -> RequestState:
    """The table of the runner at work, watched, with these in it."""
    for name in ("add_request", "remove_request"):
        monkeypatch.setattr(RequestState, name, getattr(RequestState, name))
    monkeypatch.setattr(prompts, "_at_work", None)
    prompts.watch_requests()
    table: Any = RequestState.__new__(RequestState)
    prompts.turn_to(table)
    table.max_num_reqs, table.free_indices = 4, [0, 1, 2, 3]
    table.req_id_to_index, table.index_to_req_id = {}, {}
    table.max_seq_len = np.zeros(4, dtype=np.int32)
    table.num_computed_prefill_tokens = table.num_computed_tokens_np = table.max_seq_len
    for name in ("prompt_len", "prefill_len"):
        setattr(table, name, SimpleNamespace(np=np.zeros(4, dtype=np.int32)))
    ignored = SimpleNamespace(stage_write=lambda *_: None, stage_write_elem=lambda *_: None)
    table.total_len = table.all_token_ids = table.num_computed_tokens = ignored
    table.draft_tokens = torch.zeros(4, 0)
    for name in names:
        take_up(table, name)
    return table


def take_up(table: RequestState, name: str, outputs: int = 0) -> None:
    """A request with a prompt of 300 tokens comes, or comes back with outputs."""
    table.add_request(
        req_id=name, prompt_len=PROMPT, all_token_ids=[0] * (PROMPT + outputs),
        num_computed_tokens=0, max_tokens=1,
    )  # fmt: skip


def batch(
    table: RequestState, names: Sequence[str], ends: Sequence[int], counts: Sequence[int] = ()
) -> CommonAttentionMetadata:
    """Requests of the table that have so many tokens after the step, of which it computes some."""
    counts = counts or [1] * len(ends)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    index, lens = [table.req_id_to_index[name] for name in names], torch.tensor(ends).int()
    return CommonAttentionMetadata(
        query_start_loc=starts.to(META), query_start_loc_cpu=starts, seq_lens=lens.to(META),
        num_reqs=len(ends), num_actual_tokens=sum(counts), max_query_len=max(counts),
        max_seq_len=max(ends), seq_lens_cpu_upper_bound=lens, req_idx=np.array(index),
        block_table_tensor=torch.zeros(len(ends), 40, dtype=torch.int32, device=META),
        slot_mapping=torch.zeros(sum(counts), dtype=torch.int64, device=META),
        is_prefilling=lens <= PROMPT,
        rswa_prefix_lens=torch.full((len(ends),), PROMPT, dtype=torch.int32, device=META),
    )  # fmt: skip


def dummy_of_v1(rows: int, length: int) -> CommonAttentionMetadata:
    """A dummy run of Model Runner V1 on the host, with what is left of requests in its table."""
    starts, lens = torch.arange(rows + 1).int(), torch.full((rows,), length).int()
    blocks = torch.arange(40 * rows, dtype=torch.int32).view(rows, 40) % 49 + 1
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lens, num_reqs=rows,
        num_actual_tokens=rows, max_query_len=1, max_seq_len=1000,
        seq_lens_cpu_upper_bound=lens,
        block_table_tensor=blocks,
        slot_mapping=torch.full((rows,), -1), is_prefilling=torch.ones(rows, dtype=torch.bool),
        rswa_prefix_lens=torch.full((rows,), PROMPT, dtype=torch.int32),
    )  # fmt: skip
