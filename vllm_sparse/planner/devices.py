# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a decode step is limited by on a kind of device: estimates, none of them measured by us."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """A kind of device.

    Attributes:
        name: In tables.
        memory_gib: Of one.
        bytes_per_s: That a kernel reaches: about 85 % of what is published.
        link_bytes_per_s: From host memory.
        launch_us: What a kernel launch takes in a captured graph.
        block_size: vLLM's tokens per block, if nobody sets it.
        policy_block_size: Those of a policy.
        batched_tokens: vLLM's ``--max-num-batched-tokens`` for its server: more from 70 GiB on,
            but not for A100s.
        flash_attention: Newest version of FlashAttention that it runs.
    """

    name: str
    memory_gib: float
    bytes_per_s: float
    link_bytes_per_s: float
    launch_us: float = 2.4
    block_size: int = 16
    policy_block_size: int = 64
    batched_tokens: int = 8192
    flash_attention: int = 2


# One memory: no link and no launches. Bandwidth of two channels of DDR5; see --bandwidth.
CPU = Device("CPU", 0.0, 20e9, 20e9, 0.0, 128, 128, 2048)

DEVICES = {
    "h200": Device("H200", 140.0, 4.1e12, 50e9, flash_attention=3),
    "h100": Device("H100 SXM", 79.6, 2.85e12, 50e9, flash_attention=3),
    "a100": Device("A100 80 GB", 79.3, 1.7e12, 24e9, batched_tokens=2048),
    "l40s": Device("L40S", 44.5, 0.73e12, 24e9, batched_tokens=2048),
    "l4": Device("L4", 22.0, 0.25e12, 12e9, batched_tokens=2048),
    "cpu": CPU,
}

# Kernels of a layer's attention in a decode step: what a launch costs matters to short contexts.
DENSE_LAUNCHES, SPARDA_LAUNCHES = 2, 8
POLICY_LAUNCHES = 4
"""RocketKV's three and stock's write of keys and values."""
