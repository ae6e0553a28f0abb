# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Prompt lengths on the host, where Model Runner V2 hands them over on the device.

Reading them back would wait for the step before, in every step that holds a prompt's chunk.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.gpu.states import RequestState

from vllm_sparse.backends.base import prompt_lengths

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.attention.backend import CommonAttentionMetadata

# The runner's own table of requests, whose host half is what it uploads.
_requests: weakref.ref[Any] | None = None


def watch_requests() -> None:
    """Learn which table of requests this process's runner fills.

    Nothing that a metadata builder gets says on the host whether a row's index has changed hands
    since the step before, so lengths cannot be remembered by index.
    """
    add = RequestState.add_request
    if hasattr(add, "__wrapped__"):
        return

    @functools.wraps(add)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> None:
        global _requests
        _requests = weakref.ref(self)
        add(self, *args, **kwargs)

    RequestState.add_request = add_request


def prompt_lengths_on_host(common: CommonAttentionMetadata) -> Tensor:
    """As :func:`.base.prompt_lengths`, but on the host; waits for the device only if it must."""
    requests = None if _requests is None else _requests()
    if requests is None or common.req_idx is None or common.rswa_prefix_lens is None:
        return prompt_lengths(common).cpu()
    lengths = torch.zeros(common.num_reqs, dtype=torch.int32)
    known = requests.prompt_len.np[common.req_idx][: common.num_reqs]
    lengths[: len(known)] = torch.from_numpy(known)
    return lengths
