# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the requests of a batch ask for; nothing that vLLM hands a metadata builder tells.

Sampling parameters reach the model runner once, with a new request, which is when they are noted:
in the runner's own table of requests, by the index under which it keeps them.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_sparse.control import AS_SET, control_of

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

# The table of requests that this process's runner fills, once a request asked for something.
_table: weakref.ref[Any] | None = None


def watch_controls(config: VllmConfig) -> None:
    """Note what requests ask for as the model runner takes them up.

    Args:
        config: Says which runner that is.
    """
    if config.use_v2_model_runner:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        _wrap(GPUModelRunner, "add_requests", _note_new)
    else:
        from vllm.v1.worker.gpu_input_batch import InputBatch

        _wrap(InputBatch, "add_request", _note_row)


def _wrap(owner: type, name: str, note: Any) -> None:
    stock = getattr(owner, name)
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def wrapped(self: Any, added: Any) -> Any:
        result = stock(self, added)
        note(self, added)
        return result

    setattr(owner, name, wrapped)


def _note_new(runner: Any, scheduled: Any) -> None:
    """Model Runner V2: by index, which a request keeps until it ends or is preempted."""
    table = runner.req_states
    for new in scheduled.scheduled_new_reqs:
        control = _asked(new)
        if control != AS_SET and not hasattr(table, "_vllm_sparse"):
            table._vllm_sparse = np.zeros(table.max_num_reqs, dtype=np.int32)
            _watch(table)
        if hasattr(table, "_vllm_sparse"):
            table._vllm_sparse[table.req_id_to_index[new.req_id]] = control


def _note_row(batch: Any, request: Any) -> None:
    """Model Runner V1: by name, because its rows move."""
    control = _asked(request)
    if control != AS_SET and not hasattr(batch, "_vllm_sparse"):
        batch._vllm_sparse = {}
        _watch(batch)
    if hasattr(batch, "_vllm_sparse"):
        batch._vllm_sparse.pop(request.req_id, None)
        if control != AS_SET:
            batch._vllm_sparse[request.req_id] = control


def _asked(request: Any) -> int:
    sampling = request.sampling_params
    return AS_SET if sampling is None else control_of(sampling.extra_args)


def _watch(table: Any) -> None:
    global _table
    _table = weakref.ref(table)


def controls(common: CommonAttentionMetadata) -> Tensor | None:
    """What each row's request asks for.

    Args:
        common: The batch.

    Returns:
        On the host, int32 ``[R]``, see :mod:`vllm_sparse.control`; ``None`` if none asks anything.
    """
    table = None if _table is None else _table()
    if table is None or common.rswa_prefix_lens is None:  # a dummy run's rows are nobody's
        return None
    asked = np.zeros(common.num_reqs, dtype=np.int32)
    if common.req_idx is not None:
        known = table._vllm_sparse[common.req_idx][: common.num_reqs]
        asked[: len(known)] = known
    else:
        # Few: of other requests nothing is kept.
        for name in list(table._vllm_sparse):
            row = table.req_id_to_index.get(name)
            if row is None:  # it is noted again when it comes back
                del table._vllm_sparse[name]
            elif row < len(asked):
                asked[row] = table._vllm_sparse[name]
    return torch.from_numpy(asked) if asked.any() else None
