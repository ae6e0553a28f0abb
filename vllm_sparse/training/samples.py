# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""From a sequence to what each layer's loss needs, computed by the model or read back from disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_sparse.policies.windows import compress_keys
from vllm_sparse.training.files import load_tensors, save_tensors
from vllm_sparse.training.forecast import input_layer
from vllm_sparse.training.objective import LiveTeacher, StoredTeacher, best_free_blocks, pooled

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_sparse.training.backbone import Backbone, LayerView
    from vllm_sparse.training.geometry import BlockGeometry
    from vllm_sparse.training.objective import Teacher
    from vllm_sparse.training.settings import TeacherKind


# Files of another format are not read again: the first one's teachers ignored the model's scale.
_CACHE_FORMAT = 2


@dataclass(frozen=True)
class LayerSample:
    """One layer and the query rows of one sequence that are trained on.

    Attributes:
        layer: The layer served.
        inputs: What its Forecast sees, ``[T, hidden]``.
        cos: RoPE table of cosines at the rows, ``[T, rotated]``.
        sin: Its sines, ``[T, rotated]``.
        positions: The rows, ascending, ``[T]``.
        compressed_keys: The layer's own, ``[G, C, D]``.
        teacher: Where the layer attends.
        tokens: Length of the sequence.
    """

    layer: int
    inputs: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    compressed_keys: Tensor
    teacher: Teacher
    tokens: int


def visit_layers(
    backbone: Backbone,
    tokens: Tensor,
    use: Callable[[LayerView, Tensor], None],
    route: Callable[[LayerView, Tensor], Tensor] | None = None,
) -> None:
    """Runs the model on a sequence; calls ``use`` for each layer with what its Forecast sees.

    Args:
        backbone: The model.
        tokens: Token ids, ``[n]``.
        use: Gets a layer, and the input ``[n, hidden]`` of that which looks ahead for it.
        route: The layer's attention; dense if omitted.
    """
    before: list[Tensor] = []

    def at_layer(view: LayerView) -> None:
        before.append(view.inputs)
        use(view, before[input_layer(view.layer) - view.layer - 1])
        del before[:-1]

    backbone.run(tokens, at_layer, route)


def sample_positions(tokens: int, count: int, tail: int, first: int, seed: int) -> Tensor:
    """The query rows of a sequence: random ones, and the last ones.

    Args:
        tokens: Length of the sequence.
        count: Rows wanted; 0 for every token.
        tail: How many of them are the last tokens (where a document's questions stand).
        first: First position worth training on; earlier ones read all they see.
        seed: Same seed, same rows.

    Returns:
        int64, ascending, ``[T]``.
    """
    if not count:
        return torch.arange(tokens)
    tail = min(tail, count, tokens - first)
    body = tokens - tail - first
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(body, generator=generator)[: max(0, count - tail)] + first
    return torch.cat((drawn.sort().values, torch.arange(tokens - tail, tokens)))


@dataclass(frozen=True)
class SampleSource:
    """Computes the samples of a sequence with the frozen model.

    Attributes:
        backbone: The model.
        geometry: Block sizes and counts.
        teacher: Which distribution to learn.
        queries: Rows per sequence, 0 for all.
        tail_queries: How many of them are the last tokens.
        sparse_forward: Let the model attend only to the blocks that the teacher chooses.
        chunk: Query rows at a time.
        seed: Of the choice of rows.
    """

    backbone: Backbone
    geometry: BlockGeometry
    teacher: TeacherKind
    queries: int = 0
    tail_queries: int = 0
    sparse_forward: bool = False
    chunk: int = 256
    seed: int = 0

    def visit(self, index: int, tokens: Tensor, use: Callable[[LayerSample], None]) -> None:
        """Calls ``use`` for each layer, in order.

        Args:
            index: The sequence's number, which decides the rows.
            tokens: Token ids, ``[n]``.
            use: Consumer; a layer's tensors are freed after it.
        """
        count = len(tokens)
        positions = sample_positions(
            count,
            self.queries,
            self.tail_queries,
            self.geometry.first_choice,
            # Any injective mixture will do; sequences must not share their rows.
            self.seed * 1_000_003 + index,
        ).to(self.backbone.device)

        def at_layer(view: LayerView, inputs: Tensor) -> None:
            keys, query = view.keys, view.query[:, positions]
            use(
                LayerSample(
                    view.layer,
                    inputs[positions],
                    view.cos[positions],
                    view.sin[positions],
                    positions,
                    compress_keys(keys, self.geometry.kernel_size, self.geometry.kernel_stride),
                    LiveTeacher(self.teacher, query, keys, positions, self.geometry, view.scale),
                    count,
                )
            )

        route = self._routed if self.sparse_forward else None
        visit_layers(self.backbone, tokens, at_layer, route)

    def _routed(self, view: LayerView, values: Tensor) -> Tensor:
        """Attention to the teacher's blocks only, ``[H, n, D]``."""
        heads, count, dim = view.query.shape
        kv_heads = view.keys.shape[0]
        positions = torch.arange(count, device=values.device)
        teacher = LiveTeacher(
            self.teacher, view.query, view.keys, positions, self.geometry, view.scale
        )
        grouped = view.query.view(kv_heads, -1, count, dim)
        output = torch.empty_like(grouped)
        for start in range(0, count, self.chunk):
            rows = positions[start : start + self.chunk]
            seen = int(rows[-1]) + 1
            scores = teacher.rows(start, start + len(rows))
            if not teacher.per_block:
                scores = pooled(scores, count, self.geometry)
            read = best_free_blocks(scores, rows, self.geometry)
            read |= ~self.geometry.free(rows, read.shape[-1])
            mask = read.repeat_interleave(self.geometry.block_size, -1)[..., :seen]
            mask = mask & (positions[:seen] <= rows.unsqueeze(-1))
            output[:, :, rows] = torch.nn.functional.scaled_dot_product_attention(
                grouped[:, :, rows],
                view.keys[:, None, :seen].expand(-1, grouped.shape[1], -1, -1),
                values[:, None, :seen].expand(-1, grouped.shape[1], -1, -1),
                attn_mask=mask.unsqueeze(1),
                scale=view.scale,
            )
        return output.view(heads, count, dim)


def _never() -> None:
    """Lets work go on."""


class CachedSource:
    """Keeps the samples of every sequence on disk, so that only the first epoch runs the model.

    One safetensors file per sequence. Values are stored as they are computed, so training with and
    without the cache is the same.

    Attributes:
        check: Called between layers while the model runs; may raise, and nothing is stored then.
    """

    def __init__(self, source: SampleSource, folder: Path) -> None:
        """Opens or creates the cache.

        Args:
            source: What fills it.
            folder: Parent of one folder per combination of settings.
        """
        self._source = source
        self.check: Callable[[], None] = _never
        described = {
            "format": _CACHE_FORMAT,
            "model": source.backbone.fingerprint(),
            "geometry": repr(source.geometry),
            "teacher": source.teacher,
            "queries": [source.queries, source.tail_queries, source.seed],
            "sparse_forward": source.sparse_forward,
        }
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
        self._folder = folder / key
        self._folder.mkdir(parents=True, exist_ok=True)

    def visit(self, index: int, tokens: Tensor, use: Callable[[LayerSample], None]) -> None:
        """Calls ``use`` for each layer, in order; the arguments are those of the source."""
        digest = hashlib.sha256(tokens.to(torch.int64).numpy().tobytes()).hexdigest()[:12]
        path = self._folder / f"{index:06d}-{digest}.safetensors"
        if not path.exists():
            self._fill(path, index, tokens)
        stored, _ = load_tensors(path, self._source.backbone.device)
        layers = sum(name.endswith(".teacher") for name in stored)
        for layer in range(layers):
            teacher = StoredTeacher(
                stored[f"{layer}.teacher"],
                self._source.teacher == "block-mass",
                float(stored[f"{layer}.scale"]),
            )
            use(
                LayerSample(
                    layer,
                    stored[f"{input_layer(layer)}.inputs"],
                    stored["cos"],
                    stored["sin"],
                    stored["positions"],
                    stored[f"{layer}.keys"],
                    teacher,
                    len(tokens),
                )
            )

    def _fill(self, path: Path, index: int, tokens: Tensor) -> None:
        tensors: dict[str, Tensor] = {}

        def keep(sample: LayerSample) -> None:
            self.check()
            layer = sample.layer
            if layer != 1:  # its input is layer 0's
                tensors[f"{input_layer(layer)}.inputs"] = sample.inputs
            tensors[f"{layer}.keys"] = sample.compressed_keys
            tensors[f"{layer}.teacher"] = self._all_rows(sample)
            tensors[f"{layer}.scale"] = torch.tensor(sample.teacher.scale, dtype=torch.float64)
            shared = {"cos": sample.cos, "sin": sample.sin, "positions": sample.positions}
            for name, tensor in shared.items():
                tensors.setdefault(name, tensor)

        self._source.visit(index, tokens, keep)
        save_tensors(path, tensors, {})

    def _all_rows(self, sample: LayerSample) -> Tensor:
        rows, chunk = len(sample.positions), self._source.chunk
        parts = [
            sample.teacher.rows(start, min(start + chunk, rows)) for start in range(0, rows, chunk)
        ]
        return torch.cat(parts, 1)
