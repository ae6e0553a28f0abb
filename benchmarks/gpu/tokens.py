# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whole engines against each other: the same tokens, up to near-ties of the logits.

In bfloat16 two correct engines round differently, and a tie within rounding may fall either way;
from there on they write different texts. So only the first difference of each request is judged:
there, the other token must be one of the baseline's most likely ones, and almost as likely.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import arms
from benchmarks.gpu import llms, shapes
from benchmarks.gpu.stages import CheckFailedError, Stage, report_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from benchmarks.gpu.stages import Report

# Kernels count on the device, and that is read every few dozen steps.
NEW_TOKENS, TINY_NEW_TOKENS = 80, 24
# Log-probability by which the baseline's token may lead the other one where two engines part.
NEAR_TIE = {"bfloat16": 0.15, "float16": 0.03}
LIKELY = 5
UNLIKELY = 99.0  # stands for the gap of a token that is not among those
STOCK, SPARSE = "stock", "sparse"
SPARDA, SPARDA_AHEAD = "sparda-all-framed", "sparda-sparse-prompts"

# Every token passes through compaction's layout and the sparse kernel, and all of them are read.
WHOLE = {"token_budget": 1 << 16, "stage1": False, "min_context": 64}
# Evicts and selects, but not so little that the last page to be chosen carries much weight: where
# two are equal within rounding, either may be, and it must not decide the next token.
LITTLE = {"token_budget": 512, "min_context": 64, "generation_reserve": 64}
TINY_LITTLE = {**LITTLE, "token_budget": 160}
# The queries of a longer window would not fit a short prompt's blocks, and it would stay dense.
TINY_WINDOW = {"window": 16}

# SPARDA's, with as many tokens read. Host memory for all requests and little more; frames for no
# more than a step may read, so that every block which is chosen anew drives another one out.
REQUESTS = 6
PAGED = {
    "block_size": 64, "kernel_stride": 16, "init_blocks": 1, "local_blocks": 1, "top_k": 8,
    "dense_len": 0, "staging_blocks": 8, "selector": "previous", "host_gib": 24 / 1024,
}  # fmt: skip
TINY_PAGED = {**PAGED, "block_size": 32, "top_k": 6, "staging_blocks": 4, "host_gib": 8 / 1024}
BYTES_PER_TOKEN = 256  # of the checkpoint's keys and values in one layer and KV head, in 16 bit
LAYERS, KV_HEADS = 3, 2


def paged(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """SPARDA's settings with the smallest slab that start-up accepts."""
    settings = {**settings, **changes}
    piece = settings["block_size"] * BYTES_PER_TOKEN
    slab = REQUESTS * KV_HEADS * settings["top_k"] * LAYERS * piece
    return {**settings, "slab_gib": slab / arms.GIB}


class Divergence(NamedTuple):
    """Where a request's output first differs from the baseline's.

    `gap` is by how much the baseline's token leads the other one there, in log-probability.
    """

    request: int
    position: int
    gap: float


def divergences(
    tokens: Sequence[Sequence[int]], baseline: Sequence[Sequence[dict]]
) -> list[Divergence]:
    """Returns the first difference of each request that has one.

    Args:
        tokens: Output of each request.
        baseline: Steps of each request, as `step_of` makes them.
    """
    found = []
    for request, (ours, steps) in enumerate(zip(tokens, baseline, strict=True)):
        for position, (token, step) in enumerate(zip(ours, steps, strict=True)):
            if token != step["token"]:
                gap = step["behind"].get(str(token), UNLIKELY)
                found.append(Divergence(request, position, gap))
                break
    return found


@dataclass(frozen=True)
class Variant:
    """One way to run the prompts.

    Attributes:
        settings: The backend's; None for stock vLLM.
        mode: Arguments of `LLM`: graphs, eager or compiled.
        dtype: Of weights and cache; None is what the command line says. Engines that choose are
            compared in float16, whose rounding is finer.
        baseline: Stage whose tokens must come out; None makes a baseline.
        differs_from: Stage whose tokens must not come out, near-ties apart.
        arguments: Further arguments of `LLM`.
        waves: How often the prompts are sent.
        pool_tokens: Size of the KV pool, to force preemption.
        expect: Counter that must have grown, of the plugin's or ``preemptions``, ``cached``.
        beyond: Counter or gauge that it must have outgrown.
        compared: Tokens of each request that are compared; None compares all.
        backend: Whose settings these are.
        profiled: vLLM finds out what memory there is, for which it builds what is on the GPU and
            captures graphs once more. No other engine may run meanwhile.
    """

    settings: dict[str, Any] | None
    mode: dict[str, Any] = field(default_factory=lambda: llms.GRAPHS)
    dtype: str | None = None
    baseline: str | None = None
    differs_from: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    waves: int = 1
    pool_tokens: int | None = None
    expect: str | None = None
    beyond: str | None = None
    compared: int | None = None
    backend: str = "ROCKETKV"
    profiled: bool = False


def variants(*, tiny: bool = False) -> dict[str, Variant]:
    """All ways to run the prompts, by stage name."""
    little = TINY_LITTLE if tiny else LITTLE
    chunk = {"max_num_batched_tokens": 96 if tiny else 256}
    tight = 1100 if tiny else 3600

    def evicting(baseline: str | None = SPARSE, **changes: Any) -> Variant:
        return Variant(little, dtype="float16", baseline=baseline, **changes)

    choosing = TINY_PAGED if tiny else PAGED
    # Every block of the longest prompt, and not those that --max-model-len would allow.
    everything = {"top_k": 16 if tiny else 28}

    def sparda(baseline: str | None, settings: dict[str, Any], **changes: Any) -> Variant:
        expected: dict[str, Any] = {"expect": "decode_rows"}
        if "slab_gib" in settings:  # with fewer misses, frames may only have been filled once
            expected = {"expect": "frame_misses", "beyond": "slab_frames"}
        common = {"dtype": "float16", **expected, **changes}
        return Variant(
            settings, baseline=baseline, arguments={"max_num_seqs": REQUESTS}, backend="SPARDA",
            **common,
        )  # fmt: skip

    ahead = {"sparse_prefill": True, "selector": "lookahead-query"}
    unlike = {"differs_from": STOCK}
    return {
        STOCK: Variant(None),
        "whole-graphs": Variant(WHOLE, baseline=STOCK, expect="decode_rows"),
        SPARSE: evicting(None, differs_from=STOCK, expect="prompts_compacted"),
        "whole-eager": Variant(WHOLE, llms.EAGER, baseline=STOCK, expect="decode_rows"),
        "chunked": evicting(arguments=chunk, expect="prompts_compacted"),
        "prefix-cache": evicting(waves=2, expect="cached"),
        # A prompt that is begun without room for all of it runs out of blocks on the way.
        "preemption": evicting(
            arguments={**chunk, "scheduler_reserve_full_isl": False},
            pool_tokens=tight,
            expect="preemptions",
        ),
        # Its pages are chosen, and here all of them are.
        "quest": Variant(
            {"token_budget": WHOLE["token_budget"], "min_context": little["min_context"]},
            baseline=STOCK,
            expect="decode_rows",
            backend="QUEST",
        ),
        # Their prompts are attended as a whole, so that the first token is stock vLLM's.
        **{
            name.lower(): Variant(
                {
                    **{key: little[key] for key in ("token_budget", "min_context")},
                    **(TINY_WINDOW if tiny and name == "SNAPKV" else {}),
                },
                baseline=STOCK,
                compared=1,
                expect="decode_rows",
                backend=name,
            )
            for name in ("SNAPKV", "STREAMINGLLM")
        },
        "sparda-whole": sparda(STOCK, paged(choosing, **everything), dtype=None, beyond=None),
        SPARDA: sparda(None, {**choosing, "resident": True}, mode=llms.EAGER, **unlike),
        "sparda-ahead": sparda(SPARDA, paged(choosing)),
        "sparda-blocking": sparda(SPARDA, paged(choosing, prefetch=False)),
        SPARDA_AHEAD: sparda(None, paged(choosing, **ahead), mode=llms.EAGER, **unlike),
        "sparda-graphs": sparda(SPARDA_AHEAD, paged(choosing, **ahead)),
        "sparda-profiled": sparda(SPARDA, paged(choosing), profiled=True),
        "sparse-eager": evicting(mode=llms.EAGER, expect="blocks_evicted"),
        "whole-compiled": Variant(WHOLE, llms.COMPILED, baseline=STOCK, expect="decode_rows"),
        # Every block is read, as rounding may decide otherwise; but the compiler sees the taps.
        "sparda-compiled": sparda(
            STOCK,
            paged(choosing, **everything, selector="lookahead-query"),
            mode=llms.COMPILED,
            dtype=None,
            beyond=None,
        ),
        "stock-eager": Variant(None, llms.EAGER, baseline=STOCK),
    }


ABOUT = {
    STOCK: "baseline: stock vLLM, graphs",
    SPARSE: "baseline: a small budget, graphs",
    "whole-graphs": "budget of the whole context = stock, graphs",
    "whole-eager": "budget of the whole context = stock, eager",
    **{
        name: f"{name.upper()}, a small budget: the first token = stock"
        for name in ("snapkv", "streamingllm")
    },
    "quest": "QUEST, budget of the whole context = stock",
    "sparda-whole": "SPARDA, top_k of the whole context, offloaded = stock",
    SPARDA: "baseline: SPARDA, few blocks, all on the device, eager",
    "sparda-ahead": "the same blocks, graphs, fetched ahead on a side stream",
    "sparda-blocking": "the same blocks, graphs, fetched when needed",
    SPARDA_AHEAD: "baseline: SPARDA, sparse prompts, offloaded, eager",
    "sparda-graphs": "the same in graphs",
    "sparda-profiled": "fetched ahead, with memory as vLLM finds it",
    "whole-compiled": "budget of the whole context = stock, as vLLM compiles it",
    "sparda-compiled": "SPARDA, top_k of the whole context, as vLLM compiles it = stock",
    "stock-eager": "how far stock vLLM is from itself",
}


def stages(options: argparse.Namespace) -> list[Stage]:
    """One stage for each variant."""
    every = variants(tiny=options.tiny)
    return [
        Stage(
            name, partial(run, name), limit_s=150 if variant.mode is llms.COMPILED else 110,
            min_s=40, alone=variant.profiled,
            needs=("smoke", *filter(None, (variant.baseline, variant.differs_from))),
            about=ABOUT.get(name, f"= {variant.baseline}"),
        )
        for name, variant in every.items()
    ]  # fmt: skip


def run(name: str, report: Report, options: argparse.Namespace) -> None:
    """Generates in one variant and compares.

    Raises:
        CheckFailedError: Other tokens without a near-tie, or what should happen did not.
    """
    from benchmarks import commands

    variant = variants(tiny=options.tiny)[name]
    model = shapes.write_checkpoint(options.work / "checkpoint", options.seed)
    prompts = shapes.parity_prompts(options.seed, tiny=options.tiny)
    dtype = variant.dtype or options.dtype
    arguments: dict[str, Any] = {
        "dtype": dtype, "max_model_len": 1024 if options.tiny else 4096,
        "kv_cache_memory_bytes": (64 << 20) if options.tiny else (256 << 20), "max_num_seqs": 8,
        "max_num_batched_tokens": 1024 if options.tiny else 4096,
        **(llms.EAGER if options.device == "cpu" else variant.mode), **variant.arguments,
    }  # fmt: skip
    if options.device == "cuda":
        # Of all memory; with bytes for the cache only a check at the start, of several engines.
        arguments["gpu_memory_utilization"] = 0.15
        if variant.profiled:
            del arguments["kv_cache_memory_bytes"]
    if options.device == "cpu" and variant.backend != "SPARDA":  # which has it in its settings
        arguments["block_size"] = 32
    if variant.pool_tokens:
        block_size = report_of(options, SPARSE)["facts"]["block_size"]
        arguments["num_gpu_blocks_override"] = variant.pool_tokens // block_size
    arm = llms.stock_arm(options)
    if variant.settings is not None:
        arm = arms.Arm(name, variant.settings, variant.backend)
    started = time.perf_counter()
    llm = llms.build(arm, options, model, **arguments)
    report.note(**llms.facts(llm, started), settings=variant.settings, dtype=dtype)
    new_tokens = TINY_NEW_TOKENS if options.tiny else NEW_TOKENS
    outputs = generate(llm, prompts, new_tokens, variant.waves)
    counted = {
        key.removeprefix("vllm:").removeprefix("sparse_").removesuffix("_total"): value
        for key, value in commands.counters(llm).items()
    }
    counted["preemptions"] = counted.pop("num_preemptions", 0)
    counted["cached"] = sum(output["cached"] for output in outputs[len(prompts) :])
    report.note(counted=counted)
    report.note(outputs=outputs)
    problems = []
    if options.device == "cuda":
        llms.check_graphs(report.facts, variant.mode)
    if variant.expect and not counted.get(variant.expect):
        problems.append(f"{variant.expect} is 0, so this proves nothing")
    elif variant.beyond and counted[variant.expect] <= counted[variant.beyond]:
        problems.append(f"{variant.expect} is not beyond {variant.beyond}: nothing had to leave")
    if variant.differs_from:
        theirs = report_of(options, variant.differs_from)["facts"]["outputs"]
        gaps = [divergence.gap for divergence in _differences(outputs, theirs)]
        if max(gaps, default=0.0) <= max(NEAR_TIE.values()):
            problems.append(f"same tokens as {variant.differs_from}, so this proves nothing")
    if variant.baseline:
        theirs = report_of(options, variant.baseline)["facts"]["outputs"]
        for divergence in _differences(outputs, theirs, variant.compared):
            report.add(**divergence._asdict(), ok=divergence.gap <= NEAR_TIE[dtype])
        wrong = [row for row in report.rows if not row["ok"]]
        if wrong:
            problems.append(f"{len(wrong)} of {len(outputs)} requests differ without a near-tie")
    report.note(requests=len(outputs), same=len(outputs) - len(report.rows))
    if problems:
        raise CheckFailedError("; ".join(problems))


def _differences(
    outputs: list[dict], baseline: list[dict], compared: int | None = None
) -> list[Divergence]:
    steps = [request["steps"][:compared] for request in baseline]
    tokens = [[step["token"] for step in request["steps"][:compared]] for request in outputs]
    return divergences(tokens, steps * (len(outputs) // len(steps)))


def generate(llm: Any, prompts: list[list[int]], new_tokens: int, waves: int) -> list[dict]:
    """Greedy outputs of all requests, wave by wave, with what else was likely in each step.

    Returns:
        ``steps``, as `step_of` makes them, and ``cached`` tokens of each request.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=LIKELY
    )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = []
    for _ in range(waves):
        for found in llm.generate(requests, sampling, use_tqdm=False):
            completion = found.outputs[0]
            steps = [
                step_of(token, {key: entry.logprob for key, entry in likely.items()})
                for token, likely in zip(completion.token_ids, completion.logprobs, strict=True)
            ]
            outputs.append({"steps": steps, "cached": found.num_cached_tokens or 0})
    return outputs


def step_of(token: int, likely: dict[int, float]) -> dict:
    """One step: its token, and by how much other likely ones are behind it."""
    behind = {str(key): round(likely[token] - value, 5) for key, value in likely.items()}
    return {
        "token": token,
        "behind": {key: gap for key, gap in behind.items() if key != str(token)},
    }
