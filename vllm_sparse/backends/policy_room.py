# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a step under a policy takes of a GPU's memory beside the cache, before there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_sparse.backends.base import most_rows
from vllm_sparse.kernels.dispatch import policy_triton
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kv.tail.compaction import compaction_bytes
from vllm_sparse.steps.parked import MOST_COMPACTED_BYTES, compacted_bytes
from vllm_sparse.steps.select import MOST_INDEX_BYTES, rows_at_once

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_sparse.policies.protocol import Policy


def step_bytes(
    config: VllmConfig,
    policy: Policy,
    kv_heads: int,
    layers: int,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Most bytes that a step holds at a time: decode of all rows, or compaction of prompts.

    Args:
        config: vLLM's configuration.
        policy: Of the layers, for blocks as kernels take them.
        kv_heads: G of this rank.
        layers: How many share the cache.
        cache_dtype: As vLLM allocates it: fp8 are bytes.
        device: Where.
    """
    kernels, shape = policy_triton(device), policy.shape
    sizes = shape.block_size, shape.head_dim, min(policy.page_sizes)
    needed, longest = 0, config.model_config.max_model_len
    step = kernels.fused(policy.kernel)
    scratch = (step or kernels).decode_scratch_bytes
    if policy.top_k is not None and scratch is not None:
        layout = PageLayout(*sizes)
        needed = scratch(
            most_rows(config),
            -(-longest // shape.block_size),
            _most_blocks(config, layout, kv_heads * layers, cache_dtype, device),
            layout=layout,
            heads=kv_heads * shape.group_size,
            kv_heads=kv_heads,
            top_k=policy.top_k,
            dtype=config.model_config.dtype,
            device=device,
            most_rows=1 + config.num_speculative_tokens,
        )
        if step is None:
            needed += MOST_INDEX_BYTES
    if policy.moves and (step is None or step.compact_prompts is None):  # one after the other
        layout = PageLayout(*sizes, policy.index_width)
        needed = max(needed, compaction_bytes(longest, layout, policy, kv_heads, cache_dtype))
    elif policy.moves:
        dropped = policy.retention(longest).dropped_blocks
        sizes_of_one = longest, longest - dropped * shape.block_size
        one, all_rows = (
            compacted_bytes(count, *sizes_of_one, policy, kv_heads, cache_dtype.itemsize)
            for count in (1, most_rows(config))
        )
        needed = max(needed, one, min(all_rows, MOST_COMPACTED_BYTES))
    return needed


def scoring_parts(config: VllmConfig, policy: Policy, kv_heads: int) -> int:
    """In how many parts the largest captured batch is scored: one where a kernel does it.

    A graph's rows are as wide as the longest request, and each part is some forty launches.

    Args:
        config: vLLM's configuration.
        policy: Of the layers.
        kv_heads: G of this rank.
    """
    if policy.kernel or policy.top_k is None:
        return 1
    size, longest = policy.shape.block_size, config.model_config.max_model_len
    pages = -(-longest // size) * size // min(policy.page_sizes)
    rows = config.compilation_config.max_cudagraph_capture_size or 1
    return -(-rows // rows_at_once(policy, kv_heads, pages))


def _most_blocks(
    config: VllmConfig,
    layout: PageLayout,
    pages: int,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Blocks of so many pages that the cache can have: as many as the device's memory holds."""
    memory = config.cache_config.kv_cache_memory_bytes or 0
    if device.type == "cuda":
        memory = memory or torch.cuda.get_device_properties(device).total_memory
    elements = layout.token_elements + layout.channels * layout.pages_per_block
    return int(memory // (pages * elements * cache_dtype.itemsize))
