# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A step of SPARDA as the layers of a GPU see it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import compress
from operator import not_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_sparse.policies.selectors import Tokens
from vllm_sparse.steps.host import PromptRow, SpardaStep
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Rows:
    """Rows that decode one token each.

    Attributes:
        tokens: Their tokens; positions of padding rows are zero.
        positions: Position of each row's token, int64 ``[R]``; -1 for padding rows.
        table: Physical blocks, int32 ``[R, blocks]``.
        framed: The same as ``positions``, but -1 also for rows that have no frames.
        unframed: Tokens of those: they read them all from the host pool; 0 for others, int32
            ``[R]``. ``None`` if the step has none: its rows are not all the batch has.
    """

    tokens: Tokens
    positions: Tensor
    table: Tensor
    framed: Tensor
    unframed: Tensor | None

    @property
    def whole(self) -> bool:
        """They are the first rows of the batch, in order."""
        return self.unframed is not None


@dataclass(frozen=True)
class Fresh:
    """Rows that FlashAttention serves, all at once.

    Attributes:
        index: Batch positions of their tokens, int64 ``[T]``.
        starts: Where each row's tokens start among these, int32 ``[R + 1]``.
        longest: Tokens of the longest row.
    """

    index: Tensor
    starts: Tensor
    longest: int


@dataclass(frozen=True)
class GpuStep(SpardaStep):
    """See :class:`SpardaStep`; ``decode`` is replaced by ``rows``.

    Attributes:
        rows: Rows served from frames.
        fresh: Rows of prompts that have nothing earlier and read all that they have.
    """

    rows: Rows | None = None
    fresh: Fresh | None = None


def _fresh(prompts: Sequence[PromptRow], device: torch.device) -> Fresh | None:
    if not prompts:
        return None
    lengths = [prompt.end - prompt.begin for prompt in prompts]
    index = torch.cat([torch.arange(prompt.begin, prompt.end) for prompt in prompts])
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return Fresh(upload(index, device), upload(starts, device), max(lengths))


def on_device(step: SpardaStep, device: torch.device, flash: bool) -> GpuStep:
    """A step that the host planned, on the device.

    Args:
        step: The step.
        device: Where the layers compute.
        flash: Whether there is FlashAttention for rows without a past.
    """
    rows = None
    if step.decode is not None:
        tokens = step.decode.tokens
        table = upload(step.decode.block_table, device, torch.int32)
        moved = _moved(tokens, device)
        rows = Rows(moved, moved.positions, table, moved.positions, None)
    alone = [
        flash and p.tiles[0] == p.tiles[1] and p.sparse_from == p.end - p.begin
        for p in step.prompts
    ]
    fresh = _fresh(list(compress(step.prompts, alone)), device)
    streamed = compress(step.prompts, map(not_, alone))
    values = {item.name: getattr(step, item.name) for item in dataclasses.fields(step)}
    # The prompts' tiles stay: the stream makes indices of them on the host.
    return GpuStep(
        **{
            **_moved_values(values, device),
            "decode": None,
            "prompts": tuple(_moved(prompt, device) for prompt in streamed),
            "rows": rows,
            "fresh": fresh,
        }
    )


def _moved_values(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: upload(value, device) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def _moved(item: Any, device: torch.device) -> Any:
    values = {part.name: getattr(item, part.name) for part in dataclasses.fields(item)}
    moved = _moved_values(values, device)
    if isinstance(values.get("tokens"), Tokens):
        moved["tokens"] = _moved(values["tokens"], device)
    return dataclasses.replace(item, **moved)
