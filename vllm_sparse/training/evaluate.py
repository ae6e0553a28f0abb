# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How well selectors find the blocks that a layer attends to, per layer and KV head.

Only blocks that are not always read count, and only queries that see more of them than they may
read. *Recall* is the share of the exact best blocks that a selector chooses; *mass* the attention
mass it captures, of all mass beyond the forced blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_sparse.policies.windows import compress_keys, forecast_scores, query_scores
from vllm_sparse.training.forecast import Forecast
from vllm_sparse.training.objective import LiveTeacher, best_free_blocks, pooled
from vllm_sparse.training.samples import sample_positions, visit_layers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from vllm_sparse.training.backbone import Backbone, LayerView
    from vllm_sparse.training.geometry import BlockGeometry

SELECTORS = ("exact", "query", "forecast", "lookahead-query", "previous", "random")


@dataclass(frozen=True)
class Report:
    """Means over queries.

    Attributes:
        recall: For each selector, ``[layers, G]``.
        mass: For each selector, ``[layers, G]``.
        queries: Queries counted, per layer.
    """

    recall: dict[str, Tensor]
    mass: dict[str, Tensor]
    queries: int

    def summary(self) -> dict[str, dict[str, float]]:
        """Means over layers and heads."""
        return {
            name: {
                "recall": round(float(self.recall[name].mean()), 4),
                "mass": round(float(self.mass[name].mean()), 4),
            }
            for name in self.recall
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "queries": self.queries,
            "mean": self.summary(),
            "recall": {n: t.double().round(decimals=4).tolist() for n, t in self.recall.items()},
            "mass": {n: t.double().round(decimals=4).tolist() for n, t in self.mass.items()},
        }

    def table(self) -> str:
        """Recall / mass per layer, as text."""
        names = list(self.recall)
        width = max(len(name) for name in names) + 2
        lines = ["recall / mass beyond the forced blocks, means over KV heads", ""]
        lines.append("layer".ljust(7) + "".join(name.rjust(width) for name in names))
        cells = [(str(i), slice(i, i + 1)) for i in range(len(self.recall[names[0]]))]
        for label, rows in [*cells, ("all", slice(None))]:
            values = (
                f"{self.recall[name][rows].mean():.3f}/{self.mass[name][rows].mean():.3f}"
                for name in names
            )
            lines.append(label.ljust(7) + "".join(value.rjust(width) for value in values))
        return "\n".join(lines)


class Evaluation:
    """Compares selectors on sequences.

    Attributes:
        selectors: Those compared.
    """

    def __init__(
        self,
        backbone: Backbone,
        geometry: BlockGeometry,
        forecast: Forecast | None = None,
        queries: int = 256,
        tail_queries: int = 0,
        chunk: int = 128,
        seed: int = 0,
    ) -> None:
        """Prepares an evaluation.

        Args:
            backbone: The model.
            geometry: Block sizes and counts.
            forecast: What to judge; without one only the training-free selectors are compared.
            queries: Query rows per sequence, 0 for all.
            tail_queries: How many of them are the last tokens.
            chunk: Rows at a time.
            seed: Of the rows and the random selector.
        """
        self._backbone, self._geometry, self._chunk = backbone, geometry, chunk
        self._ahead = forecasts_of(backbone, forecast)
        self._queries, self._tail, self._seed = queries, tail_queries, seed
        without = {"forecast", "lookahead-query"} - self._ahead.keys()
        self.selectors = [name for name in SELECTORS if name not in without]
        shape = (backbone.num_layers, backbone.num_kv_heads)
        self._sums = {
            (kind, name): torch.zeros(shape, dtype=torch.float64)
            for kind in ("recall", "mass")
            for name in self.selectors
        }
        self._counted = 0
        self._sequence = 0

    def run(self, sequences: Iterable[Tensor]) -> Report:
        """Evaluates all sequences, ``[n]`` token ids each."""
        for tokens in sequences:
            self.add(tokens)
        means = {key: value / max(1, self._counted) for key, value in self._sums.items()}
        return Report(
            {name: means["recall", name] for name in self.selectors},
            {name: means["mass", name] for name in self.selectors},
            self._counted,
        )

    def add(self, tokens: Tensor) -> None:
        """Adds one sequence."""
        sizes = self._geometry
        sizes.require_length(len(tokens))
        # The first choice, and a token that has one before it.
        first = sizes.first_choice + sizes.block_size
        positions = sample_positions(
            len(tokens),
            self._queries or len(tokens),
            self._tail,
            first,
            self._seed + self._sequence,
        ).to(self._backbone.device)
        visit_layers(
            self._backbone, tokens, lambda view, inputs: self._layer(view, inputs, positions)
        )
        self._counted += len(positions)
        self._sequence += 1

    def _layer(self, view: LayerView, inputs: Tensor, positions: Tensor) -> None:
        """Adds a layer; the look-ahead sees ``inputs``."""
        sizes, tokens = self._geometry, view.query.shape[1]
        keys = compress_keys(view.keys, sizes.kernel_size, sizes.kernel_stride)
        query = view.query[:, positions]
        exact = LiveTeacher("block-mass", query, view.keys, positions, sizes, view.scale)
        for start in range(0, len(positions), self._chunk):
            rows = positions[start : start + self._chunk]
            mass = exact.rows(start, start + len(rows))
            chosen = {"exact": best_free_blocks(mass, rows, sizes)}
            for name in self.selectors[1:]:
                scores = self._scores(name, view, inputs, keys, rows)
                chosen[name] = best_free_blocks(pooled(scores, tokens, sizes), rows, sizes)
            wanted = chosen["exact"].sum(-1).clamp_min(1)
            total = (mass * sizes.free(rows, mass.shape[-1])).sum(-1).clamp_min(1e-12)
            for name, blocks in chosen.items():
                hits = (blocks & chosen["exact"]).sum(-1) / wanted
                captured = (mass * blocks).sum(-1) / total
                self._sums["recall", name][view.layer] += hits.sum(-1).cpu()
                self._sums["mass", name][view.layer] += captured.sum(-1).cpu()

    def _scores(
        self, name: str, view: LayerView, inputs: Tensor, keys: Tensor, rows: Tensor
    ) -> Tensor:
        """Window scores of a selector, ``[G, T, C]``."""
        sizes = self._geometry
        inputs, cos, sin = inputs[rows], view.cos[rows], view.sin[rows]
        if name in self._ahead:
            return forecast_scores(self._ahead[name](view.layer, inputs, cos, sin), keys)
        if name == "random":
            generator = torch.Generator().manual_seed(
                (self._seed * 1009 + self._sequence) * 1_000_003
                + view.layer * 70_001
                + int(rows[0])
            )
            shape = (keys.shape[0], len(rows), keys.shape[1])
            return torch.rand(shape, generator=generator).to(keys.device)
        at = rows - 1 if name == "previous" else rows
        return query_scores(
            view.query[:, at],
            keys,
            at,
            kernel_size=sizes.kernel_size,
            kernel_stride=sizes.kernel_stride,
            scale=view.scale,
        )


def forecasts_of(backbone: Backbone, trained: Forecast | None) -> dict[str, Forecast]:
    """The selectors that look a layer ahead, as they are served.

    Args:
        backbone: The model.
        trained: A Forecast of it.

    Returns:
        ``lookahead-query``, if the model has query projections to start from, and ``forecast``.
    """
    found = {}
    if backbone.projection(0, "q_proj") is not None:
        sizes = backbone.num_layers, backbone.hidden_size, backbone.num_kv_heads, backbone.head_dim
        found["lookahead-query"] = Forecast(*sizes, bias=True)
        found["lookahead-query"].initialise("lookahead", backbone, 0)
    if trained is not None:
        found["forecast"] = trained
    return {name: each.to(backbone.device) for name, each in found.items()}


def plot(report: Report, path: Path) -> bool:
    """Draws recall per layer; False if matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for name, values in report.recall.items():
        if name != "exact":
            axes.plot(values.mean(1), marker="o", markersize=3, label=name)
    axes.set(xlabel="layer", ylabel="recall beyond the forced blocks", ylim=(0, 1))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True
