# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The laboratory's arms by name: what is served, oracles, and what might be better.

Served arms have the names of `benchmarks.arms`; ROCKETKV's are the policy's own maths and plan.
Oracles, which no server could run, and candidates are listed in `KINDS` below.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from benchmarks import arms
from benchmarks.quality.judge import MIN_CONTEXT
from benchmarks.quality.schemes import (
    FEW_FORCED,
    KeepIdeal,
    ReadBlocks,
    ReadPages,
    ReadTokens,
    Scheme,
)
from vllm_sparse import registry
from vllm_sparse.policies.protocol import Shape
from vllm_sparse.policies.rocketkv import RocketKVSettings
from vllm_sparse.training.geometry import BlockGeometry

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benchmarks.quality.prompts import Heads, Network
    from benchmarks.quality.schemes import Held, Layer
    from vllm_sparse.policies.protocol import Policy

BLOCK = 128  # tokens per block of vLLM's cache on a CPU: ROCKETKV keeps whole blocks


def everything(query: Any, held: Any) -> None:
    """Reads everything."""


class ReadPolicy:
    """What a policy selects, by its own PyTorch.

    Args:
        policy: With ``select``, and ``index`` if it has one.
        page: Tokens per page.
    """

    def __init__(self, policy: Policy, page: int) -> None:
        self._policy, self._page = policy, page
        self.most = policy.top_k
        self._index: Tensor | None = None

    def __call__(self, query: Tensor, held: Held) -> Tensor | None:
        """As `benchmarks.quality.schemes.ReadTokens`."""
        if self.most is None or held.count <= self.most:
            return None
        index = self._pages(held) if self._policy.index_width else None
        count = torch.tensor([held.count])
        return self._policy.select(query[None], index, count, self._page, self.most)[0]

    def _pages(self, held: Held) -> Tensor:
        done = 0 if self._index is None else (held.count - 1) // self._page
        rest = held.keys[:, done * self._page : held.count]
        missing = -rest.shape[1] % self._page
        pages = functional.pad(rest, (0, 0, 0, missing)).unflatten(1, (-1, self._page))
        there = torch.ones(pages.shape[:-1], dtype=torch.bool)
        there[:, -1, self._page - missing :] = False
        fresh = self._policy.index(pages, there)
        old = fresh[:, :0] if self._index is None else self._index[0, :, :done]
        self._index = torch.cat((old, fresh), 1)[None]
        return self._index


def _votes_of(policy: Policy) -> Callable[[Layer, int], Tensor]:
    def keep(layer: Layer, count: int) -> Tensor:
        return policy.keep(layer.last[:, -policy.window :], layer.keys, count)

    return keep


def policy_of(arm: arms.Arm, context: int, heads: Heads) -> Policy:
    """The policy of an arm, as a server on a CPU would make it.

    Args:
        arm: Served.
        context: ``max_model_len``.
        heads: Of `Network`.

    Raises:
        ValueError: Its backend is no policy.
    """
    kind = registry.policy(arm.backend)
    if kind is None:
        raise ValueError(f"{arm.name} is served, but the laboratory has no scheme for it")
    settings = kind.Settings(**{"min_context": MIN_CONTEXT, **(arm.settings or {})})
    group = heads.query // heads.groups
    return kind(settings, Shape(heads.size, group, BLOCK, context, scale=heads.scale))


def scheme_of(policy: Policy, keep: Any = None, make: Any = None) -> Scheme:
    """A policy's own plan, with another way to keep or to read.

    Args:
        policy: The policy.
        keep: Of a layer and a number of tokens, those that stay.
        make: Of page size, channels and tokens to read, what reads them.
    """
    if make is None:
        make = ReadPages if policy.kernel else lambda page, *_: ReadPolicy(policy, page)

    def count(tokens: int) -> int | None:
        dropped = policy.retention(tokens).dropped_blocks
        return tokens - dropped * BLOCK if policy.moves else None

    def read(tokens: int) -> Any:
        found, top_k = policy.retention(tokens), policy.top_k
        if not found.sparse or top_k is None:
            return everything
        return make(found.page_size, found.top_r, top_k)

    return Scheme(count, keep or _votes_of(policy), read, policy.settings.skip_layers)


def _rocket(keep: Any = None, make: Any = None, **settings: Any) -> Callable[..., Scheme]:
    """ROCKETKV with parts exchanged."""

    def scheme(budget: int, context: int, heads: Heads) -> Scheme:
        arm = arms.Arm("", {"token_budget": budget, **settings})
        return scheme_of(policy_of(arm, context, heads), keep, make)

    return scheme


def _reads(make: Callable[[int], Any]) -> Callable[..., Scheme]:
    return lambda number, context, heads: Scheme(read=lambda _: make(number))


def _stride(stride: int) -> Callable[..., Scheme]:
    sizes = replace(FEW_FORCED, kernel_stride=stride)
    return _reads(lambda number: ReadBlocks(number, sizes=sizes))


def _mean(page: int, top_r: int, top_k: int) -> ReadPages:
    return ReadPages(page, top_r, top_k, "moments", 0.0)


KINDS: dict[str, Callable[[int, int, Heads], Scheme]] = {
    # Oracles
    "exact": _reads(ReadTokens),
    "exactblocks": _reads(lambda number: ReadBlocks(number, "exact")),
    "idealvotes": _rocket(KeepIdeal(RocketKVSettings().window)),
    "exactpages": _rocket(make=lambda page, top_r, top_k: ReadPages(page, top_r, top_k, "exact")),
    # SPARDA's selectors
    "query": _reads(ReadBlocks),
    "previous": _reads(lambda number: ReadBlocks(number, "previous")),
    "forecast": _reads(lambda number: ReadBlocks(number, "forecast")),
    # The default's forced blocks, which 96 fits
    "default": _reads(lambda number: ReadBlocks(number, sizes=BlockGeometry())),
    # The default without a Forecast
    "previousdefault": _reads(lambda number: ReadBlocks(number, "previous", sizes=BlockGeometry())),
    # Compressed keys of every 2, 4 or 8 tokens, not 16
    **{f"stride{stride}": _stride(stride) for stride in (2, 4, 8)},
    "union": _reads(lambda number: ReadBlocks(number, union=True)),
    "forecastunion": _reads(lambda number: ReadBlocks(number, "forecast", union=True)),
    # Votes: the paper's, and others
    "paper": _rocket(window=32),
    "window16": _rocket(window=16),
    "window128": _rocket(window=128),
    "pool15": _rocket(window=32, pool_kernel=15),
    # Page scores
    "moments": _rocket(make=lambda page, top_r, top_k: ReadPages(page, top_r, top_k, "moments")),
    "mean": _rocket(make=_mean),
    "meanpage2": _rocket(make=_mean, page_sizes=(2,)),
}


def schemes(names: list[str], context: int, network: Network) -> dict[str, Scheme]:
    """Schemes by name.

    Raises:
        ValueError: There is no such arm, or the laboratory does not know how it works.
    """
    return {name: _scheme(name, context, network) for name in names}


def _scheme(name: str, context: int, network: Network) -> Scheme:
    kind, _, number = name.rpartition("-")
    if kind.startswith("forecast") and network.forecast is None:
        raise ValueError(f"{name} needs weights: give --forecast FILE")
    if kind in KINDS and number.isdigit():
        return KINDS[kind](int(number), context, network.heads)
    arm = arms.parse_arm(name)
    return Scheme() if arm.settings is None else scheme_of(policy_of(arm, context, network.heads))
