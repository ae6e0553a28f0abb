# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The laboratory's arms by name: what is served, oracles, and what might be better.

Served arms have the names of `benchmarks.arms`; ROCKETKV's are the policy's own maths and plan.
Oracles, which no server could run, and candidates are listed in `KINDS` below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import arms
from benchmarks.quality.judge import MIN_CONTEXT
from benchmarks.quality.schemes import Keep, ReadBlocks, ReadPages, ReadTokens, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.quality.prompts import Network

BLOCK = 128  # tokens per block of vLLM's cache on a CPU: ROCKETKV keeps whole blocks


def everything(query: Any, held: Any) -> None:
    """Reads everything."""


class Rocket:
    """ROCKETKV at a budget: the policy's plan, with parts exchanged.

    Args:
        budget: ``token_budget``.
        context: ``max_model_len``.
        heads: Of `Network`.
        settings: Further settings of the policy.
    """

    def __init__(
        self, budget: int, context: int, heads: tuple[int, int, int], **settings: Any
    ) -> None:
        from vllm_sparse.policies.protocol import Shape
        from vllm_sparse.policies.rocketkv import RocketKV, RocketKVSettings

        query, groups, size = heads
        found = RocketKVSettings(token_budget=budget, **{"min_context": MIN_CONTEXT, **settings})
        self.policy = RocketKV(found, Shape(size, query // groups, BLOCK, context))

    def count(self, tokens: int) -> int | None:
        """Prompt tokens that stay."""
        retention = self.policy.retention(tokens)
        if not retention.sparse or not self.policy.settings.stage1:
            return None
        return tokens - retention.dropped_blocks * BLOCK

    def reader(self, tokens: int, make: Callable[[int, int, int], Any] | None = None) -> Any:
        """What a step of a prompt of so many tokens reads.

        Args:
            tokens: Length of the prompt.
            make: Of page size, channels and tokens to read, instead of the policy's own.
        """
        retention, top_k = self.policy.retention(tokens), self.policy.top_k
        if not retention.sparse or top_k is None:
            return everything
        make = make or ReadPages
        return make(retention.page_size, retention.top_r, top_k)

    def scheme(self, keep: Keep | None = None, make: Any = None) -> Scheme:
        """The scheme, with another way to keep or to read."""
        own = self.policy.settings
        return Scheme(
            self.count,
            keep or Keep(own.window, own.pool_kernel),
            lambda tokens: self.reader(tokens, make),
            own.skip_layers,
        )


def _rocket(keep: Keep | None = None, make: Any = None, **settings: Any) -> Callable[..., Scheme]:
    return lambda number, context, heads: Rocket(number, context, heads, **settings).scheme(
        keep, make
    )


def _reads(make: Callable[[int], Any]) -> Callable[..., Scheme]:
    return lambda number, context, heads: Scheme(read=lambda _: make(number))


KINDS: dict[str, Callable[[int, int, tuple[int, int, int]], Scheme]] = {
    # Oracles
    "exact": _reads(ReadTokens),
    "exactblocks": _reads(lambda number: ReadBlocks(number, "exact")),
    "idealvotes": _rocket(Keep(ideal=True)),
    "exactread": _rocket(make=lambda page, top_r, top_k: ReadTokens(top_k)),
    "exactpages": _rocket(make=lambda page, top_r, top_k: ReadPages(page, top_r, top_k, "exact")),
    # SPARDA's selectors
    "query": _reads(ReadBlocks),
    "previous": _reads(lambda number: ReadBlocks(number, "previous")),
    "union": _reads(lambda number: ReadBlocks(number, union=True)),
    # Candidates: votes
    "window128": _rocket(Keep(window=128)),
    "pool7": _rocket(Keep(pool=7)),
    "spread": _rocket(Keep(spread=0.5)),
    "odd": _rocket(Keep(odd=0.5)),
    # Candidates: page scores
    "moments": _rocket(make=lambda page, top_r, top_k: ReadPages(page, top_r, top_k, "moments")),
    "mean": _rocket(make=lambda page, top_r, top_k: ReadPages(page, top_r, top_k, "moments", 0.0)),
}


def schemes(names: list[str], context: int, network: Network) -> dict[str, Scheme]:
    """Schemes by name.

    Raises:
        ValueError: There is no such arm, or the laboratory does not know how it works.
    """
    return {name: _scheme(name, context, network) for name in names}


def _scheme(name: str, context: int, network: Network) -> Scheme:
    kind, _, number = name.rpartition("-")
    if kind in KINDS and number.isdigit():
        return KINDS[kind](int(number), context, network.heads)
    arm = arms.parse_arm(name)
    if arm.settings is None:
        return Scheme()
    if arm.backend == "ROCKETKV":
        settings = dict(arm.settings)
        return Rocket(settings.pop("token_budget"), context, network.heads, **settings).scheme()
    raise ValueError(f"{name} is served, but the laboratory has no scheme for it")
