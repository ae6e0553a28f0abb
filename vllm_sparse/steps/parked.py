# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Prompts that a step begins with compacting, as many at once as scratch allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from vllm_sparse.policies.protocol import Policy
    from vllm_sparse.steps.layer import SparseLayer
    from vllm_sparse.steps.prompts import PromptEnd

# Bytes that prompts which are compacted together may take beside the cache.
MOST_COMPACTED_BYTES = 256 << 20


@dataclass(frozen=True)
class ParkedPrompts:
    """Prompts of one page size, all of whose window queries wait.

    Attributes:
        blocks: Each one's blocks up to its end, any behind, int32 ``[R, max_blocks]``.
        tails: Blocks that its queries wait in, int32 ``[R, n]``.
        lengths: P, int32 ``[R]``.
        dropped: Leading blocks that leave, int32 ``[R]``.
        most_kept: Tokens that one of them keeps, at most.
        page_size: Tokens per page.
    """

    blocks: Tensor
    tails: Tensor
    lengths: Tensor
    dropped: Tensor
    most_kept: int
    page_size: int


def compacted_bytes(
    prompts: int, tokens: int, kept: int, policy: Policy, kv_heads: int, itemsize: int
) -> int:
    """Bytes that compacting prompts in one chain of kernels takes beside the cache.

    Scores and pooled ones, what is chosen, its rows and the window's queries.

    Args:
        prompts: How many at once.
        tokens: Of the longest, in whole blocks.
        kept: Tokens that one of them keeps, at most.
        policy: Of the layers.
        kv_heads: G.
        itemsize: Bytes of a number of the cache.
    """
    shape = policy.shape
    rows = kept * (4 + 2 * shape.head_dim * itemsize)
    queries = policy.window * shape.group_size * shape.head_dim * 4
    return prompts * kv_heads * (2 * 4 * tokens + rows + queries)


def compact_parked(
    layers: Sequence[tuple[SparseLayer, Tensor]], prompts: Sequence[PromptEnd]
) -> None:
    """Compact prompts in every layer.

    Dozens may end in one step, and each would be eleven launches in every layer. How finely a
    prompt's scores are summed up follows how many there are, so that two which differ by a rounding
    may change places.

    Args:
        layers: Of one group, each with its cache, ``[blocks, G, block_size, C]``, changed.
        prompts: All of whose window queries wait.
    """
    first, cache = layers[0]
    if not first.compacts_together or first.parking is None:
        for prompt in prompts:
            for layer, own in layers:
                layer.compact_parked(own, prompt)
        return
    waiting = -(-first.policy.window // first.parking.per_block)
    size = first.stock_layout.block_size
    for group in _together(prompts, first.policy, size, cache):
        joined = _joined(group, waiting, size)
        for layer, own in layers:
            layer.compact_together(own, joined)


def _together(
    prompts: Sequence[PromptEnd], policy: Policy, size: int, cache: Tensor
) -> Iterator[list[PromptEnd]]:
    """Prompts of one page size and of similar lengths, as many as there is room for."""
    group: list[PromptEnd] = []
    kept = 0
    for prompt in sorted(prompts, key=lambda prompt: (prompt.page_size, prompt.prompt_len)):
        kept = max(kept, _kept(prompt, size))
        tokens = len(prompt.blocks) * size
        held = compacted_bytes(
            len(group) + 1, tokens, kept, policy, cache.shape[1], cache.element_size()
        )
        full = held > MOST_COMPACTED_BYTES
        if group and (full or prompt.page_size != group[0].page_size):
            yield group
            group, kept = [], _kept(prompt, size)
        group.append(prompt)
    if group:
        yield group


def _kept(prompt: PromptEnd, block_size: int) -> int:
    return prompt.prompt_len - prompt.dropped_blocks * block_size


def _joined(prompts: list[PromptEnd], waiting: int, block_size: int) -> ParkedPrompts:
    lengths, dropped = torch.stack([prompt.sizes for prompt in prompts], 1).unbind()
    tails = [prompt.blocks[prompt.shared_blocks :][:waiting] for prompt in prompts]
    return ParkedPrompts(
        torch.nn.utils.rnn.pad_sequence([prompt.blocks for prompt in prompts], batch_first=True),
        torch.stack(tails),
        lengths,
        dropped,
        max(_kept(prompt, block_size) for prompt in prompts),
        prompts[0].page_size,
    )
