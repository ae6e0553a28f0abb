# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Plans a batch of single tokens where the tokens are, so that a CUDA graph can replay it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_sparse.buffers import vectors
from vllm_sparse.policies.selectors import Tokens
from vllm_sparse.steps.host import borrowed_blocks
from vllm_sparse.steps.host_step import DecodeRows, SpardaStep, WindowRows
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_sparse.policies.sparda import SpardaSettings
    from vllm_sparse.steps.host import SpardaPlanner


class RowPlanner:
    """Plans batches in which every row brings one token, into buffers that never move.

    A prompt's token that comes alone is dense unless prompts are sparse, and so is every token of a
    request that asks for it. No frames are set aside for all the blocks that these read, but a
    captured graph may run the step: so the attention over frames reads the host pool for them.
    Sparse ones that read another number of blocks than outputs, and dense ones beside sparse
    prompts, are left to the other planner, which no captured graph survives.

    Args:
        settings: Block geometry and what is sparse.
        max_rows: Most rows of a batch.
        device: Where the layers compute.
        captured: Graphs may replay a step for others of its size: nothing but the content of
            tensors may depend on the lengths, and nothing may wait for the device.
    """

    def __init__(
        self, settings: SpardaSettings, max_rows: int, device: torch.device, captured: bool
    ) -> None:
        self._settings = settings
        self._max_rows = max_rows
        self._device = device
        self._captured = captured
        self._buffers: tuple[Tensor, ...] = ()
        # Blocks that the rows of the last batch have written to, for who keeps something of it.
        self._follows = captured and settings.chosen_selector == "previous"
        self._written = torch.full((max_rows,), -1, dtype=torch.int64, device=device)

    def forget(self) -> None:
        """Another batch comes between those of single tokens."""
        self._written.fill_(-1)

    def plan(
        self,
        planner: SpardaPlanner,
        seq_lens: Tensor,
        host_lens: Tensor,
        prompt_lens: Tensor,
        block_table: Tensor,
        prefilling: bool,
        dense: Tensor | None = None,
        replayed: Tensor | None = None,
    ) -> SpardaStep | None:
        """Plan one step.

        Args:
            planner: Counts.
            seq_lens: Tokens of each row after the step, 0 for padding, ``[R]``.
            host_lens: Those on the host, ``[R]``.
            prompt_lens: Prompt tokens of each row's request, ``[R]``, anywhere.
            block_table: Physical blocks, int32 ``[R, max_blocks]``.
            prefilling: Whether any row is a prompt's, where it cannot be seen from the lengths.
            dense: Host bool ``[R]``: rows of requests that ask to read everything; ``None``: none.
            replayed: Host bool ``[R]``: rows of requests that were preempted with outputs;
                ``None`` where nobody tells.

        Returns:
            The metadata; ``None`` if the other planner must do it.
        """
        size, device, rows = self._settings.block_size, self._device, len(seq_lens)
        if not self._captured:
            block_table = block_table[:, : max(-(-int(host_lens.max()) // size), 1)]
        table, positions, clamped, slots, previous, framed, follows, unframed, index, nowhere = (
            part[:rows] for part in self._room(block_table.shape[1])
        )
        table = table[:, : block_table.shape[1]]
        table.copy_(block_table)
        torch.sub(seq_lens.long(), 1, out=positions)
        torch.clamp(positions, min=0, out=clamped)
        own = (clamped // size)[:, None]
        here = table.gather(1, own)[:, 0].long()
        if not self._captured and bool(
            borrowed_blocks(here, table, own[:, 0], planner.num_blocks).any()
        ):
            return None
        slots.copy_(torch.where(positions < 0, -1, here * size + clamped % size))
        before = (clamped - 1).clamp(min=0) // size
        previous.copy_(table.gather(1, before[:, None])[:, 0])
        if self._follows:
            # A block is written by one request: a row goes on where one has written its block.
            same = previous[:, None] == self._written
            follows.copy_(torch.where(same.any(1), same.byte().argmax(1), -1))
            self._written[:rows] = torch.where(positions < 0, -1, here)
            self._written[rows:] = -1
        framed.copy_(positions)
        if not self._captured:
            prefilling = bool((host_lens <= prompt_lens).any())
        dense_prompts = not self._settings.sparse_prefill
        if prefilling and not (dense_prompts or self._settings.prompts_like_outputs):
            return None
        if dense is not None and not dense_prompts:
            return None
        may_be_alone = dense_prompts and (prefilling or self._captured or dense is not None)
        if may_be_alone:
            alone = positions < upload(prompt_lens, device)
            if dense is not None:
                alone |= upload(dense, device) & (positions >= 0)
            framed.masked_fill_(alone, -1)
            unframed.copy_(torch.where(alone, positions + 1, 0))
        if prefilling:
            prompts = prompt_lens.cpu()
            planner.count_requests(host_lens - 1, host_lens, prompts, dense, replayed)
            if dense_prompts:
                host_lens = host_lens.where(host_lens > prompts, 0)
        if dense is not None:
            host_lens = host_lens.where(~dense, 0)
        scored = planner.count_rows(host_lens) or self._captured
        return SpardaStep(
            num_tokens=rows,
            slots=slots,
            last_in_block=index,
            windows=WindowRows(positions, table),
            decode=DecodeRows(
                Tokens(index, clamped, previous, nowhere, follows if self._follows else None),
                framed,
                table,
                unframed if may_be_alone else None,
                scored,
                True,
            ),
        )

    def _room(self, width: int) -> tuple[Tensor, ...]:
        """The buffers, at least so many blocks wide."""
        if not self._buffers or self._buffers[0].shape[1] < width:
            index = torch.arange(self._max_rows, device=self._device)
            self._buffers = (
                torch.zeros(self._max_rows, width, dtype=torch.int32, device=self._device),
                *vectors(6, self._max_rows, torch.int64, self._device),
                torch.zeros(self._max_rows, dtype=torch.int32, device=self._device),
                index,
                torch.full_like(index, -1),
            )
        return self._buffers
