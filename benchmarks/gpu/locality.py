# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whether ROCKETKV, with random weights, gathers tokens that lie scattered: the worst case.

If all keys were alike, ties would select one run of tokens, which is read much faster. Called
through `LLM.collective_rpc`.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import torch

LEAST_SHARE = 0.25


class Locality(NamedTuple):
    """What one KV head selects of one request, the median over layers and heads.

    Attributes:
        runs: Of slots that follow each other.
        pages: That are selected: the most runs there can be.
    """

    runs: float
    pages: float

    @property
    def scattered(self) -> bool:
        """Whether a good part of the pages lie apart."""
        return self.runs >= LEAST_SHARE * self.pages


def runs_of(slots: torch.Tensor) -> torch.Tensor:
    """Runs of slots that follow each other, along the last axis."""
    return 1 + (slots.sort(-1).values.diff(dim=-1) > 1).sum(-1)


def selected(worker: Any, seed: int) -> Locality:
    """What a random query selects of the first row of the last decode step, in every layer.

    Args:
        worker: vLLM's, on a GPU or on its path.
        seed: Of the queries.
    """
    from vllm_sparse.kernels.triton import pages

    builder = worker.model_runner.attn_groups[0][0].get_metadata_builder()
    rows, count = builder._rows, 1
    table, lengths, top_r = (part[:count] for part in (rows.block_table, rows.lengths, rows.top_r))
    generator = torch.Generator(table.device).manual_seed(seed)
    found: list[int] = []
    for layer in builder.layers:
        impl, cache = layer.impl, layer.kv_cache
        shape = (count, impl.num_heads, impl.head_size)
        query = torch.randn(shape, generator=generator, device=table.device).to(cache.dtype)
        common = {"layout": impl.stock_layout, "top_k": impl.top_k}
        scores = pages.score_pages(cache, query, table, lengths, top_r, **common)
        slots = pages.select_slots(
            scores, table, lengths, top_r, kv_heads=impl.num_kv_heads, **common
        )
        found += runs_of(slots[0]).tolist()
    taken = min(impl.top_k, int(lengths[0]))
    return Locality(statistics.median(found), taken / impl.stock_layout.page_size)
