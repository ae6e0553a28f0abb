# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Drafts from the context (ngram) beside sparse decode: accepted tokens and the cost of a token.

Stock vLLM and ROCKETKV, each without drafts and with them, take turns at the same prompts, which
ask for copies: a source file with a name changed, and functions out of it. All engines are alive at
once and one runs at a time. Beside the time, CPU seconds of the model's process are given, which
other processes disturb less. Only what follows the first token counts.
"""

from __future__ import annotations

import contextlib
import shlex
import statistics
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import arms, harness, tables
from benchmarks.results import Recorder
from benchmarks.worker import alive

if TYPE_CHECKING:
    import argparse

    from benchmarks.worker import Worker

_TASKS = {
    "edit": (
        "Rename the class TextWrapper to LineBreaker and change nothing else. "
        "Reply with the whole changed file."
    ),
    "extract": (
        "Copy the functions wrap, fill, shorten, dedent and indent from this file, word for word, "
        "with their docstrings."
    ),
}
_QUICK = {"context": 512, "generate": 24, "rounds": 1, "tasks": ["edit"]}
_DRAFTING = " + ngram"


def prompts(tokenizer: Any, num_tokens: int) -> dict[str, list[int]]:
    """Returns a prompt of about that many tokens for each task: a file, then what to do.

    The files are modules of Python's own library.
    """
    text = "".join(Path(str(module.__file__)).read_text() for module in (shlex, textwrap))
    tokens = tokenizer.encode(text)
    made = {}
    for name, task in _TASKS.items():
        file = tokenizer.decode(tokens[-(num_tokens - 100) :])
        content = f"```python\n{file}\n```\n\n{task}"
        chat = [{"role": "user", "content": content}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        made[name] = list(ids)
    return made


def measure(worker: Worker, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Generates once; see :func:`benchmarks.commands.generate_once`."""
    with worker.running():
        found: dict[str, Any] = worker.call("generate_once", prompt=prompt, max_tokens=new_tokens)
    steps, tokens = found["steps"], found["tokens"]
    found["tokens_per_step"] = tokens / steps
    found["ms"] = 1000 * found["seconds"] / tokens
    found["cpu_ms"] = 1000 * found["cpu"] / tokens
    return found


def evaluate(turns: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What follows from the turns of one task.

    Args:
        turns: Of each engine, what each round took; of the first one, which others are compared
            with, all rounds.

    Returns:
        Of each engine medians over rounds; speed-ups are medians of ratios within a round.
    """
    stock, rows = next(iter(turns.values())), {}
    for name, taken in turns.items():
        if not taken:
            continue
        row = rows[name] = {
            key: taken[0][key] for key in ("tokens_per_step", "drafted", "accepted")
        }
        for key in ("ms", "cpu_ms"):
            row[key] = statistics.median(turn[key] for turn in taken)
            ratios = [one[key] / own[key] for one, own in zip(stock, taken, strict=False)]
            row[f"speedup_{key}"] = statistics.median(ratios)
        alone = turns[name.removesuffix(_DRAFTING)]
        row["text_as_without_drafts"] = taken[0]["text"] == alone[0]["text"]
    return rows


def label(name: str) -> str:
    """What a table calls an engine."""
    alone = name.removesuffix(_DRAFTING)
    kind = "stock" if alone == arms.DENSE else f"ROCKETKV, {arms.label(alone)}"
    return kind if name == alone else f"{kind}, drafts"


def columns() -> tables.Columns:
    """What a table shows of an engine."""
    return {
        "tokens per step": "{tokens_per_step:.2f}",
        "drafts accepted": lambda row: (
            f"{row['accepted']:.0f} of {row['drafted']:.0f}" if row["drafted"] else None
        ),
        "ms per token": "{ms:.1f}",
        "CPU ms per token": "{cpu_ms:.1f}",
        "speed-up": "{speedup_ms:.2f}x",
        "in CPU time": "{speedup_cpu_ms:.2f}x",
    }


def render(result: dict[str, Any]) -> str:
    """A table for each task."""
    parts = [f"**{result['model']}**, {result['new_tokens']} tokens, {result['rounds']} rounds"]
    for task, found in result["tasks"].items():
        rows = [{"arm": name, **row} for name, row in found["arms"].items()]
        shown = tables.table(rows, {"arm": "arm", **columns()})
        parts.append(f"{task}, a prompt of {found['prompt_tokens']} tokens:\n\n{shown}")
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("drafts", __doc__, "one short prompt, a few tokens")
    harness.add_model(parser, "qwen")
    arms.add_options(parser, "dense,rocket-512", "; the first one is the baseline")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--generate", type=int, default=160)
    parser.add_argument("--drafts", type=int, default=4, help="drafted tokens a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=list(_TASKS), default=list(_TASKS))
    options = harness.parse(parser, arguments, _QUICK)
    run(options, arms.parse_arms(parser, options, baseline=True))


def run(options: argparse.Namespace, chosen: list[arms.Arm]) -> None:
    """Starts every arm without drafts and with them, and lets them take turns."""
    drafter = {
        "method": "ngram", "num_speculative_tokens": options.drafts, "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }  # fmt: skip
    body: dict[str, Any] = {
        "model": options.model, "new_tokens": options.generate, "rounds": options.rounds,
        "drafter": drafter, "settings": {arm.name: arm.settings for arm in chosen}, "tasks": {},
    }  # fmt: skip
    shared = harness.engine_args(
        harness.resolve_model(options.model),
        max_model_len=options.context + options.generate + 64,
        pool_tokens=2 * options.context,
        enforce_eager=True,
    )
    asked = prompts(harness.tokenizer_of(options.model), options.context)
    with Recorder(options.out, "drafts", body) as record, contextlib.ExitStack() as stack:
        plain, drafting = (
            stack.enter_context(alive(chosen, {**shared, **further}))
            for further in ({}, {"speculative_config": drafter})
        )
        workers: dict[str, Worker] = {}
        for arm, *both in zip(chosen, plain, drafting, strict=True):
            workers |= zip((arm.name, arm.name + _DRAFTING), both, strict=True)
        for task in options.tasks:
            turns: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
            for number in range(options.rounds):
                for name in harness.alternating(list(workers), number):
                    took = measure(workers[name], asked[task], options.generate)
                    turns[name].append(took)
                    harness.progress(
                        f"{task}, {name}: {took['tokens_per_step']:.2f} tokens a step, "
                        f"{took['ms']:.1f} ms a token, cpu {took['cpu_ms']:.1f}"
                    )
                body["tasks"][task] = {
                    "prompt_tokens": len(asked[task]), "arms": evaluate(turns), "turns": turns,
                }  # fmt: skip
                record.save()


if __name__ == "__main__":
    main()
