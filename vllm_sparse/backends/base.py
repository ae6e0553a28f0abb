# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What both backends tell vLLM of themselves, and how they learn a request's prompt length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


class SparseBackend(CPUAttentionBackend):
    """Decoder layers on a CPU, which write the KV cache themselves."""

    # ROCKETKV may write a replayed token only after compaction; SPARDA writes in the order that its
    # copies allow.
    forward_includes_kv_cache_update: bool = True
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16"]

    # What is not written yet for GPUs.
    _missing_on_gpus: ClassVar[str]

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Reasons against using this backend; asked by GPU platforms, and always one there."""
        reasons = super().validate_configuration(*args, **kwargs)
        if not current_platform.is_cpu():
            reasons.append(
                f"this release of vllm-sparse serves {cls.get_name()} on CPUs only; its GPU "
                f"{cls._missing_on_gpus} are not written yet"
            )
        return reasons

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoder layers only."""
        return attn_type == "decoder"


def ask_for_prompt_lengths(vllm_config: VllmConfig) -> None:
    """Make the model runner hand each request's prompt length to the metadata builder.

    Both runners do if this is set; nothing else reads it for our backends.
    """
    vllm_config.model_config.model_arch_config.rswa_window = 1 << 30


def prompt_lengths(common: CommonAttentionMetadata) -> Tensor:
    """Prompt tokens of each row's request, on the host, ``[R]``."""
    if common.rswa_prefix_lens is None:  # a dummy run before the runner knows that we need them
        return torch.zeros(common.num_reqs, dtype=torch.int32)
    return common.rswa_prefix_lens[: common.num_reqs].cpu()
