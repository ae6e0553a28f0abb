# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""ROCKETKV's operations.

Those that choose are compared on the same scores, and must choose the same but for near-ties; those
that compute are compared by relative error, outputs poisoned first.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm_sparse.kernels.reference.pages import best_slots, page_estimates

from benchmarks.gpu.shapes import LLAMA, TINY
from benchmarks.ops.kernels import call, triton
from benchmarks.ops.registry import (
    Op,
    Side,
    Timed,
    cache_unlike,
    cold_layers,
    differences,
    error,
    output_error,
    same,
    timed,
    unless,
)
from benchmarks.ops.rocketkv_inputs import Case, make_decode, make_prompts, make_rows, with_views
from vllm_sparse.planner import bounds
from vllm_sparse.planner.shapes import ITEM_BYTES
from vllm_sparse.policies.protocol import Shape as CacheShape
from vllm_sparse.policies.rocketkv import RocketKV, RocketKVSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_sparse.kernels.layout import PageLayout

    from benchmarks.ops.registry import Arguments, Found
    from vllm_sparse.planner.shapes import Shape

WINDOW = 32
NEAR_TIE = 1e-4  # relative, of two pages' estimates that rounding may swap
MOST_BYTES = 24 << 30
LONGEST = 131072 + 1536  # tokens that an engine's block tables have room for
SETTINGS = {"min_context": 64}
# Tokens per page, and most shares of a row. vLLM's pages have 16 unless it is told otherwise.
FLASH_ATTENTION = ((16, 32), (64, 32), (256, None))

CASES = (
    Case("llama-8b", 32, 8, 128, 16, 4, 4, 3000, 512),
    Case("llama-8b, blocks of 64", 32, 8, 128, 64, 4, 3, 6000, 128),
    Case("minicpm-8b", 32, 2, 128, 32, 4, 3, 4000, 512),
    Case("qwen-0.5b", 14, 2, 64, 64, 4, 3, 2000, 256),
    Case("smollm, float16", 9, 3, 64, 16, 2, 3, 1500, 128, torch.float16),
    Case("one channel group, float32", 8, 8, 128, 16, 1, 2, 700, 64, torch.float32),
)
SANITIZED = (Case("sanitized", 8, 2, 64, 16, 4, 3, 400, 64),)
TINY_CASES = (Case("tiny", 4, 2, 32, 16, 4, 2, 72, 16),)


class Cell(NamedTuple):
    """A shape to time: tokens of each prompt, token budget, requests, tokens per block."""

    context: int
    budget: int
    batch: int
    block_size: int = 64


# Those that the targets are about come first, in case time runs out.
CELLS = (
    Cell(32768, 1024, 27), Cell(32768, 1024, 1), Cell(32768, 1024, 27, block_size=16),
    Cell(131072, 1024, 1), Cell(32768, 256, 27), Cell(32768, 256, 1), Cell(32768, 1024, 8),
    Cell(32768, 1024, 1, block_size=16), Cell(131072, 1024, 6), Cell(131072, 256, 1),
    Cell(8192, 1024, 8), Cell(8192, 256, 8), Cell(32768, 1024, 116),
    Cell(32768, 1024, 27, block_size=128),
)  # fmt: skip
TINY_CELLS = (Cell(600, 64, 1, block_size=16),)
TUNED_CELLS = (Cell(32768, 1024, 27), Cell(131072, 1024, 1))


class Sizes(NamedTuple):
    """What the bytes of an operation follow from."""

    shape: Shape
    cell: Cell
    split: bounds.Split
    max_count: int = 0
    max_kept: int = 0


def _append_error(actual: Side, expected: Side) -> float:
    """What is written to the cache is the same, and what is asked of pages but for rounding."""
    ours, theirs = (side.arguments["probes"] for side in (actual, expected))
    alike = cache_unlike(actual, expected) + unless(torch.equal(ours.extreme, theirs.extreme))
    return alike + max(error(*pair) for pair in zip(ours[2:], theirs[2:], strict=True))


def _missed_slots(actual: Side, expected: Side) -> float:
    """Share of a row and KV head's slots that the rule does not choose, of the worst one.

    Estimates are sums in another order, so that the rule is applied to those of the reference, each
    moved by `NEAR_TIE` to where the kernel has ranked it: what only rounding has swapped is right.
    """
    at, shares = expected.arguments, [0.0]
    for row, length in enumerate(at["lengths"].tolist()):
        count = min(length, at["top_k"])
        ours, theirs = (side.result[row, :, :count] for side in (actual, expected))
        if length > count:
            inputs = (at[name] for name in ("cache", "probes", "block_table", "lengths"))
            estimate = page_estimates(*inputs, row, at["layout"])
            table, length_of = at["block_table"][row], at["lengths"][row]
            moved = estimate * (1 + NEAR_TIE * _ranked(ours, table, estimate, at["layout"]))
            theirs = best_slots(moved, table, length_of, at["layout"], count)
        shares.append(float((ours != theirs).double().mean(-1).max()))
    return max(shares)


def _ranked(slots: Tensor, table: Tensor, estimate: Tensor, layout: PageLayout) -> Tensor:
    """1 for pages of which all tokens are among the slots, -1 for none; as the estimates."""
    number = (table == (slots // layout.block_size)[..., None]).int().argmax(-1)
    token = number * layout.block_size + slots % layout.block_size
    page = (token // layout.page_size).clamp(max=estimate.shape[1] - 1)
    one = torch.full_like(page, 2 / layout.page_size, dtype=estimate.dtype)
    return torch.zeros_like(estimate).scatter_add_(1, page, one) - 1


def _indices_unlike(actual: Side, expected: Side) -> float:
    return unless(torch.equal(actual.result, expected.result))


def _rows_unlike(actual: Side, expected: Side) -> float:
    def used(side: Side) -> tuple[Tensor, ...]:
        rows, size = side.arguments["rows"], side.arguments["block_size"]
        columns = torch.arange(rows.block_table.shape[1], device=rows.lengths.device)
        mask = columns < -(-rows.lengths // size)[:, None]
        others = (part for part in rows[1:] if part is not None)
        return (rows.block_table[mask], *others, side.arguments["counted"])

    return unless(
        all(torch.equal(*pair) for pair in zip(*map(used, (actual, expected)), strict=True))
    )


def append_bytes(shape: Shape, rows: int, page_size: int) -> int:
    """New keys and values in and out, the open page's keys, its extrema."""
    head = 2 * 2 * shape.head_dim + page_size * shape.head_dim + 2 * shape.head_dim
    return ITEM_BYTES * rows * shape.kv_heads * head


_ATTEND: dict[str, Any] = {
    "kernel": "attend_slots", "compare": output_error, "writes": ("output",),
}  # fmt: skip
STEP = (
    # A whole step may choose other pages where the estimates of two are closer than rounding, which
    # changes little of what is attended to.
    Op(
        "whole step", "decode_attention", output_error, 5e-2, ("cache", "output"),
        least=lambda at: bounds.layer_bytes(at.shape, at.cell.batch, at.cell.context, at.split),
    ),
    Op(
        "append", "append_tokens", _append_error, None, ("cache", "probes"), goes_on=True,
        timed={"replays": False},
        least=lambda at: append_bytes(at.shape, at.cell.batch, at.split.page_size),
    ),
    Op(
        "select slots", "select_slots", _missed_slots, 0.0, gives="slots",
        fixed={"private": True},
        least=lambda at: (
            bounds.score_bytes(at.shape, at.cell.batch, at.split)
            + 4 * at.cell.batch * at.shape.kv_heads * at.split.top_k  # int32 slots
        ),
    ),
    Op(
        "attend slots", **_ATTEND,
        least=lambda at: bounds.attend_bytes(at.shape, at.cell.batch, at.split.top_k),
    ),
    Op(
        "attend all kept", **_ATTEND, fixed={"slots": None},
        least=lambda at: bounds.attend_bytes(at.shape, at.cell.batch, at.split.held),
    ),
)  # fmt: skip
PLAN = (Op("plan rows", "plan_rows", _rows_unlike, 0.0, ("rows", "counted")),)


def _compact_bytes(at: Sizes) -> int:
    """Kept keys and values in and out, extrema out."""
    rows = 2 * 2 * at.max_kept + 2 * -(-at.max_kept // at.split.page_size)
    return ITEM_BYTES * at.shape.kv_heads * at.shape.head_dim * rows


def _score_prompt_bytes(at: Sizes) -> int:
    """All keys once and the window's queries in, a float32 score per token out."""
    shape, window = at.shape, min(WINDOW, at.cell.context // 8)
    read = shape.head_dim * (shape.kv_heads * at.cell.context + shape.heads * window)
    return ITEM_BYTES * read + 4 * shape.kv_heads * at.cell.context


PROMPT = (
    Op("score prompt", "score_prompt", gives="score", least=_score_prompt_bytes),
    Op(
        "top indices", "top_indices", _indices_unlike, 0.0, gives="chosen",
        least=lambda at: 4 * at.shape.kv_heads * (at.cell.context + at.max_count),
    ),
    Op(
        "compact tokens", "compact_tokens", cache_unlike, 0.0, ("cache",),
        views=with_views, least=_compact_bytes,
    ),
)  # fmt: skip
WHOLE_PROMPT = Op(
    "whole stage 1", "compact_prompts", cache_unlike, 0.0, ("cache",),
    least=lambda at: _score_prompt_bytes(at) + _compact_bytes(at),
)  # fmt: skip


def check(
    case: Case, device: torch.device, generator: torch.Generator, graphs: bool
) -> Iterator[Found]:
    """Yields the name of each operation, its error, and the largest that it may have."""
    step = make_decode(case, device, generator)
    replayed = dict(step) if graphs and device.type == "cuda" else None
    yield from differences(STEP, step, case.dtype)
    if replayed is not None:
        yield "whole step, graph", _replay_error(replayed), 0.0
    yield from differences(PLAN, make_rows(case, device, generator, WINDOW), case.dtype)
    prompts = wide_prompts(case, device, generator)
    yield from differences(PROMPT, prompts, case.dtype)
    # All in one must be the parts, whatever the reference says.
    whole, parts = (with_views({**prompts, "cache": prompts["cache"].clone()}) for _ in range(2))
    call(triton(WHOLE_PROMPT.kernel), whole)
    for op in PROMPT:
        found = call(triton(op.kernel), parts)
        parts |= {op.gives: found} if op.gives else {}
    yield WHOLE_PROMPT.name, unless(same(whole["cache"], parts["cache"])), 0.0


def wide_prompts(case: Case, device: torch.device, generator: torch.Generator) -> Arguments:
    """Prompts of a case, of which a third is kept."""
    window = min(WINDOW, case.longest // 8)
    prompts = make_prompts(case, device, generator, window=window, kept=case.longest // 3)
    return {**prompts, "max_count": prompts["max_kept"] - window}


def _replay_error(step: Arguments) -> float:
    """Of a captured step that is replayed after other inputs went through it, against a call."""
    whole, before = triton("decode_attention"), step["cache"]
    poisoned = torch.full_like(step["output"], torch.nan)
    expected = {**step, "cache": before.clone(), "output": poisoned}
    call(whole, expected)
    static = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in step.items()
    }
    static["lengths"] = static["final_lengths"] = torch.ones_like(step["lengths"])
    graph = torch.cuda.CUDAGraph()
    call(whole, static)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call(whole, static)
    graph.replay()
    static["cache"].copy_(before)
    static["lengths"].copy_(step["lengths"])
    static["output"].fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return error(static["output"], expected["output"])


def timings(
    tiny: bool, cell: Cell, device: torch.device, generator: torch.Generator
) -> dict[str, Callable[[], Iterator[Timed]]]:
    """What is timed of a cell, by a name for its set-up."""
    shape = TINY if tiny else LLAMA
    parts = {"decode": partial(decode_timings, shape, cell, generator)}
    if cell.block_size == Cell._field_defaults["block_size"] and device.type == "cuda":
        parts["FlashAttention"] = lambda: (
            _flash_attention(shape, cell, *each, generator) for each in FLASH_ATTENTION
        )
    if cell.batch == 1:
        parts["stage 1"] = partial(prompt_timings, shape, cell, generator)
    return parts


def split_of(
    shape: Shape, context: int, settings: dict[str, Any], block_size: int = 16
) -> bounds.Split:
    """The split of a prompt of `context` tokens, by the rule that the engine follows."""
    own = RocketKVSettings.model_validate(settings)
    group = shape.heads // shape.kv_heads
    policy = RocketKV(own, CacheShape(shape.head_dim, group, block_size, 2 * context))
    return bounds.split_by(policy, context)


def _split(shape: Shape, cell: Cell) -> bounds.Split:
    settings = {**SETTINGS, "token_budget": cell.budget}
    return split_of(shape, cell.context, settings, cell.block_size)


def _case(shape: Shape, cell: Cell, rows: int, longest: int) -> Case:
    split = _split(shape, cell)
    heads = shape.heads, shape.kv_heads, shape.head_dim
    return Case("", *heads, cell.block_size, split.page_size, rows, longest, split.top_k)


def decode_timings(shape: Shape, cell: Cell, generator: torch.Generator) -> Iterator[Timed]:
    """The operations of a decode step over different inputs."""
    # More layers than the model has, where a step reads little: the weights that a model reads
    # between two steps would push everything out of the cache.
    split = _split(shape, cell)
    one = cell.batch * split.held * shape.kv_bytes_per_token // shape.layers
    read = bounds.layer_bytes(shape, cell.batch, cell.context, split)
    layers = cold_layers(read, generator.device, MOST_BYTES // one)
    yield from timed(STEP, *decode_steps(shape, cell, generator, layers))


def decode_steps(
    shape: Shape, cell: Cell, generator: torch.Generator, layers: int
) -> tuple[list[Arguments], Sizes]:
    """Arguments of a decode step in each of some layers, and what bytes follow from."""
    device, split = generator.device, _split(shape, cell)
    case = _case(shape, cell, cell.batch, split.held)
    lengths = torch.full((cell.batch,), split.held, dtype=torch.int32, device=device)
    first = make_decode(case, device, generator, lengths=lengths, top_r=split.top_r)
    if device.type == "cuda":  # as wide as an engine's, which sets how a row is split
        width = LONGEST // cell.block_size - first["block_table"].shape[1]
        first["block_table"] = torch.nn.functional.pad(first["block_table"], (0, max(0, width)))
    steps = [first]
    for _ in range(layers - 1):  # the same values in another place, and other queries
        query = torch.randn_like(first["query"], dtype=torch.float32).to(case.dtype)
        probes = type(first["probes"])(*map(torch.clone, first["probes"]))
        steps.append({**first, "cache": first["cache"].clone(), "query": query, "probes": probes})
    return steps, Sizes(shape, cell, split)


def prompt_timings(shape: Shape, cell: Cell, generator: torch.Generator) -> Iterator[Timed]:
    """What the end of one prompt costs in one layer."""
    split, window = _split(shape, cell), min(WINDOW, cell.context // 8)
    case = _case(shape, cell, 1, cell.context)
    arguments = make_prompts(case, generator.device, generator, window=window, kept=split.held)
    kept = arguments["max_kept"]
    arguments["max_count"] = kept - window
    sizes = Sizes(shape, cell, split, kept - window, kept)
    yield from timed((*PROMPT, WHOLE_PROMPT), [arguments], sizes)


def _flash_attention(
    shape: Shape, cell: Cell, size: int, splits: int | None, generator: torch.Generator
) -> Timed:
    """FlashAttention 3 over the whole context, with pages of `size` tokens.

    Stock vLLM, in graphs, plans ahead how rows are split, into so many shares at most; None leaves
    it to the kernel.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    rows, device, dtype = cell.batch, generator.device, torch.bfloat16
    blocks = -(-cell.context // size)
    one = rows * cell.context * shape.kv_bytes_per_token // shape.layers
    table = torch.randperm(rows * blocks, generator=generator, device=device).view(rows, -1).int()
    shaped = (rows * blocks, size, shape.kv_heads, shape.head_dim)
    caches = [
        tuple(torch.randn(shaped, device=device, dtype=dtype) for _ in range(2))
        for _ in range(cold_layers(one, device, 4))
    ]
    query = torch.randn(rows, shape.heads, shape.head_dim, device=device, dtype=dtype)
    output = torch.empty_like(query)
    starts = torch.arange(rows + 1, device=device, dtype=torch.int32)
    lengths = torch.full((rows,), cell.context, device=device, dtype=torch.int32)
    planned: dict[str, Any] = {}
    if splits is not None:
        metadata = get_scheduler_metadata(
            batch_size=rows, max_seqlen_q=1, max_seqlen_k=cell.context, num_heads_q=shape.heads,
            num_heads_kv=shape.kv_heads, headdim=shape.head_dim, cache_seqlens=lengths,
            qkv_dtype=dtype, cu_seqlens_q=starts, page_size=size, causal=True, num_splits=splits,
        )  # fmt: skip
        planned = {"scheduler_metadata": metadata, "num_splits": splits}

    def run(keys: Tensor, values: Tensor) -> None:
        flash_attn_varlen_func(
            q=query, k=keys, v=values, out=output, cu_seqlens_q=starts, max_seqlen_q=1,
            seqused_k=lengths, max_seqlen_k=cell.context, softmax_scale=shape.head_dim**-0.5,
            causal=True, block_table=table, fa_version=3, **planned,
        )  # fmt: skip

    name = f"FlashAttention, pages of {size}" + (", as vLLM plans it" if planned else "")
    least = bounds.attend_bytes(shape, rows, cell.context)
    return Timed(name, [partial(run, *pair) for pair in caches], least)


def in_float32(case: Any) -> Any:
    """The case with heads of as many bytes, or it would be launched as larger ones are."""
    return dataclasses.replace(case, dim=case.dim // 2, dtype=torch.float32)
