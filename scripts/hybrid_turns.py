#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What three turns of a conversation find in the prefix cache beside states or sliding windows.

By vLLM's block accounting alone, without a model: stock attention, ours, and ours without what has
other layers keep something at our limit. Prints a table.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import CacheConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from vllm_sparse.kv.manager import PromptAwareManager
from vllm_sparse.kv.spec import PolicySpec
from vllm_sparse.policies.protocol import Shape
from vllm_sparse.policies.rocketkv import RocketKV

ATTENTION = {"num_kv_heads": 2, "head_size": 128, "dtype": torch.bfloat16}
BLOCKS = {"states": 640, "windows": 128}  # tokens; of Granite 4 H Small, and vLLM's on CPUs


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, nargs="+", default=[30_000, 30_900, 33_900])
    parser.add_argument("--chunk", type=int, default=8192, help="most tokens of a step")
    parser.add_argument("--window", type=int, default=4096, help="of sliding-window layers")
    options = parser.parse_args()
    init_none_hash(sha256)
    pin = PromptAwareManager._pin
    print("| beside | | " + " | ".join(f"turn {n + 1}" for n in range(len(options.turns))) + " |")
    print("|---" * (len(options.turns) + 2) + "|")
    for beside in BLOCKS:
        for name, ours, repaired in (
            ("stock", False, True), ("ROCKETKV, nothing kept at its limit", True, False),
            ("ROCKETKV", True, True),
        ):  # fmt: skip
            PromptAwareManager._pin = pin if repaired else _nothing  # type: ignore[method-assign]
            hits = conversation(options, beside, ours)
            print(f"| {beside} | {name} | " + " | ".join(f"{hit:,}" for hit in hits) + " |")


def _nothing(*_: Any) -> None:
    pass


def conversation(options: argparse.Namespace, beside: str, ours: bool) -> list[int]:
    """Tokens that each turn finds.

    Args:
        options: Lengths.
        beside: What other layers have.
        ours: Full attention is ROCKETKV's.
    """
    size, longest = BLOCKS[beside], 2 * max(options.turns)
    attention: Any = FullAttentionSpec(block_size=size, **ATTENTION)
    other: Any = SlidingWindowSpec(block_size=size, sliding_window=options.window, **ATTENTION)
    if beside == "states":
        other = MambaSpec(
            block_size=size, shapes=((1,),), dtypes=(torch.float32,), mamba_cache_mode="align"
        )
    if ours:
        shape = Shape(128, 8, size, longest, None, 1)
        policy = RocketKV(RocketKV.Settings(), shape)
        attention = PolicySpec.wrap(attention, policy, beside_others=True)
    groups = [KVCacheGroupSpec(["other"], other), KVCacheGroupSpec(["ours"], attention)]
    manager = KVCacheManager(
        KVCacheConfig(
            num_blocks=4 * longest // size, kv_cache_tensors=[], kv_cache_groups=groups,
            prefix_cache_retention_interval=CacheConfig().prefix_cache_retention_interval,
        ),
        max_model_len=longest, scheduler_block_size=size, hash_block_size=size,
        enable_caching=True,
    )  # fmt: skip
    return [turn(manager, options, length, size, beside) for length in options.turns]


def turn(
    manager: KVCacheManager, options: argparse.Namespace, length: int, size: int, beside: str
) -> int:
    """A prompt through all of its chunks; how many tokens it found."""
    request = Request(
        str(length), [1] * length, SamplingParams(max_tokens=8), None,
        block_hasher=get_request_block_hasher(size, sha256),
    )  # fmt: skip
    blocks, found, request.shared_prefix_boundary = manager.get_computed_blocks(request)
    computed = found
    while computed < length:
        end = min(computed + options.chunk, length)
        if beside == "states":  # as the scheduler does: states are kept where a chunk ends
            last, junction = length // size * size, request.shared_prefix_boundary
            end = end if end == length else end // size * size
            end = min((stop for stop in (last, junction) if computed < stop < end), default=end)
        hit = (found, blocks) if computed == found else (0, None)
        manager.new_step_starts()
        assert manager.allocate_slots(request, end - computed, *hit) is not None
        request.num_computed_tokens = computed = end
    manager.free(request)
    return found


if __name__ == "__main__":
    main()
