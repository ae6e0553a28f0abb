# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What vLLM allocates for a ROCKETKV layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kv.manager import RocketKVManager

if TYPE_CHECKING:
    from vllm_sparse.kv.retention import RetentionRule


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


# At import, because the scheduler's process first meets the spec when it unpickles one, and an
# unregistered subclass would silently get the stock manager. Registering before the built-in specs
# would hide them, so those come first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    RocketKVSpec, RocketKVManager, uniform_type_base_spec=FullAttentionSpec
)
