# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Kernels alone: time a layer, bytes per second, and how far that is from a copy's.

Bytes are the fewest that the kernel must move, not what it moves; see `bounds`. As many layers are
run in turn as it takes for what they read to outgrow the cache.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.gpu import bounds, timing
from benchmarks.gpu.batches import Case, call, make_decode, make_prompts
from benchmarks.gpu.models import LLAMA, TINY, Shape

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from benchmarks.gpu.stages import Report

WINDOW = 32
COLD_BYTES = 256 << 20  # several times the largest cache
MOST_BYTES = 24 << 30
MOST_LAYERS = 256
LONGEST = 131072 + 1536  # tokens that an engine's block tables have room for
RESERVE_S = 6.0


class Cell(NamedTuple):
    """One shape.

    Attributes:
        context: Tokens of each request's prompt.
        budget: ROCKETKV's token budget.
        batch: Requests.
        block_size: Tokens per block.
    """

    context: int
    budget: int
    batch: int
    block_size: int = 64


# Those that the targets are about come first, in case time runs out.
CELLS = (
    Cell(32768, 1024, 27),
    Cell(32768, 1024, 1),
    Cell(32768, 1024, 27, block_size=16),
    Cell(131072, 1024, 1),
    Cell(32768, 256, 27),
    Cell(32768, 256, 1),
    Cell(32768, 1024, 8),
    Cell(32768, 1024, 1, block_size=16),
    Cell(131072, 1024, 6),
    Cell(131072, 256, 1),
    Cell(8192, 1024, 8),
    Cell(8192, 256, 8),
    Cell(32768, 1024, 116),
)
TINY_CELLS = (Cell(600, 64, 1, block_size=16),)
SETTINGS = {"min_context": 64}
# Tokens per page, and most shares of a row. vLLM's pages have 16 unless it is told otherwise.
FLASH_ATTENTION = ((16, 32), (64, 32), (256, None))


def measure(report: Report, options: argparse.Namespace) -> None:
    """Measures all cells, as long as there is time."""
    device = torch.device(options.device)
    shape, cells = (TINY, TINY_CELLS) if options.tiny else (LLAMA, CELLS)
    size = 0.01 if options.tiny else 2.0
    copy = timing.copy_bytes_per_s(device, size)
    report.note(
        shape=shape.name,
        copy_gb_per_s=round(copy / 1e9, 1),
        link_gb_per_s={
            key: round(value / 1e9, 2)
            for key, value in timing.link_bytes_per_s(device, size / 2).items()
        },
        seed=options.seed,
    )
    left_out = []
    for cell in cells:
        if report.left_s < RESERVE_S:
            left_out.append(cell._asdict())
            continue
        generator = torch.Generator(device).manual_seed(options.seed)
        parts = _parts(shape, cell, device, generator)
        for (name, runs, *rest), found in timing.each_seconds(parts, device):
            if isinstance(found, str):
                report.add(**cell._asdict(), kernel=name, error=found)
                continue
            report.add(
                **cell._asdict(),
                kernel=name,
                # What is read again may still be in the cache.
                warm=len(runs) * rest[0] < COLD_BYTES,
                layers=len(runs),
                us=round(1e6 * found, 2),
                least_bytes=rest[0],
                gb_per_s=round(rest[0] / found / 1e9, 1),
                share_of_copy=round(rest[0] / found / copy, 4),
            )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.note(no_time_for=left_out)


def _parts(
    shape: Shape, cell: Cell, device: torch.device, generator: torch.Generator
) -> dict[str, Callable[[], Iterator[tuple[str, list[Callable[[], object]], int]]]]:
    """What is measured of a cell; the parts yield name, runs, and least bytes of each kernel."""
    arguments = shape, cell, device, generator
    parts = {"decode": partial(_kernels, *arguments)}
    if cell.block_size == Cell._field_defaults["block_size"]:
        parts["FlashAttention"] = partial(_dense, *arguments)
    if cell.batch == 1:
        split = bounds.split_of(
            shape, cell.context, {**SETTINGS, "token_budget": cell.budget}, cell.block_size
        )
        parts["stage 1"] = partial(_stage1, shape, cell, split, device, generator)
    return parts


def _kernels(
    shape: Shape, cell: Cell, device: torch.device, generator: torch.Generator
) -> Iterator[tuple[str, list[Callable[[], object]], int]]:
    """Yields name, runs over different inputs, and least bytes of each kernel of a decode step."""
    from vllm_sparse.kernels.triton import append, attention, pages, rocketkv

    settings = {**SETTINGS, "token_budget": cell.budget}
    split = bounds.split_of(shape, cell.context, settings, cell.block_size)
    case = Case(
        "", shape.heads, shape.kv_heads, shape.head_dim, cell.block_size, split.page_size,
        cell.batch, split.held, split.top_k,
    )  # fmt: skip
    one = cell.batch * split.held * shape.kv_bytes_per_token // shape.layers
    # More layers than the model has, where a step reads little: the weights that a model reads
    # between two steps would push everything out of the cache.
    read = bounds.layer_bytes(shape, cell.batch, cell.context, split)
    layers = max(1, min(-(-COLD_BYTES // read), MOST_BYTES // one, MOST_LAYERS))
    if device.type != "cuda":
        layers = 2
    lengths = torch.full((cell.batch,), split.held, dtype=torch.int32, device=device)
    first = make_decode(case, device, generator, lengths=lengths, top_r=split.top_r)
    if device.type == "cuda":  # as wide as an engine's, which sets how a row is split
        width = LONGEST // cell.block_size - first["block_table"].shape[1]
        first["block_table"] = torch.nn.functional.pad(first["block_table"], (0, max(0, width)))
    steps = [first]
    for _ in range(layers - 1):  # the same values in another place, and other queries
        query = torch.randn_like(first["query"], dtype=torch.float32).to(case.dtype)
        steps.append({**first, "cache": first["cache"].clone(), "query": query})

    def runs(kernel: Callable[..., Any], **further: list[Any]) -> list[Callable[[], object]]:
        return [
            partial(call, kernel, {**step, **{name: given[i] for name, given in further.items()}})
            for i, step in enumerate(steps)
        ]

    rows = cell.batch
    whole = bounds.layer_bytes(shape, rows, cell.context, split)
    yield "whole step", runs(rocketkv.decode_attention), whole
    new = bounds.append_bytes(shape, rows, split.page_size)
    yield "append", runs(append.append_tokens, replays=[False] * layers), new
    score = bounds.score_bytes(shape, rows, split)
    yield "score pages", runs(pages.score_pages), score
    scores = [call(pages.score_pages, step) for step in steps]
    least = bounds.select_bytes(shape, rows, split)
    yield "select slots", runs(pages.select_slots, scores=scores), least
    slots = [
        call(pages.select_slots, {**step, "scores": score})
        for step, score in zip(steps, scores, strict=True)
    ]
    least = bounds.attend_bytes(shape, rows, split.top_k)
    yield "attend slots", runs(attention.attend_slots, slots=slots), least
    least = bounds.attend_bytes(shape, rows, split.held)
    yield "attend all kept", runs(attention.attend_slots, slots=[None] * layers), least


def _dense(
    shape: Shape, cell: Cell, device: torch.device, generator: torch.Generator
) -> Iterator[tuple[str, list[Callable[[], object]], int]]:
    """FlashAttention over the whole context."""
    for size, splits in FLASH_ATTENTION if device.type == "cuda" else ():
        yield _flash_attention(shape, cell, size, splits, device, generator)


def _flash_attention(
    shape: Shape,
    cell: Cell,
    size: int,
    splits: int | None,
    device: torch.device,
    generator: torch.Generator,
) -> tuple[str, list[Callable[[], object]], int]:
    """FlashAttention 3 with pages of `size` tokens.

    Stock vLLM, in graphs, plans ahead how rows are split, into so many shares at most; None leaves
    it to the kernel.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    rows = cell.batch
    blocks = -(-cell.context // size)
    one = rows * cell.context * shape.kv_bytes_per_token // shape.layers
    layers = max(1, min(4, -(-COLD_BYTES // one)))
    table = torch.randperm(rows * blocks, generator=generator, device=device).view(rows, -1).int()
    shaped = (rows * blocks, size, shape.kv_heads, shape.head_dim)
    caches = [
        tuple(torch.randn(shaped, device=device, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(layers)
    ]
    query = torch.randn(rows, shape.heads, shape.head_dim, device=device, dtype=torch.bfloat16)
    output = torch.empty_like(query)
    starts = torch.arange(rows + 1, device=device, dtype=torch.int32)
    lengths = torch.full((rows,), cell.context, device=device, dtype=torch.int32)
    planned: dict[str, Any] = {}
    if splits is not None:
        metadata = get_scheduler_metadata(
            batch_size=rows, max_seqlen_q=1, max_seqlen_k=cell.context, num_heads_q=shape.heads,
            num_heads_kv=shape.kv_heads, headdim=shape.head_dim, cache_seqlens=lengths,
            qkv_dtype=torch.bfloat16, cu_seqlens_q=starts, page_size=size, causal=True,
            num_splits=splits,
        )  # fmt: skip
        planned = {"scheduler_metadata": metadata, "num_splits": splits}

    def run(keys: torch.Tensor, values: torch.Tensor) -> None:
        flash_attn_varlen_func(
            q=query, k=keys, v=values, out=output, cu_seqlens_q=starts, max_seqlen_q=1,
            seqused_k=lengths, max_seqlen_k=cell.context, softmax_scale=shape.head_dim**-0.5,
            causal=True, block_table=table, fa_version=3, **planned,
        )  # fmt: skip

    runs: list[Callable[[], object]] = [partial(run, *pair) for pair in caches]
    name = f"FlashAttention, pages of {size}" + (", as vLLM plans it" if planned else "")
    return name, runs, bounds.attend_bytes(shape, rows, cell.context)


def _stage1(
    shape: Shape,
    cell: Cell,
    split: bounds.Split,
    device: torch.device,
    generator: torch.Generator,
) -> Iterator[tuple[str, list[Callable[[], object]], int]]:
    """What the end of one prompt costs in one layer."""
    from vllm_sparse.kernels.triton import compaction, prompt, rocketkv, topk

    case = Case(
        "", shape.heads, shape.kv_heads, shape.head_dim, cell.block_size, split.page_size,
        1, cell.context, split.top_k,
    )  # fmt: skip
    window = min(WINDOW, cell.context // 8)
    arguments = make_prompts(case, device, generator, window=window, kept=split.held)
    arguments["max_count"] = arguments["max_kept"] - window
    arguments["score"] = call(prompt.score_prompt, arguments)
    arguments["chosen"] = call(topk.top_indices, arguments)
    score = bounds.prompt_score_bytes(shape, cell.context, window)
    top = 4 * shape.kv_heads * (cell.context + arguments["max_count"])
    compact = bounds.compact_bytes(shape, arguments["max_kept"], split.page_size)
    for name, kernel, least in (
        ("score prompt", prompt.score_prompt, score),
        ("top indices", topk.top_indices, top),
        ("compact tokens", compaction.compact_tokens, compact),
        ("whole stage 1", rocketkv.compact_prompts, score + compact),
    ):
        yield name, [partial(call, kernel, arguments)], least
