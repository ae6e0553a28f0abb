# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's loss: the KL divergence from where a layer attends to where its Forecast points.

Both sides are distributions over *columns*: windows (compressed keys) or, for the teacher
``block-mass``, blocks. All functions work on a chunk of query rows, so memory grows linearly with
the sequence; rows are independent, so the chunk size does not change the result.

Notation: H query heads, G KV heads, D head size, T query rows, n tokens, C windows, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vllm_sparse.policies.windows import (
    block_scores,
    compress_keys,
    forecast_scores,
    num_windows,
    query_scores,
)

if TYPE_CHECKING:
    from vllm_sparse.training.geometry import BlockGeometry
    from vllm_sparse.training.settings import Supervision, TeacherKind

_FLOOR = 1e-8
_HIDDEN = float("-inf")


def attention(query: Tensor, keys: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax attention of every query head, summed over the heads of a KV head.

    Args:
        query: Post-RoPE queries, ``[H, T, D]``.
        keys: ``[G, columns, D]``.
        visible: bool ``[T, columns]``.
        scale: Logit scale of the model.

    Returns:
        float32 ``[G, T, columns]``; rows that see nothing are zero.
    """
    heads, rows, dim = query.shape
    kv_heads = keys.shape[0]
    grouped = query.float().reshape(kv_heads, heads // kv_heads * rows, dim)
    logits = (grouped @ keys.float().transpose(1, 2)).mul_(scale)
    logits = logits.view(kv_heads, heads // kv_heads, rows, -1)
    logits.masked_fill_(~visible, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, -1).sum(1).mul_(visible)


class Teacher(Protocol):
    """What a layer attends to, for a fixed list of query rows."""

    @property
    def per_block(self) -> bool:
        """Whether columns are blocks."""

    @property
    def scale(self) -> float:
        """Logit scale of the layer, which is the student's too."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Distributions of some rows, float32 ``[G, stop - start, C or B]``, each with sum one."""


@dataclass(frozen=True)
class StoredTeacher:
    """A teacher that was computed before.

    Attributes:
        table: float32 ``[G, T, C or B]``.
        per_block: Whether columns are blocks.
        scale: Logit scale of the layer.
    """

    table: Tensor
    per_block: bool
    scale: float

    def rows(self, start: int, stop: int) -> Tensor:
        """Distributions of some rows, ``[G, stop - start, C or B]``."""
        return self.table[:, start:stop]


class LiveTeacher:
    """A teacher computed from a layer's queries and keys, a chunk of rows at a time.

    * ``fine``: SparDA's. Attention over means of two neighbouring keys, summed over the group, then
      the maximum over the 17 of them around each window.
    * ``query``: the InfLLM-v2 selector on the windows themselves.
    * ``block-mass``: the exact attention mass of each block, for models trained densely, which have
      no selector of their own.
    """

    def __init__(
        self,
        kind: TeacherKind,
        query: Tensor,
        keys: Tensor,
        positions: Tensor,
        geometry: BlockGeometry,
        scale: float,
    ) -> None:
        """Prepares the keys.

        Args:
            kind: Which distribution.
            query: Post-RoPE queries of the rows, ``[H, T, D]``.
            keys: Post-RoPE keys of the sequence, ``[G, n, D]``.
            positions: Ascending positions of the rows, ``[T]``.
            geometry: Block and window sizes.
            scale: Logit scale of the layer.
        """
        self.kind, self.scale = kind, scale
        self.per_block = kind == "block-mass"
        self._query, self._positions, self._geometry = query, positions, geometry
        self._tokens = keys.shape[1]
        if kind == "fine":
            keys = compress_keys(keys.float(), 2, 1)
        elif kind == "query":
            keys = compress_keys(keys, geometry.kernel_size, geometry.kernel_stride)
        self._keys = keys

    def rows(self, start: int, stop: int) -> Tensor:
        """Distributions of some rows, ``[G, stop - start, C or B]``."""
        query, positions = self._query[:, start:stop], self._positions[start:stop]
        scores = {"fine": self._fine, "query": self._windows, "block-mass": self._blocks}[
            self.kind
        ](query, positions)
        return scores / (scores.sum(-1, keepdim=True) + _FLOOR)

    def _attend(self, query: Tensor, positions: Tensor) -> Tensor:
        """Attention over the columns that begin at or before each position."""
        # No row of the chunk sees more, so the rest needs no work.
        seen = min(int(positions[-1]) + 1, self._keys.shape[1])
        visible = torch.arange(seen, device=query.device) <= positions.unsqueeze(-1)
        return attention(query, self._keys[:, :seen], visible, self.scale)

    def _fine(self, query: Tensor, positions: Tensor) -> Tensor:
        stride = self._geometry.kernel_stride
        wanted = num_windows(self._tokens, self._geometry.kernel_size, stride)
        scores = self._attend(query, positions)
        scores = functional.pad(scores, (0, max(0, self._tokens - 1 - scores.shape[-1])))
        aligned = functional.max_pool1d(scores, stride + 1, stride, padding=1)[..., :wanted]
        return functional.pad(aligned, (0, wanted - aligned.shape[-1]))

    def _windows(self, query: Tensor, positions: Tensor) -> Tensor:
        sizes = self._geometry
        return query_scores(
            query,
            self._keys,
            positions,
            kernel_size=sizes.kernel_size,
            kernel_stride=sizes.kernel_stride,
            scale=self.scale,
        )

    def _blocks(self, query: Tensor, positions: Tensor) -> Tensor:
        size = self._geometry.block_size
        scores = self._attend(query, positions)
        total = self._geometry.num_blocks(self._tokens) * size
        scores = functional.pad(scores, (0, total - scores.shape[-1]))
        return scores.unflatten(-1, (-1, size)).sum(-1)


def best_free_blocks(scores: Tensor, positions: Tensor, geometry: BlockGeometry) -> Tensor:
    """The highest scores among the blocks that are not always read.

    Args:
        scores: Block scores, ``[G, T, B]``.
        positions: ``[T]``.
        geometry: Block sizes and counts.

    Returns:
        bool ``[G, T, B]``, ``geometry.free_picks`` (or all, if fewer) true in each row. Together
        with the forced blocks they are what ``select_blocks`` returns.
    """
    free = geometry.free(positions, scores.shape[-1])
    scores = scores.float().clamp_min(torch.finfo(torch.float32).min).masked_fill(~free, _HIDDEN)
    picks = min(geometry.free_picks, scores.shape[-1])
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :picks]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return chosen & free


def pooled(windows: Tensor, tokens: int, geometry: BlockGeometry) -> Tensor:
    """Block scores of window scores, ``[G, T, C]`` to ``[G, T, B]``."""
    return block_scores(windows, geometry.num_blocks(tokens), geometry.windows_per_block)


def student_logits(
    forecast: Tensor,
    compressed_keys: Tensor,
    positions: Tensor,
    geometry: BlockGeometry,
    scale: float,
) -> Tensor:
    """Logits of the Forecast over the windows that begin at or before each position.

    Args:
        forecast: ``[G, T, D]``.
        compressed_keys: ``[G, C, D]``.
        positions: ``[T]``.
        geometry: Window sizes.
        scale: Logit scale of the layer; SparDA's ``1 / sqrt(D)`` is that of its models.

    Returns:
        float32 ``[G, T, C]``, minus infinity for later windows.
    """
    logits = forecast_scores(forecast, compressed_keys) * scale
    starts = torch.arange(logits.shape[-1], device=logits.device) * geometry.kernel_stride
    return logits.masked_fill(starts > positions.unsqueeze(-1), _HIDDEN)


def _kl(teacher: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """KL over the masked columns and one column for the rest."""
    target, target_rest = _reduced(teacher, mask)
    student, student_rest = _reduced(torch.softmax(logits, -1), mask)
    columns = torch.where(mask, target * (target.log() - student.log()), 0.0)
    return columns.sum(-1) + target_rest * (target_rest.log() - student_rest.log())


def _reduced(probabilities: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked columns (one elsewhere) and the mass of the others, with sum one."""
    kept = probabilities.masked_fill(~mask, 0.0)
    rest = (probabilities.sum(-1) - kept.sum(-1)).clamp_min(_FLOOR)
    kept = kept.clamp_min(_FLOOR)
    total = kept.masked_fill(~mask, 0.0).sum(-1) + rest
    return (kept / total.unsqueeze(-1)).masked_fill(~mask, 1.0), rest / total


def _free_kl(teacher: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """KL between both distributions restricted to the masked columns; zero without any."""
    lowest = torch.finfo(logits.dtype).min
    target = teacher.masked_fill(~mask, 0.0)
    total = target.sum(-1, keepdim=True)
    target = target / total.clamp_min(_FLOOR)
    student = torch.log_softmax(logits.masked_fill(~mask, lowest), -1)
    # A target that underflowed to zero adds zero.
    terms = target * (target.clamp_min(torch.finfo(target.dtype).tiny).log() - student)
    return torch.where(mask & (total > 0), terms, 0.0).sum(-1)


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient was computed with it."""

    @staticmethod
    def forward(ctx: Any, forecast: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None


def forecast_loss(
    forecast: Tensor,
    teacher: Teacher,
    compressed_keys: Tensor,
    positions: Tensor,
    tokens: int,
    geometry: BlockGeometry,
    supervision: Supervision = "selected",
    chunk: int | None = 256,
) -> Tensor:
    """The loss of one layer: the mean over KV heads and rows of the KL divergence.

    Args:
        forecast: Post-RoPE Forecast for this layer, ``[G, T, D]``; the loss is differentiable
            once with respect to it.
        teacher: Where the layer attends. If its columns are blocks, the student's score of a block
            is what the server ranks by, the maximum over its windows.
        compressed_keys: The layer's own compressed keys, ``[G, C, D]``.
        positions: Ascending positions of the rows, ``[T]``.
        tokens: Length of the sequence.
        geometry: Block sizes and counts.
        supervision: ``selected``, SparDA's: the columns of the teacher's chosen blocks, and all
            others as one. ``free``: the columns of all blocks that are not always read, both
            distributions restricted to them. It ranks what a selector has to rank, and nothing
            else.
        chunk: Rows at a time; None for all at once. Changes memory, not the result.

    Returns:
        float32 scalar.
    """

    def losses(vectors: Tensor, target: Tensor, at: Tensor) -> Tensor:
        """Of a chunk of rows, float32 ``[G, T]``."""
        logits = student_logits(vectors, compressed_keys, at, geometry, teacher.scale)
        if teacher.per_block:
            logits = pooled(logits, tokens, geometry)
        if supervision == "free":
            mask = geometry.free(at, geometry.num_blocks(tokens)).expand(len(target), -1, -1)
        else:
            scores = target if teacher.per_block else pooled(target, tokens, geometry)
            mask = best_free_blocks(scores, at, geometry)
        if not teacher.per_block:
            mask = mask.repeat_interleave(geometry.windows_per_block, -1)[..., : target.shape[-1]]
        return (_free_kl if supervision == "free" else _kl)(target, logits, mask)

    gradient, found = torch.empty_like(forecast), []
    count, total = forecast.shape[0] * forecast.shape[1], forecast.shape[1]
    for start in range(0, total, chunk or max(1, total)):
        rows = slice(start, min(start + (chunk or total), total))
        target = teacher.rows(rows.start, rows.stop)
        with torch.enable_grad():
            leaf = forecast[:, rows].detach().requires_grad_()
            loss = losses(leaf, target, positions[rows])
            (gradient[:, rows],) = torch.autograd.grad(loss.sum() / count, leaf)
        found.append(loss.detach())
    apply: Any = _KnownGradient.apply
    return apply(forecast, torch.cat(found, 1).sum() / count, gradient)
