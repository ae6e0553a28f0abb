# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Every metric that is published, in words: ``docs/metrics.md`` is made from this."""

from __future__ import annotations

from typing import Literal, NamedTuple

from vllm_sparse.features import POLICIES, SPARDA

PREFIX = "vllm:sparse_"

Family = Literal["policies", "SPARDA"]


class Reason(NamedTuple):
    """A value of the label ``reason``.

    Attributes:
        value: The value.
        meaning: When.
        family: Who counts it; ``None``: all.
    """

    value: str
    meaning: str
    family: Family | None = None


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name: Without the prefix, and without a counter's ``_total``.
        unit: What is counted.
        meaning: One sentence.
        family: Who counts it; ``None``: all.
        gauge: Goes down too.
        per_rank: Each tensor-parallel rank has a share of its own, and shares are added. The others
            are the same on every rank, one of which speaks.
        reasons: Values of the label ``reason``; none: no label. Policies of other packages may have
            further ones.
    """

    name: str
    unit: str
    meaning: str
    family: Family | None = None
    gauge: bool = False
    per_rank: bool = False
    reasons: tuple[Reason, ...] = ()

    @property
    def series(self) -> str:
        """The name in a query."""
        return f"{PREFIX}{self.name}{'' if self.gauge else '_total'}"


_ALL = (
    Metric(
        "requests",
        "requests",
        "Requests served by sparse attention from their prompt's end on",
    ),
    Metric(
        "dense_fallbacks",
        "requests",
        "Requests served by dense attention, by reason",
        reasons=(
            Reason("short_prompt", "The prompt has at most `min_context` tokens", POLICIES),
            Reason("fits_budget", "What the policy keeps would be the whole prompt", POLICIES),
            Reason("shorter_than_dense_len", "The prompt is shorter than `dense_len`", SPARDA),
            Reason("requested", "[The request asks for it](requests.md)"),
        ),
    ),
    Metric(
        "decode_rows",
        "rows",
        "Decode rows, one token of one request each: the sparse ones; with SPARDA all that read "
        "frames, those of short contexts too",
    ),
    Metric(
        "visible_tokens",
        "tokens",
        "Context tokens of sparse decode rows: what dense attention would read",
        POLICIES,
    ),
    Metric(
        "selected_tokens",
        "tokens",
        "Context tokens that sparse decode rows attended to, per KV head and layer",
        POLICIES,
    ),
    Metric(
        "prompts_compacted",
        "prompts",
        "Prompts whose KV cache was compacted after prefill",
        POLICIES,
    ),
    Metric(
        "blocks_evicted",
        "blocks",
        "KV blocks given back to the pool, after prefill or as a window moves on",
        POLICIES,
    ),
    Metric(
        "prefix_blocks_copied_in",
        "blocks",
        "KV blocks found in the prefix cache that were copied, as their request rewrites them",
        POLICIES,
    ),
    Metric(
        "prefix_tokens_copied_in",
        "tokens",
        "Their tokens, which the request need not compute: of vLLM's `prefix_cache_hits`, those "
        "that are owed to copies",
        POLICIES,
    ),
    Metric(
        "prefix_blocks_copied_out",
        "blocks",
        "KV blocks copied for the prefix cache before their request rewrote them",
        POLICIES,
    ),
    Metric(
        "prefix_blocks_not_copied",
        "blocks",
        "KV blocks that the prefix cache lost, or a request did not take from it, for want of a "
        "copy",
        POLICIES,
        reasons=(
            Reason("pool_short", "Running requests may need the blocks that are free", POLICIES),
            Reason("step_limit", "The step copies all that it may copy at once", POLICIES),
            Reason(
                "hit_cut",
                "The pool did not hold a prompt, what it hit and the copies of that at once",
                POLICIES,
            ),
        ),
    ),
    Metric(
        "prefix_limits_missed",
        "prompts",
        "Prompts whose shareable part ended in their first chunk, too late for the window or state "
        "layers beside ours to keep what a prefix hit there needs",
        POLICIES,
    ),
    Metric(
        "blocks_saved",
        "blocks",
        "KV blocks that running requests have given back: dense attention would hold them too",
        POLICIES,
        gauge=True,
    ),
    Metric(
        "pool_blocks",
        "blocks",
        "KV blocks that vLLM's pool can hold; with SPARDA they lie in host memory",
        gauge=True,
    ),
    Metric(
        "visible_blocks",
        "blocks",
        "Blocks of decode rows: what dense attention would read",
        SPARDA,
    ),
    Metric(
        "selected_blocks",
        "blocks",
        "Blocks that decode rows read, per KV head and layer",
        SPARDA,
    ),
    Metric(
        "prompt_blocks_visible",
        "pieces",
        "Blocks before those of a sparse chunk's own tokens, of each KV head and layer",
        SPARDA,
        per_rank=True,
    ),
    Metric(
        "prompt_blocks_needed",
        "pieces",
        "Of these, blocks that some token of the chunk read",
        SPARDA,
        per_rank=True,
    ),
    Metric(
        "prompt_chunks_streamed_whole",
        "chunks",
        "Chunks of prompts, or of what is computed again, with both dense and sparse tokens: all "
        "earlier blocks are streamed back, chosen or not",
        SPARDA,
    ),
    Metric(
        "frame_hits",
        "pieces",
        "Selected blocks of a KV head that were on the device",
        SPARDA,
        per_rank=True,
    ),
    Metric(
        "frame_misses",
        "pieces",
        "Selected blocks of a KV head that were fetched from the host",
        SPARDA,
        per_rank=True,
    ),
    Metric(
        "prefetch_issued",
        "pieces",
        "Fetches that were issued a layer ahead",
        SPARDA,
        per_rank=True,
    ),
    Metric(
        "prefetch_late",
        "pieces",
        "Fetches issued ahead that were not complete when their layer needed them; 0 on GPUs",
        SPARDA,
        per_rank=True,
    ),
    Metric(
        "prefetch_wasted",
        "pieces",
        "Fetches issued ahead that no layer read; 0 on GPUs",
        SPARDA,
        per_rank=True,
    ),
    Metric(
        "host_to_device_bytes",
        "bytes",
        "KV bytes fetched for decode, from the host to the device",
        SPARDA,
        per_rank=True,
    ),
    Metric(
        "streamed_bytes",
        "bytes",
        "KV bytes streamed back for prompts, from the host to the device",
        SPARDA,
        per_rank=True,
    ),
    Metric(
        "device_to_host_bytes",
        "bytes",
        "KV bytes written through to the host",
        SPARDA,
        per_rank=True,
    ),
    Metric(
        "exposed_wait_seconds",
        "seconds",
        "Time that layers waited for KV copies; 0 on GPUs, where the host does not wait",
        SPARDA,
        per_rank=True,
    ),
    Metric(
        "host_pool_bytes",
        "bytes",
        "Host memory for keys and values",
        SPARDA,
        gauge=True,
        per_rank=True,
    ),
    Metric(
        "slab_bytes",
        "bytes",
        "Device memory for frames",
        SPARDA,
        gauge=True,
        per_rank=True,
    ),
    Metric(
        "slab_frames",
        "frames",
        "Frames of the device slab, of all layers",
        SPARDA,
        gauge=True,
        per_rank=True,
    ),
    Metric(
        "slab_frames_in_use",
        "frames",
        "Frames that hold a block, of all layers; on CPUs only",
        SPARDA,
        gauge=True,
        per_rank=True,
    ),
)

METRICS = {metric.name: metric for metric in _ALL}


def of(family: Family) -> list[Metric]:
    """The metrics of a family, with its own reasons."""
    return [
        metric._replace(reasons=tuple(r for r in metric.reasons if r.family in (None, family)))
        for metric in _ALL
        if metric.family in (None, family)
    ]
