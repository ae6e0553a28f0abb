# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a policy decides: which prompt tokens stay, and which of the rest each decode step reads.

A policy is one file: its settings and a :class:`Policy`. Block accounting, compaction, page index,
attention, metrics and refusals are shared; they ask the policy. A policy in PyTorch runs
everywhere; ``kernel`` names a fused step where there is one, of those registered in
:data:`vllm_sparse.kernels.dispatch.FUSED`.

Notation: H query heads, G KV heads, D head size, n tokens, P tokens of a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field, model_validator

from vllm_sparse.config import CommonSettings
from vllm_sparse.policies.pages import page_tokens, select_pages

if TYPE_CHECKING:
    from torch import Tensor


class PolicySettings(CommonSettings):
    """Settings of every policy that keeps keys and values on the device."""

    token_budget: int = Field(1024, ge=16, description="KV pairs read per KV head and decode step.")
    max_token_budget: int | None = Field(
        None,
        ge=16,
        description="Largest `token_budget` that a single request may bring, on CPUs; not set: the "
        "configured one. See [requests](requests.md).",
    )
    min_context: int = Field(
        2048, ge=0, description="Prompts up to this many tokens are served densely."
    )
    skip_layers: int = Field(
        0,
        ge=0,
        description="First layers of the model whose decode reads every kept token, counting "
        "those that stay stock.",
    )
    keep_prefixes: bool = Field(
        True,
        description="Where tokens are moved: copy the last blocks of a prompt for the prefix cache "
        "before they are rewritten, and what is found there into them. Off: a prompt finds no more "
        "than what it would drop.",
    )
    huge_pages: bool = Field(
        True, description="Put a CPU's KV cache on huge pages, which scattered reads profit from."
    )

    @property
    def most_tokens(self) -> int:
        """The largest budget that a request may bring."""
        return self.max_token_budget or self.token_budget

    @model_validator(mode="after")
    def _bounded(self) -> PolicySettings:
        if self.most_tokens < self.token_budget:
            raise ValueError(
                f"max_token_budget={self.max_token_budget} is less than token_budget="
                f"{self.token_budget}, which requests have that ask for nothing; raise one or "
                "lower the other"
            )
        return self


class Retention(NamedTuple):
    """What happens to a prompt of a given length.

    Attributes:
        sparse: The request is served sparsely, else densely.
        dropped_blocks: Leading prompt blocks given back once the prompt is complete.
        page_size: Tokens per page of the index.
        top_r: Channels that the page scores of a fused step read, at least 1; without
            :attr:`Policy.kernel` nobody asks.
        reason: Why the request stays dense; empty when it does not.
    """

    sparse: bool
    dropped_blocks: int = 0
    page_size: int = 1
    top_r: int = 1
    reason: str = ""


@dataclass(frozen=True)
class Shape:
    """What a policy knows of the model and its cache.

    Attributes:
        head_dim: D.
        group_size: H / G.
        block_size: Tokens per block.
        max_model_len: Longest request in tokens.
        scale: What the layer multiplies logits with; ``1 / sqrt(D)`` if omitted, as where only
            lengths matter.
        query_slots: Numbers of the cache that one of a waiting query takes.
        learned_sinks: Logit of each query head that takes part in the layer's softmax beside those
            of tokens, ``[H]``; ``None`` where there is none, or where only lengths matter. What
            attends knows of it; a policy that compares or adds up softmaxes of heads should.
    """

    head_dim: int
    group_size: int
    block_size: int
    max_model_len: int
    scale: float | None = None
    query_slots: int = 1
    learned_sinks: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def logit_scale(self) -> float:
        """Some models (Granite, Gemma) have one of their own instead of ``1 / sqrt(D)``."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class Policy(ABC):
    """Decides from the prompt length and from queries and keys, never from a request's history.

    So scheduler and worker agree without talking, and a request's tokens do not depend on how it
    was chunked, batched or preempted.

    Attributes:
        settings: An instance of :attr:`Settings`.
        shape: The model's.
        moves: Kept tokens are gathered into the last blocks of the prompt, which thereby become
            private to the request, and the blocks before are given back. Otherwise tokens stay
            where they are, and the prompt's blocks stay shareable.
        kernel: Name of a fused step in :data:`vllm_sparse.kernels.dispatch.FUSED`, for policies
            that :attr:`moves` tokens; empty: PyTorch. Start-up refuses a name that is not there.
    """

    settings: Any
    shape: Shape

    Settings: ClassVar[type[PolicySettings]]
    moves: ClassVar[bool] = False
    kernel: ClassVar[str] = ""

    @abstractmethod
    def retention(self, prompt_len: int) -> Retention:
        """What happens to a prompt of ``prompt_len`` tokens; a pure function.

        Of settings only the token budget differs between requests; what a block looks like (pages,
        index, window) must not depend on it.
        """

    @property
    def top_k(self) -> int | None:
        """Tokens that each KV head attends to in a decode step; ``None``: all that it holds."""
        return None

    @property
    def window(self) -> int:
        """Last prompt tokens whose queries :meth:`keep` needs.

        They wait where an index will be, so that a window needs an :attr:`index_width`, also if
        nothing is chosen by it.
        """
        return 0

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """Tokens per page of the index, ascending; :meth:`retention` names one of them.

        A policy that :attr:`moves` tokens may have several, on CPUs.
        """
        return (1,)

    @property
    def index_width(self) -> int:
        """Numbers of a page's index per KV head; a multiple of the smallest page size.

        A block then has room for ``index_width / min(page_sizes)`` more numbers per token.
        """
        return 0

    @property
    def numbers_per_token(self) -> int:
        """Numbers that a block has room for, per token and KV head: key, value, index."""
        return 2 * self.shape.head_dim + self.index_width // min(self.page_sizes)

    @property
    def fused(self) -> bool:
        """Whether decode runs in a fused kernel, not composed of PyTorch's operations."""
        return self.moves and (bool(self.kernel) or self.top_k is None)

    def freed_blocks(self, prompt_len: int, num_tokens: int) -> tuple[int, int]:
        """Blocks ``[first, last)`` that no later step reads once ``num_tokens >= P`` are there."""
        return 0, self.retention(prompt_len).dropped_blocks

    def held_blocks(self, prompt_len: int, num_tokens: int) -> int:
        """Blocks that a request has left with ``num_tokens >= P`` tokens."""
        first, last = self.freed_blocks(prompt_len, num_tokens)
        return -(-num_tokens // self.shape.block_size) - max(last - first, 0)

    def publishable_tokens(self, prompt_len: int) -> int | None:
        """Leading tokens that the prefix cache may share; ``None``: all.

        A tail that was moved is never shared, and neither are outputs: with sparse attention the
        same token has other keys and values than in a prompt.
        """
        retention = self.retention(prompt_len)
        if not retention.sparse:
            return None
        if not self.moves:
            return prompt_len
        return self.shared_blocks(prompt_len, retention.dropped_blocks) * self.shape.block_size

    def shared_blocks(self, prompt_len: int, dropped_blocks: int) -> int:
        """Leading prompt blocks that are not private, if the policy :attr:`moves` tokens.

        Behind them lie the tail and, if that is smaller, the blocks in which window queries wait.
        """
        waiting = prompt_len // self.shape.block_size - self.room_for_window()
        return max(min(dropped_blocks, waiting), 0)

    def tail_blocks(self, prompt_len: int) -> range:
        """Full prompt blocks that are private, if their content is copied for others; else none."""
        retention = self.retention(prompt_len)
        if not (self.moves and retention.sparse and self.settings.keep_prefixes):
            return range(0)
        shared = self.shared_blocks(prompt_len, retention.dropped_blocks)
        return range(shared, prompt_len // self.shape.block_size)

    def hittable_blocks(self, prompt_len: int) -> int:
        """Leading prompt blocks that may come from the prefix cache where tails are copied.

        The request must compute the rest itself, of which the last queries choose what stays.
        """
        size = self.shape.block_size
        return max(min(prompt_len // size - self.room_for_window(), (prompt_len - 1) // size), 0)

    def keep(self, query_window: Tensor, keys: Tensor, count: int) -> Tensor:
        """Prompt tokens that stay, if the policy :attr:`moves` them.

        Args:
            query_window: Post-RoPE queries of the last ``window`` tokens, ``[H, window, D]``.
            keys: Post-RoPE keys of the prompt, ``[G, n, D]``.
            count: How many: the prompt less the whole blocks that :meth:`retention` drops, so up
                to a block more than it wanted to keep.

        Returns:
            Positions, int64 ``[G, count]``, ascending.
        """
        raise NotImplementedError(f"{type(self).__name__} moves tokens but has no keep()")

    def index(self, keys: Tensor, present: Tensor) -> Tensor:
        """The index of pages.

        Args:
            keys: ``[..., page_size, D]``; anything where nothing is present.
            present: Which tokens of a page exist, bool, broadcastable to ``[..., page_size]``.

        Returns:
            ``[..., index_width]``.
        """
        raise NotImplementedError(f"{type(self).__name__} has an index_width but no index()")

    def score(self, query: Tensor, index: Tensor, num_tokens: Tensor, page_size: int) -> Tensor:
        """How much each KV head wants to read each page.

        Args:
            query: Post-RoPE queries, ``[R, G, H / G, D]``.
            index: ``[R, G, pages, index_width]``; anything for pages beyond ``num_tokens``.
            num_tokens: Tokens that each row sees, ``[R]``; 0 for padding rows.
            page_size: Tokens per page.

        Returns:
            float32 ``[R, G, pages]``, free of NaN where a page holds tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} has a top_k but neither score nor select")

    def select(
        self, query: Tensor, index: Tensor | None, num_tokens: Tensor, page_size: int, width: int
    ) -> Tensor:
        """Tokens to attend to: the newest page, then pages by falling score.

        Places are those of the row's tokens: if the policy :attr:`moves` them, of what
        :meth:`keep` kept and of the outputs behind it, else of the whole sequence.

        Args:
            query: Post-RoPE queries, ``[R, G, H / G, D]``.
            index: ``[R, G, pages, index_width]``; ``None`` if the policy has none.
            num_tokens: Tokens that each row sees, ``[R]``; 0 for padding rows.
            page_size: Tokens per page.
            width: Width of the result.

        Returns:
            Places, int64 ``[R, G, width]``, ascending, of which the first
            ``min(width, num_tokens)`` count; depends on shapes only, as a captured graph needs.
        """
        assert index is not None
        scores = self.score(query, index, num_tokens, page_size)
        pages, taken = select_pages(scores, num_tokens, page_size, width)
        return page_tokens(pages, taken, page_size)[..., :width]

    def describe(self) -> str:
        """What is kept and read, for the start-up line."""
        read = "all kept tokens" if self.top_k is None else f"{self.top_k} tokens"
        return f"token budget {self.settings.token_budget}, decode reads {read} per KV head"

    def room_for_window(self) -> int:
        """Last full prompt blocks that window queries need while they wait for the prompt's end.

        They wait where the index of these blocks' pages would be, which nobody uses before.
        """
        if not self.window:
            return 0
        size = self.shape.block_size
        return -(-self.window // self._waiting(size)) + -(-self.window // size)

    def places_in_parts(self, part_size: int) -> int:
        """Window queries that can wait there if kernels take blocks in parts of so many tokens."""
        if not self.window:
            return 0
        size = self.shape.block_size
        blocks = -(-self.window // self._waiting(size))
        return blocks * (size // part_size) * self._waiting(part_size)

    def _waiting(self, tokens: int) -> int:
        """Queries that wait in place of the index of so many tokens."""
        shape = self.shape
        numbers = self.index_width * (tokens // min(self.page_sizes))
        return numbers // (shape.group_size * shape.head_dim * shape.query_slots)
