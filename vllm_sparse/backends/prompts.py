# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What Model Runner V2 knows of requests on the host: how long prompts are, and who is new.

It hands prompt lengths over on the device. Reading them back would wait for the step before, in
every step that holds a prompt's chunk.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_sparse.backends.base import prompt_lengths
from vllm_sparse.seams import replace_once

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.attention.backend import CommonAttentionMetadata

# How vLLM names the requests that it makes itself before it serves any (`v1/worker/gpu/warmup.py`).
_WARM_UPS = "_warmup_", "_v2_mixed_warmup"

# What the runner whose step is under way knows of its requests: Model Runner V2's own table, whose
# host half is what it uploads, or V1's batch. A process may have several runners.
_at_work: weakref.ref[Any] | None = None
_taken_up = 0


def watch_requests() -> None:
    """Count what Model Runner V2 takes up, and note what vLLM makes itself.

    Nothing that a metadata builder gets says on the host whether a row's index has changed hands
    since the step before, so lengths cannot be remembered by index.
    """
    from vllm.v1.worker.gpu.states import RequestState

    def make(add: Any) -> Any:
        def add_request(self: Any, req_id: str, *args: Any, **kwargs: Any) -> None:
            global _taken_up
            _taken_up += 1
            add(self, req_id, *args, **kwargs)
            _warm_ups(self)[self.req_id_to_index[req_id]] = req_id.startswith(_WARM_UPS)

        return add_request

    replace_once(RequestState, "add_request", make)


def tell_rows_beside_states() -> None:
    """Have Model Runner V2 say whose rows a batch has beside recurrent states, too."""
    from vllm.v1.worker.gpu.model_states import mamba_hybrid

    rows: Any = None

    def prepare(stock: Any) -> Any:
        def prepare_attn(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal rows
            rows = input_batch.idx_mapping_np
            return stock(self, input_batch, *args, **kwargs)

        return prepare_attn

    def build(stock: Any) -> Any:
        return lambda **named: stock(**{"req_idx": rows, **named})

    replace_once(mamba_hybrid.MambaHybridModelState, "prepare_attn", prepare)
    replace_once(mamba_hybrid, "build_attn_metadata", build)


def turn_to(table: Any) -> None:
    """The runner with this table is at work."""
    global _at_work
    _at_work = weakref.ref(table)


def table_at_work() -> Any:
    """What the runner at work knows of its requests; ``None`` before there is one."""
    return None if _at_work is None else _at_work()


def _warm_ups(table: Any) -> Any:
    """Whether each index's request is, or was, vLLM's own."""
    if not hasattr(table, "_vllm_sparse_warm_ups"):
        table._vllm_sparse_warm_ups = np.zeros(table.max_num_reqs, dtype=bool)
    return table._vllm_sparse_warm_ups


def by_row(values: Any, common: CommonAttentionMetadata) -> Any:
    """Values of a runner's table by a batch's rows ``[R]``; 0 for padding.

    Args:
        values: By index with Model Runner V2, by row with V1.
        common: The batch.
    """
    known = values if common.req_idx is None else values[common.req_idx]
    found = np.zeros(common.num_reqs, dtype=values.dtype)
    found[: len(known)] = known[: common.num_reqs]
    return found


def is_warm_up(common: CommonAttentionMetadata) -> bool:
    """Whether all requests of a batch are vLLM's own, which warm its kernels up: nobody's."""
    requests = table_at_work()
    if requests is None or common.req_idx is None or common.rswa_prefix_lens is None:
        return False
    return bool(_warm_ups(requests)[common.req_idx].all())


def prompt_lengths_on_host(common: CommonAttentionMetadata) -> Tensor:
    """As :func:`.base.prompt_lengths`, but on the host; waits for the device only if it must."""
    requests = table_at_work()
    if requests is None or common.req_idx is None or common.rswa_prefix_lens is None:
        return prompt_lengths(common).cpu()
    return torch.from_numpy(by_row(requests.prompt_len.np, common))


class Newcomers:
    """Tells steps with a new request from others; one that was preempted is new again.

    Args:
        tells: The runner is watched, as Model Runner V2 is; of another one's steps any may have
            one.
    """

    def __init__(self, tells: bool) -> None:
        self._tells, self._seen = tells, -1

    def arrived(self) -> bool:
        """Whether a request may have been taken up since the last call."""
        seen, self._seen = self._seen, _taken_up
        return not self._tells or seen != _taken_up
