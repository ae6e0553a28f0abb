# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the requests of a batch ask for; nothing that vLLM hands a metadata builder tells.

Sampling parameters reach the model runner once, with a new request, which is when they are noted:
in the runner's own table of requests, by the index under which it keeps them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_sparse.backends.base import holds_prompts
from vllm_sparse.backends.prompts import (
    by_row,
    table_at_work,
    tell_rows_beside_states,
    turn_to,
    watch_requests,
)
from vllm_sparse.control import AS_SET
from vllm_sparse.kv.requests import control_of_request
from vllm_sparse.seams import replace_once

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


def watch_controls(config: VllmConfig) -> None:
    """Note what requests ask for as the model runner takes them up.

    Args:
        config: Says which runner that is.
    """
    if config.use_v2_model_runner:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        watch_requests()
        _after(GPUModelRunner, "add_requests", _note_new)
        _before(GPUModelRunner, "execute_model", lambda runner: turn_to(runner.req_states))
        if config.model_config.is_hybrid:
            tell_rows_beside_states()
    else:
        from vllm.v1.worker.gpu_input_batch import InputBatch
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

        _after(InputBatch, "add_request", _note_row)
        _before(RunnerV1, "execute_model", lambda runner: turn_to(runner.input_batch))


def _after(owner: type, name: str, note: Any) -> None:
    def make(stock: Any) -> Any:
        def noting(self: Any, added: Any, /) -> Any:
            result = stock(self, added)
            note(self, added)
            return result

        return noting

    replace_once(owner, name, make)


def _before(owner: type, name: str, turn: Any) -> None:
    def make(stock: Any) -> Any:
        def turned(self: Any, *arguments: Any, **named: Any) -> Any:
            turn(self)
            return stock(self, *arguments, **named)

        return turned

    replace_once(owner, name, make)


def _note_new(runner: Any, scheduled: Any) -> None:
    """Model Runner V2: by index, which a request keeps until it ends or is preempted."""
    table = runner.req_states
    for new in scheduled.scheduled_new_reqs:
        control = control_of_request(new)
        if control != AS_SET and not hasattr(table, "_vllm_sparse"):
            table._vllm_sparse = np.zeros(table.max_num_reqs, dtype=np.int32)
        if hasattr(table, "_vllm_sparse"):
            table._vllm_sparse[table.req_id_to_index[new.req_id]] = control


def _note_row(batch: Any, request: Any) -> None:
    """Model Runner V1: by name, because its rows move."""
    control = control_of_request(request)
    if control != AS_SET and not hasattr(batch, "_vllm_sparse"):
        batch._vllm_sparse = {}
    if hasattr(batch, "_vllm_sparse"):
        batch._vllm_sparse.pop(request.req_id, None)
        if control != AS_SET:
            batch._vllm_sparse[request.req_id] = control


def replayed(common: CommonAttentionMetadata) -> Tensor | None:
    """Rows of requests that came with outputs: they were preempted, and are counted already.

    Args:
        common: The batch.

    Returns:
        On the host, bool ``[R]``, anything for rows that decode; ``None`` where nobody tells or all
        rows decode.
    """
    table = table_at_work()
    if table is None or common.rswa_prefix_lens is None or not holds_prompts(common):
        return None
    if common.req_idx is not None:
        tokens, prompts = table.prefill_len.np, table.prompt_len.np
    else:
        tokens, prompts = table.num_tokens_no_spec, table.num_prompt_tokens
    return torch.from_numpy(by_row(tokens, common) > by_row(prompts, common))


def controls(common: CommonAttentionMetadata) -> Tensor | None:
    """What each row's request asks for.

    Args:
        common: The batch.

    Returns:
        On the host, int32 ``[R]``, see :mod:`vllm_sparse.control`; ``None`` if none asks anything.
    """
    table = table_at_work()
    if table is None or not hasattr(table, "_vllm_sparse"):  # nobody has ever asked for anything
        return None
    if common.rswa_prefix_lens is None:  # a dummy run's rows are nobody's
        return None
    if common.req_idx is not None:
        asked = by_row(table._vllm_sparse, common)
    else:
        asked = np.zeros(common.num_reqs, dtype=np.int32)
        # Few: of other requests nothing is kept.
        for name in list(table._vllm_sparse):
            row = table.req_id_to_index.get(name)
            if row is None:  # it is noted again when it comes back
                del table._vllm_sparse[name]
            elif row < len(asked):
                asked[row] = table._vllm_sparse[name]
    return torch.from_numpy(asked) if asked.any() else None
