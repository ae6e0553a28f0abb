# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What vLLM allocates for a layer of our backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kv.manager import RocketKVManager, SpardaManager

if TYPE_CHECKING:
    from vllm_sparse.config import SpardaSettings
    from vllm_sparse.kv.tail.retention import RetentionRule


@dataclass(frozen=True, kw_only=True)
class RocketKVSpec(FullAttentionSpec):
    """Full attention whose prompt blocks may leave, with room for key extrema in each block.

    The extrema are part of the block, so vLLM's memory accounting covers them.

    Attributes:
        rule: Decides, from the prompt length, which blocks leave.
        instance_id: vLLM's instance, under whose name the scheduler's counters are published.
    """

    rule: RetentionRule = None  # type: ignore[assignment]
    instance_id: str = ""

    @classmethod
    def wrap(
        cls, spec: FullAttentionSpec, rule: RetentionRule, instance_id: str = ""
    ) -> RocketKVSpec:
        """A stock spec with a retention rule and the extrema's bytes."""
        per_token = 2 * spec.head_size
        content = per_token + per_token // min(rule.page_sizes)
        return replace_as(
            spec,
            cls,
            rule=rule,
            instance_id=instance_id,
            state_content_bytes=content * spec.dtype.itemsize,
        )

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for layers that share a block table; they share the rule too."""
        first = specs[0]
        return replace_as(super().merge(specs), cls, rule=first.rule, instance_id=first.instance_id)

    def layout(self, page_size: int) -> PageLayout:
        """Page geometry for requests with pages of ``page_size`` tokens."""
        return PageLayout(self.block_size, self.head_size, page_size)

    def publishable_tokens(self, prompt_len: int) -> int | None:
        """Leading tokens of a request that others may share; ``None``: all."""
        blocks = self.rule.publishable_blocks(prompt_len)
        return None if blocks is None else blocks * self.block_size


@dataclass(frozen=True, kw_only=True)
class SpardaSpec(FullAttentionSpec):
    """The compressed keys of a layer whose keys and values live in the host pool.

    A block holds the windows that end in it, one mean key each.

    Attributes:
        dense_len: Tokens that see at most this many are attended densely.
        sparse_prefill: Prompts are attended sparsely too.
        instance_id: vLLM's instance, under whose name the counters are published.
    """

    dense_len: int = 0
    sparse_prefill: bool = False
    instance_id: str = ""

    @classmethod
    def wrap(
        cls, spec: FullAttentionSpec, settings: SpardaSettings, instance_id: str = ""
    ) -> SpardaSpec:
        """A stock spec with compressed keys in place of keys and values."""
        windows = max(1, spec.block_size // settings.kernel_stride)
        return replace_as(
            spec,
            cls,
            dense_len=settings.dense_len,
            sparse_prefill=settings.sparse_prefill,
            instance_id=instance_id,
            tokens_per_state=spec.block_size,
            state_content_bytes=windows * spec.head_size * spec.dtype.itemsize,
        )

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for layers that share a block table; they share the settings too."""
        first = specs[0]
        return replace_as(
            super().merge(specs),
            cls,
            dense_len=first.dense_len,
            sparse_prefill=first.sparse_prefill,
            instance_id=first.instance_id,
        )

    def publishable_tokens(self, prompt_len: int) -> int | None:
        """Leading tokens of a request that others may share; ``None``: all.

        If only outputs are sparse, the same token has other keys and values as another request's
        prompt.
        """
        return None if self.sparse_prefill else max(prompt_len, self.dense_len)


# At import, because the scheduler's process first meets the spec when it unpickles one, and an
# unregistered subclass would silently get the stock manager. Registering before the built-in specs
# would hide them, so those come first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    RocketKVSpec, RocketKVManager, uniform_type_base_spec=FullAttentionSpec
)
KVCacheSpecRegistry.register(SpardaSpec, SpardaManager, uniform_type_base_spec=FullAttentionSpec)
