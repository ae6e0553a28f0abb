# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whose blocks the scheduler asks about: vLLM's block managers are given hashes or an id only.

What may be shared depends on the prompt's length and on the request's control, neither of which can
be told from a lookup. So every request of the scheduler's process is known from its beginning.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from vllm.v1.request import Request

from vllm_sparse.control import AS_SET, control_of
from vllm_sparse.seams import replace_once

_by_id: WeakValueDictionary[str, Request] = WeakValueDictionary()
_by_hashes: WeakValueDictionary[int, Request] = WeakValueDictionary()


def watch_requests() -> None:
    """Know all requests that this process makes from now on."""

    def make(begin: Any) -> Any:
        def __init__(self: Request, *args: Any, **kwargs: Any) -> None:
            begin(self, *args, **kwargs)
            _by_id[self.request_id] = self
            # The list lives as long as the request and grows with it.
            _by_hashes[id(self.block_hashes)] = self

        return __init__

    replace_once(Request, "__init__", make)


def watch_engines() -> None:
    """Have every engine of this process refuse requests that it cannot serve.

    Whoever sends them may not have, or for another engine: what is wrong would come out in the
    middle of a step, which ends an engine, or not at all.
    """
    from vllm.v1.engine.core import EngineCore

    def make(stock: Any) -> Any:
        def preprocess_add_request(self: Any, request: Any) -> Any:
            for group in self.scheduler.kv_cache_config.kv_cache_groups:
                allowed = getattr(group.kv_cache_spec, "allowed", None)
                if allowed is not None:
                    asked = getattr(request.sampling_params, "extra_args", None)
                    allowed.check(asked, request.resumable)
            return stock(self, request)

        return preprocess_add_request

    replace_once(EngineCore, "preprocess_add_request", make)


def of_id(request_id: str) -> Request | None:
    """The request with an id; ``None`` if this process has not made it."""
    return _by_id.get(request_id)


def of_hashes(block_hashes: Any) -> Request | None:
    """The request that a list of hashes, or a view of it with larger blocks, belongs to."""
    hashes = getattr(block_hashes, "block_hashes", block_hashes)
    request = _by_hashes.get(id(hashes))
    return request if request is not None and request.block_hashes is hashes else None


def control_of_request(request: Request | None) -> int:
    """A request's control; of one that nobody knows, what the server has set."""
    if request is None or request.sampling_params is None:
        return AS_SET
    return control_of(request.sampling_params.extra_args)
