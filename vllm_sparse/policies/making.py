# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Makes the policy of a name for layers of a shape, or says why that cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sparse import registry
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.dispatch import FUSED

if TYPE_CHECKING:
    from vllm_sparse.policies.protocol import Policy, PolicySettings, Shape


def make_policy(name: str, settings: PolicySettings, shape: Shape) -> Policy:
    """The policy for layers of a shape.

    Args:
        name: In capitals, of a policy.
        settings: Its own.
        shape: Of the layers; vLLM probes them with blocks of one token.

    Raises:
        UnsupportedError: Blocks or heads do not suit the policy's pages, skipped layers do not suit
            what it gives up, or the policy contradicts itself.
    """
    kind: type[Policy] = registry.policy(name)
    policy = kind(settings, shape)
    if policy.index_width % min(policy.page_sizes):
        raise UnsupportedError(
            f"{name} has an index_width of {policy.index_width} numbers with heads of "
            f"{shape.head_dim}, which is no multiple of the smallest of page_sizes="
            f"{list(policy.page_sizes)}: a block has room for an index by the token. Choose page "
            "sizes of which the smallest divides it"
        )
    _check_kernel(name, policy)
    if policy.window and not policy.index_width:
        raise UnsupportedError(
            f"{name} has a window of {policy.window} tokens but no index: window queries wait for "
            "the next chunk where a block's index would be. Give the policy an index_width, as "
            "SNAPKV does, or no window"
        )
    if policy.index_width and len(policy.page_sizes) > 1 and not policy.moves:
        raise UnsupportedError(
            f"{name} has page_sizes={list(policy.page_sizes)} but leaves tokens in place: their "
            "index is built once for all requests that share a block. Let it name one size"
        )
    if settings.skip_layers and not policy.moves:
        _check_skipped(name, policy)
    if shape.block_size > 1:
        _check_block_size(policy, shape.block_size)
    return policy


def _check_kernel(name: str, policy: Policy) -> None:
    if not policy.kernel:
        return
    if policy.kernel not in FUSED:
        raise UnsupportedError(
            f"{name} names the fused step {policy.kernel!r}, but there are only {sorted(FUSED)}: "
            "register it in vllm_sparse.kernels.dispatch.FUSED where the policy is defined, or "
            "leave `kernel` out, and PyTorch runs the policy's functions"
        )
    if not policy.moves:
        raise UnsupportedError(
            f"{name} names the fused step {policy.kernel!r} but leaves tokens in place, where "
            "pages are as the stock kernel packs them, which fused steps do not read: leave "
            "`kernel` out"
        )


def _check_skipped(name: str, policy: Policy) -> None:
    longest, skipped = policy.shape.max_model_len, policy.settings.skip_layers
    first, last = policy.freed_blocks(longest, longest)
    if last > first:
        raise UnsupportedError(
            f"skip_layers={skipped}: layers that read everything would read blocks that {name} "
            "gives up, which others have by then; set it to 0"
        )


def _check_block_size(policy: Policy, block_size: int) -> None:
    if block_size % max(policy.page_sizes):
        raise UnsupportedError(
            f"--block-size {block_size} is not a multiple of the largest of "
            f"page_sizes={list(policy.page_sizes)}; pages may not straddle blocks"
        )
    shape = policy.shape
    room = policy.index_width * (block_size // min(policy.page_sizes))
    fp8 = ", or leave out --kv-cache-dtype fp8" if shape.query_slots > 1 else ""
    if policy.window and room < shape.group_size * shape.head_dim * shape.query_slots:
        raise UnsupportedError(
            f"--block-size {block_size} is too small for {shape.group_size} query heads per KV "
            f"head with page_sizes={list(policy.page_sizes)}: window queries that wait for the "
            "next chunk need room in a block. Raise --block-size" + fp8
        )
