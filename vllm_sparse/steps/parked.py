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

    from vllm_sparse.steps.layer import SparseLayer
    from vllm_sparse.steps.prompts import PromptEnd

# Bytes that the scores of prompts that are compacted together may take.
MOST_SCORED_BYTES = 64 << 20


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


def scored_bytes(tokens: int, kv_heads: int) -> int:
    """Bytes that the scores of so many tokens take, and the pooled ones.

    Args:
        tokens: Of all prompts.
        kv_heads: G.
    """
    return 2 * 4 * tokens * kv_heads


def compact_parked(
    layers: Sequence[tuple[SparseLayer, Tensor]], prompts: Sequence[PromptEnd]
) -> None:
    """Compact prompts in every layer.

    Dozens may end in one step, and each would be eleven launches in every layer.

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
    for group in _together(prompts, waiting, first.stock_layout.block_size, cache.shape[1]):
        for layer, own in layers:
            layer.compact_together(own, group)


def _together(
    prompts: Sequence[PromptEnd], waiting: int, block_size: int, kv_heads: int
) -> Iterator[ParkedPrompts]:
    """Prompts of one page size and of similar lengths, as many as scores have room for."""
    group: list[PromptEnd] = []
    for prompt in sorted(prompts, key=lambda prompt: (prompt.page_size, prompt.prompt_len)):
        tokens = (len(group) + 1) * len(prompt.blocks) * block_size
        full = scored_bytes(tokens, kv_heads) > MOST_SCORED_BYTES
        if group and (full or prompt.page_size != group[0].page_size):
            yield _joined(group, waiting, block_size)
            group = []
        group.append(prompt)
    if group:
        yield _joined(group, waiting, block_size)


def _joined(prompts: list[PromptEnd], waiting: int, block_size: int) -> ParkedPrompts:
    lengths, dropped = torch.stack([prompt.sizes for prompt in prompts], 1).unbind()
    tails = [prompt.blocks[prompt.shared_blocks :][:waiting] for prompt in prompts]
    return ParkedPrompts(
        torch.nn.utils.rnn.pad_sequence([prompt.blocks for prompt in prompts], batch_first=True),
        torch.stack(tails),
        lengths,
        dropped,
        max(prompt.prompt_len - prompt.dropped_blocks * block_size for prompt in prompts),
        prompts[0].page_size,
    )
