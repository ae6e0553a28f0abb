# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whose blocks the scheduler asks about: vLLM's block managers are given hashes or an id only.

What may be shared depends on the prompt's length and on the request's control, neither of which can
be told from a lookup. So every request is known to the process of its scheduler, which may be that
of several engines: by its hashes, which are nobody else's, and by its id beside the engine's pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from vllm.v1.request import Request

from vllm_sparse.control import AS_SET, control_of
from vllm_sparse.seams import replace_once

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

_by_id: WeakKeyDictionary[BlockPool, WeakValueDictionary[str, Request]] = WeakKeyDictionary()
_by_hashes: WeakValueDictionary[int, Request] = WeakValueDictionary()


def watch_requests() -> None:
    """Know all requests that this process makes from now on."""
    from vllm.v1.core.sched.scheduler import Scheduler

    def make(begin: Any) -> Any:
        def __init__(self: Request, *args: Any, **kwargs: Any) -> None:
            begin(self, *args, **kwargs)
            # The list lives as long as the request and grows with it.
            _by_hashes[id(self.block_hashes)] = self

        return __init__

    def make_noting(stock: Any) -> Any:
        def add_request(self: Any, request: Request) -> None:
            if request.request_id not in self.requests:  # else it goes on with that one
                note_request(self.kv_cache_manager.block_pool, request)
            stock(self, request)

        return add_request

    replace_once(Request, "__init__", make)
    replace_once(Scheduler, "add_request", make_noting)


def note_request(pool: BlockPool, request: Request) -> None:
    """Know whose id it is in an engine.

    Args:
        pool: The engine's.
        request: Which it is about to serve.
    """
    _by_id.setdefault(pool, WeakValueDictionary())[request.request_id] = request


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


def of_id(pool: BlockPool, request_id: str) -> Request | None:
    """The request with an id in the engine of a pool; ``None`` if it serves no such."""
    own = _by_id.get(pool)
    return None if own is None else own.get(request_id)


def of_hashes(block_hashes: Any) -> Request | None:
    """The request that a list of hashes, or a view of it with larger blocks, belongs to."""
    hashes = getattr(block_hashes, "block_hashes", block_hashes)
    request = _by_hashes.get(id(hashes))
    return request if request is not None and request.block_hashes is hashes else None


def control_of_request(request: Request | None) -> int:
    """A request's control; of one that nobody knows, what the server has set.

    Its arguments are read once: every step asks, and a client may send a million of them.
    """
    if request is None or request.sampling_params is None:
        return AS_SET
    known: int | None = getattr(request, "_vllm_sparse_control", None)
    if known is None:
        known = control_of(request.sampling_params.extra_args)
        request._vllm_sparse_control = known
    return known


def case_of(request: Request) -> tuple[int, int]:
    """Prompt tokens and control: all that our specs decide by."""
    return request.num_prompt_tokens, control_of_request(request)
