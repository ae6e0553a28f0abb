# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The blocks that a sparse layer reads: sizes shared by training, evaluation and the server."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparse.errors import ConfigError


@dataclass(frozen=True)
class BlockGeometry:
    """Block sparsity of a layer; the fields mean what they mean in the SPARDA settings.

    Attributes:
        block_size: Tokens per block.
        kernel_stride: Tokens between compressed keys, each the mean of twice as many tokens.
        init_blocks: Blocks at the start that are always read.
        local_blocks: Blocks before the current one that are always read.
        top_k: Blocks read in total.
    """

    block_size: int = 64
    kernel_stride: int = 16
    init_blocks: int = 1
    local_blocks: int = 32
    top_k: int = 96

    def __post_init__(self) -> None:
        if self.block_size % (2 * self.kernel_stride):
            raise ConfigError(
                f"block_size={self.block_size} is not a multiple of two kernel_stride="
                f"{self.kernel_stride}"
            )
        if self.local_blocks < 1 or self.init_blocks < 1:
            raise ConfigError(
                f"init_blocks={self.init_blocks} and local_blocks={self.local_blocks} must be at "
                "least 1, or the newest keys would have to be known a layer ahead"
            )
        if self.free_picks < 1:
            raise ConfigError(
                f"top_k={self.top_k} leaves nothing to choose beside the {self.forced_blocks} "
                "blocks that are always read (init_blocks, local_blocks, the current one); raise "
                "top_k or lower local_blocks"
            )

    @property
    def kernel_size(self) -> int:
        """Tokens per compressed key."""
        return 2 * self.kernel_stride

    @property
    def windows_per_block(self) -> int:
        """Compressed keys that begin in a block."""
        return self.block_size // self.kernel_stride

    @property
    def forced_blocks(self) -> int:
        """Blocks that are always read."""
        return self.init_blocks + self.local_blocks + 1

    @property
    def free_picks(self) -> int:
        """Blocks that a selector chooses."""
        return self.top_k - self.forced_blocks

    def num_blocks(self, tokens: int) -> int:
        """Blocks of a sequence, the last one perhaps partial."""
        return -(-tokens // self.block_size)

    def free(self, positions: Tensor, num_blocks: int) -> Tensor:
        """Blocks that are visible and not always read.

        Args:
            positions: Absolute positions, ``[T]``.
            num_blocks: Blocks of the sequence.

        Returns:
            bool ``[T, num_blocks]``.
        """
        own = (positions // self.block_size).unsqueeze(-1)
        block = torch.arange(num_blocks, device=positions.device)
        return (block >= self.init_blocks) & (block < own - self.local_blocks)

    @property
    def first_choice(self) -> int:
        """First position that sees more blocks than it reads."""
        return self.top_k * self.block_size

    def require_length(self, tokens: int) -> None:
        """Refuses sequences in which every visible block is read anyway.

        Raises:
            ConfigError: There is nothing to learn from ``tokens`` tokens.
        """
        needed = (self.top_k + 1) * self.block_size
        if tokens < needed:
            raise ConfigError(
                f"seq_len={tokens} is too short: with block_size={self.block_size} and "
                f"top_k={self.top_k} a token reads all blocks up to {needed - self.block_size} "
                f"tokens, so nothing is selected. Use at least {needed} tokens (several times "
                f"that is better), or lower top_k (at least {self.forced_blocks + 1}) or "
                "local_blocks"
            )
