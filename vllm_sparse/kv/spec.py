# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What vLLM allocates for a layer of our backends."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Self

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_sparse.control import DENSE
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kv.manager import PolicyManager, PromptAwareManager
from vllm_sparse.policies.controlled import policy_for

if TYPE_CHECKING:
    import torch

    from vllm_sparse.control import Allowed
    from vllm_sparse.policies.protocol import Policy
    from vllm_sparse.policies.sparda import SpardaSettings


# Of one layer. vLLM copies layer by layer (our caches have layers outermost), through as much new
# memory as is copied: small beside what a step takes that does not live yet then.
LEAST_COPIED_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class SharedSpec(FullAttentionSpec):
    """What our specs have in common: layers that share a block table share all that they add.

    Attributes:
        instance: Under whose name the scheduler's counters are published; empty: they are not.
        allowed: What requests may ask for; ``None``: anything.
    """

    instance: str = field(default="", compare=False)
    allowed: Allowed | None = field(default=None, compare=False, repr=False)

    @classmethod
    def added(cls) -> set[str]:
        """Names of the fields that stock vLLM's spec has not."""
        return {part.name for part in fields(cls)} - {x.name for x in fields(FullAttentionSpec)}

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for layers that share a block table."""
        own = {name: getattr(specs[0], name) for name in cls.added()}
        return replace_as(super().merge(specs), cls, **own)


@dataclass(frozen=True, kw_only=True)
class PolicySpec(SharedSpec):
    """Full attention whose blocks a policy may give up, with room for a page index in each block.

    The index is part of the block, so vLLM's memory accounting covers it.

    Attributes:
        policy: Decides, from the prompt length, which blocks leave and which may be shared.
        backend: Its name, for the log.
        beside_others: Layers of other kinds share the pool.
        copied_bytes: Of one layer, that a step may copy if it is more than 32 MiB: what its
            activations take, which do not live yet then.
    """

    policy: Policy = None  # type: ignore[assignment]
    backend: str = ""
    beside_others: bool = False
    copied_bytes: int = 0

    @classmethod
    def wrap(
        cls,
        spec: FullAttentionSpec,
        policy: Policy,
        backend: str = "",
        instance: str = "",
        beside_others: bool = False,
        allowed: Allowed | None = None,
        copied_bytes: int = 0,
    ) -> PolicySpec:
        """A stock spec with a policy and its index's bytes."""
        return replace_as(
            spec,
            cls,
            policy=policy,
            backend=backend,
            instance=instance,
            beside_others=beside_others,
            allowed=allowed,
            copied_bytes=copied_bytes,
            state_content_bytes=policy.numbers_per_token * spec.dtype.itemsize,
        )

    def layout(self, page_size: int) -> PageLayout:
        """Page geometry for requests with pages of ``page_size`` tokens."""
        return PageLayout(self.block_size, self.head_size, page_size, self.policy.index_width)

    @property
    def most_copies(self) -> int:
        """Blocks that a step may copy."""
        return max(max(self.copied_bytes, LEAST_COPIED_BYTES) // self.page_size_bytes, 1)

    def publishable_tokens(self, prompt_len: int, control: int) -> int | None:
        """Leading tokens of a request that others may share; ``None``: all."""
        return policy_for(self.policy, control).publishable_tokens(prompt_len)

    def hittable_tokens(self, prompt_len: int, control: int) -> int | None:
        """Leading tokens of a request that may come from the prefix cache; ``None``: all."""
        policy, tail = policy_for(self.policy, control), self.tail_blocks(prompt_len, control)
        if not tail:
            return policy.publishable_tokens(prompt_len)
        return max(policy.hittable_blocks(prompt_len), tail.start) * self.block_size

    def tail_blocks(self, prompt_len: int, control: int) -> range:
        """Full prompt blocks of a request that are private, if their content is copied for others.

        Empty if it is not.
        """
        if self.beside_others:
            # vLLM copies of a block what its first layer there takes, which may be less than ours.
            return range(0)
        return policy_for(self.policy, control).tail_blocks(prompt_len)


@dataclass(frozen=True, kw_only=True)
class SpardaSpec(SharedSpec):
    """The compressed keys of a layer whose keys and values live in the host pool.

    A block holds the windows that end in it, one mean key each.

    Attributes:
        dense_len: Tokens that see at most this many are attended densely.
        alike: Prompts are attended as outputs are.
        sparse_prompts: Prompts are attended sparsely.
    """

    dense_len: int = 0
    alike: bool = False
    sparse_prompts: bool = False

    @classmethod
    def wrap(
        cls,
        spec: FullAttentionSpec,
        settings: SpardaSettings,
        instance: str = "",
        dtype: torch.dtype | None = None,
        allowed: Allowed | None = None,
    ) -> SpardaSpec:
        """A stock spec with compressed keys, of ``dtype``, in place of keys and values."""
        dtype = spec.dtype if dtype is None else dtype
        return replace_as(
            spec,
            cls,
            dtype=dtype,
            kv_quant_mode=KVQuantMode.NONE,
            dense_len=settings.dense_len,
            alike=settings.prompts_like_outputs,
            sparse_prompts=bool(settings.sparse_prefill),
            instance=instance,
            allowed=allowed,
            tokens_per_state=spec.block_size,
            state_content_bytes=settings.windows_per_block * spec.head_size * dtype.itemsize,
        )

    def publishable_tokens(self, prompt_len: int, control: int) -> int | None:
        """Leading tokens of a request that others may share; ``None``: all.

        If only outputs are sparse, or read more or less than prompts, the same token has other keys
        and values as another request's prompt. What a request attends densely at its own wish is
        as in others' prompts unless these are sparse.
        """
        if control == DENSE:
            return self.dense_len if self.sparse_prompts else None
        return None if self.alike else max(prompt_len, self.dense_len)

    def hittable_tokens(self, prompt_len: int, control: int) -> int | None:
        """Leading tokens of a request that may come from others: those that it may share itself."""
        return self.publishable_tokens(prompt_len, control)


# At import, because the scheduler's process first meets the spec when it unpickles one, and an
# unregistered subclass would silently get the stock manager. Registering before the built-in specs
# would hide them, so those come first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(PolicySpec, PolicyManager, uniform_type_base_spec=FullAttentionSpec)
KVCacheSpecRegistry.register(
    SpardaSpec, PromptAwareManager, uniform_type_base_spec=FullAttentionSpec
)
