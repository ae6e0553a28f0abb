# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What both backends have in common on GPUs."""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from vllm_sparse.backends.refusals import unsupported

# A child of vLLM's logger: others have no handler in its processes.
logger = init_logger("vllm.sparse")


class GpuBackend(FlashAttentionBackend):
    """FlashAttention says what the device cannot do, :mod:`.refusals` what we cannot."""

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Reasons against using this backend; vLLM lists them and stops."""
        return [
            *super().validate_configuration(*args, **kwargs),
            *unsupported(get_current_vllm_config(), cls.get_name(), True),
        ]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """ROCKETKV has nothing to evict in such layers, SPARDA needs all layers alike."""
        return False


def warn_of_gpus(name: str) -> None:
    """Say at start-up what has not been seen yet."""
    logger.warning_once(
        "%s has been tested on GPUs' code path with interpreted kernels only, not on a GPU. "
        "Run `make gpu-check` of vllm-sparse on this machine before you rely on it",
        name,
    )
