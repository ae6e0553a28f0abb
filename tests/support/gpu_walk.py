# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The programs for a GPU, stage by stage, on a pretended one: their own code and command lines.

``GPU_WALK=first python -m tests.support.gpu_walk OPTIONS`` is ``make gpu-first ARGS=OPTIONS`` but
for the GPU, and for sizes that an interpreter of kernels can bear; so is ``make gpu-walk``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

PROGRAM_ENV = "GPU_WALK"
LAUNCHES = "VLLM_SPARSE_LAUNCHES"
BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"
# What only a GPU has, or compilers for one.
NOT_HERE = ("sanitizer", "gsan")
PROMPTS = (340, 347)
BUDGET, POOL = 64, 512  # tokens: what is kept of a prompt, and what there is for all of them
LIMIT_S = 900  # of a stage
OPTIONS = ("--tiny", "--budget-s", "7200", "--jobs", "1")
# What is compiled on a GPU: the same graphs, of the same pieces, without a compiler.
PIECES = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_AND_PIECEWISE"}}
# Two decode, or three, padded to four. With pieces, the end of a prompt fits the largest graph,
# with room to spare.
ENGINE = ("--engine-arg", "cudagraph_capture_sizes=[1,2,4,96]", "max_num_batched_tokens=256")
# What is timed: of stock vLLM's requests two fit, of ROCKETKV's three.
TIMED_CONTEXT, GROWTH, TIMED_BYTES = 512, 64, 1700 << 10
CHUNK = 96  # of two prompts at once, which are to run out of blocks together


def install() -> None:
    """Pretend a GPU, before anything of vLLM is imported."""
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    os.environ.setdefault(LAUNCHES, "")  # nor is one found for this GPU installed
    # There are benchmarks among the tests, too; it is the others that are meant.
    sys.path[:0] = map(str, (Path(__file__).parents[2], Path(__file__).parents[1]))
    from support import interpreter, pretend_gpu, pretend_vllm

    interpreter.install()  # first: what is captured must be a whole launch
    pretend_gpu.install()
    pretend_vllm.install(BREAKABLE)


def shrink() -> None:
    """Two short prompts, a few tokens; kernels are timed once, on one input, a few launches."""
    from benchmarks.gpu import decode, llms, shapes, tokens
    from benchmarks.ops import registry, search, timings

    def prompts(seed: int, **_: bool) -> list[list[int]]:
        return [shapes.random_prompt(seed, length, 1024) for length in PROMPTS]

    shapes.parity_prompts = prompts
    tokens.TINY_NEW_TOKENS = 8
    tokens.REQUESTS = len(PROMPTS)  # so that SPARDA's frames are too few for them
    variants = tokens.variants
    tokens.TINY_LITTLE = {**tokens.TINY_LITTLE, "token_budget": BUDGET}
    tokens.variants = lambda **tiny: _tight(variants(**tiny))
    llms.COMPILED = PIECES
    decode.TINY_CELLS = (decode.Cell(TIMED_CONTEXT, (1, decode.AS_DENSE, decode.MOST), 1),)
    decode.DROPPED_STEPS = decode.PROFILED_STEPS = 1
    decode.GROWTH, arguments = GROWTH, decode._arguments
    decode._arguments = lambda *of: {**arguments(*of), "kv_cache_memory_bytes": TIMED_BYTES}
    registry.COLD_BYTES = 1
    timings.median_ms.__defaults__ = (1,)
    search.MOST_CANDIDATES = 2


def _tight(variants: dict[str, Any]) -> dict[str, Any]:
    """Two requests do not fit the pool, but the longest does, beside a null block; counts are late.

    What a device counts is read every few dozen steps, and there are not so many.
    """
    made = {name: dataclasses.replace(each, beyond=None) for name, each in variants.items()}
    arguments = {
        **made["preemption"].arguments, "max_model_len": POOL - 64,
        "long_prefill_token_threshold": CHUNK,
    }  # fmt: skip
    made["preemption"] = dataclasses.replace(
        made["preemption"], pool_tokens=POOL, arguments=arguments
    )
    return made


def program_of(name: str) -> Any:
    """A program whose stages are begun here, and have time."""
    program: Any = importlib.import_module(f"benchmarks.gpu.{name}")
    program.MODULE, plan = "tests.support.gpu_walk", program.plan
    program.plan = lambda options: [
        dataclasses.replace(
            stage,
            limit_s=LIMIT_S,
            env={**stage.env, **pieces(stage.name), **installed(stage.name, options.out)},
        )
        for stage in plan(options)
        if stage.name not in NOT_HERE
    ]
    return program


def pieces(stage: str) -> dict[str, str]:
    """What the environment of a stage says of graphs."""
    return {BREAKABLE: "1"} if stage.endswith("-compiled") else {}


def installed(stage: str, out: Path) -> dict[str, str]:
    """Where the stage that installs a table puts it: not where later starts look for one."""
    return {LAUNCHES: str(out.absolute() / "installed.json")} if stage == "install" else {}


def main(arguments: list[str]) -> int:
    """Run a program, or one of its stages."""
    program = program_of(os.environ[PROGRAM_ENV])
    if "--stage" in arguments:
        install()
        shrink()
        return program.main(arguments)
    return program.main([*OPTIONS, *ENGINE, *arguments])


def serve(job: dict[str, Any]) -> None:
    """Run one stage in this process, which is forked from one with a pretended GPU."""
    if "result" in job:
        return configure(job)
    shrink()
    return program_of(job["program"]).main(job["arguments"])


class Configured(Exception):
    """Raised with a configuration that vLLM has accepted."""


def configure(job: dict[str, Any]) -> None:
    """Have vLLM accept the arguments of every engine, of real size, and start none.

    Args:
        job: ``work``, a folder, and ``result``, a file for what vLLM made of each stage: backend,
            mode of graphs, most requests, longest one, whether kernels of samplers are compiled.
    """
    from vllm.v1.engine import llm_engine

    from benchmarks.gpu import bench, check, forced, stages, tokens
    from benchmarks.ops import timings

    def configured(engine_args: Any, usage_context: Any = None, **_: Any) -> None:
        raise Configured(engine_args.create_engine_config(usage_context))

    llm_engine.LLMEngine.from_engine_args = configured
    timings.copy_bytes_per_s = lambda *_: 4e12
    timings.link_bytes_per_s = lambda *_: {"host_to_device": 5e10, "device_to_host": 5e10}
    forced._available_gib = lambda: 4.0  # the pool is not to be refused on this machine
    found, work = {}, Path(job["work"])
    stages.Report(work / f"{tokens.SPARSE}.json").note(block_size=64)
    for program in (check, bench):
        for stage in program.plan(program.parser_of().parse_args([])):
            if not starts_engine(stage):
                continue
            options = program.parser_of().parse_args(["--work", str(work), "--stage", stage.name])
            try:
                stage.run(stages.Report(work / "report.json"), options)
            except Configured as made:
                (config,) = made.args
                found[stage.name] = [
                    config.attention_config.backend.name,
                    config.compilation_config.cudagraph_mode.name,
                    config.scheduler_config.max_num_seqs,
                    config.model_config.max_model_len,
                    config.kernel_config.enable_jit_warmup,
                ]
    Path(job["result"]).write_text(json.dumps(found))


def starts_engine(stage: Any) -> bool:
    """Whether a stage of ``gpu-check`` or ``gpu-bench`` does more than run kernels."""
    return stage.name not in ("smoke", "sanitizer", "gsan") and "kernel" not in stage.name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
