# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The Triton kernels against their references, on the device at hand; SPARDA's: `parity_sparda`.

Kernels that choose are compared on the same scores, and must choose the same; kernels that compute
are compared by relative error, outputs poisoned first. The interpreter that CI runs accepts more
than a compiler, adds up in another order and knows no races, so this is not a repetition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import parity_sparda
from benchmarks.gpu.batches import Case, call, make_decode, make_prompts
from benchmarks.gpu.compare import COMPUTED, error, same, unless
from benchmarks.gpu.stages import CheckFailedError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from torch import Tensor

    from benchmarks.gpu.batches_sparda import PagedCase
    from benchmarks.gpu.stages import Report

# A whole step may choose other pages where the estimates of two are closer than rounding, which
# changes little of what is attended to.
WHOLE_STEP = 5e-2
SAME_CHOICE = 0.999
WINDOW = 32

CASES = (
    Case("llama-8b", 32, 8, 128, 16, 4, 4, 3000, 512),
    Case("llama-8b, blocks of 64", 32, 8, 128, 64, 4, 3, 6000, 128),
    Case("minicpm-8b", 32, 2, 128, 32, 4, 3, 4000, 512),
    Case("qwen-0.5b", 14, 2, 64, 64, 4, 3, 2000, 256),
    Case("smollm, float16", 9, 3, 64, 16, 2, 3, 1500, 128, torch.float16),
    Case("one channel group, float32", 8, 8, 128, 16, 1, 2, 700, 64, torch.float32),
)
SANITIZED = (Case("sanitized", 8, 2, 64, 16, 4, 3, 400, 64),)
TINY = (Case("tiny", 4, 2, 32, 16, 4, 2, 72, 16),)


def check(
    report: Report,
    options: argparse.Namespace,
    cases: tuple[Case, ...] = CASES,
    paged: tuple[PagedCase, ...] = parity_sparda.CASES,
    *,
    graphs: bool = True,
) -> None:
    """Runs all cases.

    Args:
        report: Gets a row for each kernel and case.
        options: For the device and the seed.
        cases: Sizes for ROCKETKV.
        paged: Sizes for SPARDA.
        graphs: Also replay a captured step; needs PyTorch's caching allocator.

    Raises:
        CheckFailedError: Some kernel differs from its reference.
    """
    device = torch.device(options.device)
    if options.tiny:
        cases, paged = TINY, parity_sparda.TINY
    generator = torch.Generator(device).manual_seed(options.seed)
    report.note(seed=options.seed, device=str(device), torch=torch.__version__)
    for case, differences in (
        *((case, _differences) for case in cases),
        *((case, parity_sparda.differences) for case in paged),
    ):
        for kernel, found, limit in differences(case, device, generator, graphs):
            report.add(case=case.name, kernel=kernel, error=found, limit=limit, ok=found <= limit)
        if device.type == "cuda":
            torch.cuda.synchronize()
    wrong = [f"{row['kernel']} ({row['case']})" for row in report.rows if not row["ok"]]
    if wrong:
        raise CheckFailedError(f"differ from the reference: {', '.join(wrong)}")


def _differences(
    case: Case, device: torch.device, generator: torch.Generator, graphs: bool
) -> Iterator[tuple[str, float, float]]:
    """Yields the name of each kernel, its error, and the largest that it may have."""
    from vllm_sparse.kernels.reference import rocketkv as ref_step
    from vllm_sparse.kernels.reference import stage2 as ref
    from vllm_sparse.kernels.triton import append, attention, pages, rocketkv

    step = make_decode(case, device, generator)
    before = step["cache"]
    computed = COMPUTED[case.dtype]

    caches = [before.clone() for _ in range(2)]
    for kernel, cache in zip((ref_step, append), caches, strict=True):
        call(kernel.append_tokens, {**step, "cache": cache})
    yield "append", unless(same(*caches)), 0.0
    filled = {**step, "cache": caches[0]}

    # From the newest page on, which is always chosen, the scores may be anything.
    expected, actual = (call(kernel.score_pages, filled) for kernel in (ref, pages))
    used = _mask((step["lengths"] - 1) // case.page_size, expected.logits.shape[-1])
    used = used[:, None].expand_as(expected.logits)
    yield "score pages", error(actual.logits[used], expected.logits[used]), computed

    chosen = [call(kernel.select_slots, {**filled, "scores": expected}) for kernel in (ref, pages)]
    shares = [
        len(set(ours) & set(theirs)) / len(theirs)
        for ours, theirs in zip(*(_lists(slots, filled) for slots in chosen), strict=True)
    ]
    yield "select slots", 1.0 - min(shares), 1.0 - SAME_CHOICE

    for name, slots in (("attend slots", chosen[0]), ("attend all", None)):
        outputs = [torch.full_like(step["output"], torch.nan) for _ in range(2)]
        for kernel, output in zip((ref, attention), outputs, strict=True):
            call(kernel.attend_slots, {**filled, "slots": slots, "output": output})
        yield name, error(outputs[1], outputs[0]), computed

    results = []
    for kernel in (ref_step, rocketkv):
        cache, output = before.clone(), torch.full_like(step["output"], torch.nan)
        call(kernel.decode_attention, {**step, "cache": cache, "output": output})
        results.append(output)
    yield "whole step", error(results[1], results[0]), WHOLE_STEP
    if graphs and device.type == "cuda":
        replayed = _replayed(step, before)
        yield "whole step, graph", error(replayed, results[1]), 0.0
    yield "plan rows", unless(_rows_agree(case, device, generator)), 0.0
    yield from _stage1(case, device, generator, computed)


def _stage1(
    case: Case, device: torch.device, generator: torch.Generator, computed: float
) -> Iterator[tuple[str, float, float]]:
    from vllm_sparse.kernels.reference import prompt as ref
    from vllm_sparse.kernels.triton import compaction, prompt, rocketkv, topk

    window = min(WINDOW, case.longest // 8)
    arguments = make_prompts(case, device, generator, window=window, kept=case.longest // 3)
    expected, actual = (call(kernel.score_prompt, arguments) for kernel in (ref, prompt))
    yield "score prompt", error(actual, expected), computed
    arguments |= {"score": expected, "max_count": arguments["max_kept"] - window}
    indices = [call(kernel.top_indices, arguments) for kernel in (ref, topk)]
    yield "top indices", unless(torch.equal(*indices)), 0.0

    before = arguments["cache"]
    tails = []
    for kernel in (ref, compaction):
        cache = before.clone()
        call(kernel.compact_tokens, {**arguments, **_views(case, cache), "chosen": indices[0]})
        tails.append(cache)
    yield "compact tokens", unless(same(*tails)), 0.0
    # All in one must be the parts, whatever the reference says.
    score = call(prompt.score_prompt, arguments)
    chosen = call(topk.top_indices, {**arguments, "score": score})
    whole, parts = before.clone(), before.clone()
    call(rocketkv.compact_prompts, {**arguments, **_views(case, whole)})
    call(compaction.compact_tokens, {**arguments, **_views(case, parts), "chosen": chosen})
    yield "whole stage 1", unless(same(whole, parts)), 0.0


def _rows_agree(case: Case, device: torch.device, generator: torch.Generator) -> bool:
    """Whether a batch in every state of a request is planned alike."""
    from vllm_sparse.kernels.reference import rows as ref
    from vllm_sparse.kernels.triton import rows as ours

    size, group = case.block_size, case.heads // case.kv_heads
    longest, width = 40 * size, 41
    per_block = max(1, 2 * size // case.page_size // group)
    least = -(-WINDOW // per_block) + -(-WINDOW // size)  # blocks that the window needs

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device).int()

    count = 40
    prompt_lens = integers(1, longest, count)
    # Padding, inside the prompt, in its window, decoding.
    after = torch.cat([integers(low, high, 10) for low, high in ((0, 1), (1, longest))]).repeat(2)
    near = prompt_lens - integers(-40, 40, count)
    seq_lens = torch.where(integers(0, 2, count) > 0, after, near).clamp(0, longest)
    lengths = torch.arange(longest + 1, device=device)
    dropped = (lengths // size - integers(least, least + 4, longest + 1)).clamp_min(0)
    top_r = torch.where(dropped > 0, integers(1, case.dim, longest + 1), 0)
    rules = torch.stack((torch.where(top_r > 0, dropped, 0), top_r), 1).int()
    arguments = {
        "seq_lens": seq_lens.int(),
        "prompt_lens": prompt_lens,
        "block_table": integers(0, 10**6, count, width),
        "rules": rules,
        "block_size": size,
        "window": WINDOW,
        "per_block": per_block,
        "top_k": case.top_k,
    }
    results = []
    for module in (ref, ours):
        buffers = [integers(-9, -8, count, width), *(integers(-9, -8, count) for _ in range(3))]
        rows = ref.Rows(*buffers)
        counted = torch.zeros(3, dtype=torch.int64, device=device)
        call(module.plan_rows, {**arguments, "rows": rows, "counted": counted})
        used = _mask(-(-rows.lengths // size), width)
        results.append((rows.block_table[used], *rows[1:], counted))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _views(case: Case, cache: Tensor) -> dict[str, Tensor]:
    halves = case.layout.tokens(cache).flatten(2)
    halves = halves.unflatten(2, (2, case.block_size, case.dim))
    return {"cache": cache, "keys": halves[:, :, 0], "values": halves[:, :, 1]}


def _replayed(step: dict[str, Any], before: Tensor) -> Tensor:
    """Output of a captured step that is replayed after other inputs went through it."""
    from vllm_sparse.kernels.triton import rocketkv

    static = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in step.items()
    }
    static["lengths"] = static["final_lengths"] = torch.ones_like(step["lengths"])
    graph = torch.cuda.CUDAGraph()
    call(rocketkv.decode_attention, static)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call(rocketkv.decode_attention, static)
    graph.replay()
    static["cache"].copy_(before)
    static["lengths"].copy_(step["lengths"])
    static["output"].fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return static["output"]


def _lists(slots: Tensor, step: dict[str, Any]) -> list[list[int]]:
    """Chosen slots of each row and KV head."""
    return [
        slots[row, head, : min(length, step["top_k"])].tolist()
        for row, length in enumerate(step["lengths"].tolist())
        for head in range(slots.shape[1])
    ]


def _mask(counts: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=counts.device) < counts[:, None]
