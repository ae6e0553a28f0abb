# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What both backends tell vLLM of themselves, and how they learn a request's prompt length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.kv_cache_layout import KVCacheLayout

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


class SparseBackend:
    """Goes before a stock backend: decoder layers that write the KV cache themselves."""

    # ROCKETKV may write a replayed token only after compaction; SPARDA writes in the order that its
    # copies allow.
    forward_includes_kv_cache_update: bool = True
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16"]

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoder layers only."""
        return attn_type == "decoder"

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """How often a row's work is split depends on the batch."""
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head-major, so that a page of one KV head is one run of memory."""
        return (KVCacheLayout.LBHNC,)


def ask_for_prompt_lengths(vllm_config: VllmConfig) -> None:
    """Make the model runner hand each request's prompt length to the metadata builder.

    Both runners do if this is set; nothing else reads it for our backends.
    """
    vllm_config.model_config.model_arch_config.rswa_window = 1 << 30


def prompt_lengths(common: CommonAttentionMetadata) -> Tensor:
    """Prompt tokens of each row's request, int32 ``[R]``, zero for padding rows.

    On the device where the runner keeps them there (Model Runner V2), else on the host.
    """
    lengths = common.rswa_prefix_lens
    if lengths is None:  # a dummy run before the runner knows that we need them
        return torch.zeros(common.num_reqs, dtype=torch.int32)
    padding = common.num_reqs - len(lengths)
    if padding > 0:
        lengths = torch.nn.functional.pad(lengths, (0, padding))
    return lengths[: common.num_reqs].int()
