# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What an arm still finds of its own text: items of a long list that it wrote itself.

A short prompt asks for a numbered list whose items are three random words each. The list, thousands
of tokens, is forced through decode, so that to every arm it is generated text and the same one. So
is a second turn, which repeats some items: number and first word are forced, the other two words
are left to the model, and only both count. ``--document`` puts so many tokens of a play in front,
for arms that evict prompts.

All lists of an arm are one batch. An arm is in the file as soon as it has answered, and is not
asked again.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from benchmarks import arms, harness
from benchmarks.quality import items
from benchmarks.results import OtherResultError, Recorder
from benchmarks.tables import table
from benchmarks.worker import Worker, WorkerError

if TYPE_CHECKING:
    import argparse

    from benchmarks.quality.items import Task
    from benchmarks.tables import Columns

ARMS = "dense,stage2-512,stage2-1024,sparda-32,query-32"
MIN_CONTEXT = 32  # below the prompt, which alone decides whether a policy serves it sparsely


def ask(worker: Worker, tokenizer: Any, tasks: list[Task]) -> dict[str, Any]:
    """Lets an engine write all lists, and judges its answers."""
    started = time.perf_counter()
    texts = worker.call(
        "force", prompts=[task.prompt for task in tasks], forced=[task.text for task in tasks]
    )
    asked = [
        {
            "list": number,
            "item": one.item,
            "back": one.at - one.written,
            "expected": one.answer,
            "got": tokenizer.decode(text[one.at : one.at + items.ANSWER_TOKENS]).strip(),
        }
        for number, (task, text) in enumerate(zip(tasks, texts, strict=True))
        for one in task.asked
    ]
    return {
        "correct": sum(one["got"] == one["expected"] for one in asked),
        "questions": len(asked),
        "asked": asked,
        "metrics": worker.call("counters"),
        "seconds": round(time.perf_counter() - started, 1),
    }


def columns(count: int) -> Columns:
    """What a table shows of an arm."""

    def half(row: dict[str, Any], late: bool) -> str:
        own = [one for one in row["asked"] if (2 * one["item"] > count) is late]
        return f"{sum(one['got'] == one['expected'] for one in own)} of {len(own)}"

    return {
        "right": "{correct} of {questions}",
        "first half of the list": lambda row: half(row, False),
        "second half": lambda row: half(row, True),
    }


def shown(cell: dict[str, Any]) -> str:
    """How long the texts and prompts of a cell are."""
    prompt, text = (f"{max(cell[key]):,}" for key in ("prompt_tokens", "generated_tokens"))
    return f"{text} tokens after a prompt of {prompt}"


def render(result: dict[str, Any]) -> str:
    """A table for each length of document."""
    parts = [f"**{result['model']}**, {result['lists']} lists of {result['items']} items"]
    for cell in result["cells"].values():
        rows = [{"arm": name, **row} for name, row in cell["arms"].items()]
        parts += [shown(cell), table(rows, {"arm": "arm", **columns(result["items"])})]
    return "\n\n".join(parts)


def run(options: argparse.Namespace, chosen: list[arms.Arm], record: Recorder) -> list[str]:
    """Asks the arms that the file lacks; returns those whose engine failed.

    Raises:
        ValueError: There are no such lists.
        OtherResultError: The file has an arm with other settings.
    """
    tokenizer = harness.tokenizer_of(options.model)
    tasks = items.make(
        tokenizer, options.lists, options.items, options.questions,
        document=options.document, seed=options.seed,
    )  # fmt: skip
    cell = record.body["cells"].setdefault(str(options.document), {"arms": {}})
    cell["prompt_tokens"] = [len(task.prompt) for task in tasks]
    cell["generated_tokens"] = [len(task.text) for task in tasks]
    longest = max(len(task.prompt) + len(task.text) for task in tasks)
    failed = []
    for arm in chosen:
        if found := cell["arms"].get(arm.name):
            if found["settings"] != arm.settings:
                raise OtherResultError(
                    f"{record.path} has {arm.name} with {found['settings']} and this run with "
                    f"{arm.settings}; name another file with --out"
                )
            continue
        arguments = harness.engine_args(
            harness.resolve_model(options.model), longest, longest * len(tasks) * 3 // 2,
            enforce_eager=True, max_num_seqs=len(tasks),
            logits_processors=["benchmarks.teacher:ForcedTokens"],
        )  # fmt: skip
        try:
            with Worker(arm, arguments, served=True) as worker:
                row = ask(worker, tokenizer, tasks)
        except WorkerError as error:
            harness.progress(f"{error}\n{arm.name} failed; the same command tries again")
            failed.append(arm.name)
            continue
        cell["arms"][arm.name] = {"settings": arm.settings, **row}
        record.save()
        harness.progress(f"{arm.name}: {row['correct']} of {row['questions']}")
    return failed


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("lists", __doc__, "one list of 30 items")
    harness.add_model(parser, "qwen")
    arms.add_options(parser, ARMS)
    parser.add_argument("--lists", type=int, default=2)
    parser.add_argument("--items", type=int, default=400, help="of a list")
    parser.add_argument("--questions", type=int, default=20, help="about each list")
    parser.add_argument("--document", type=int, default=0, help="tokens of prose in each prompt")
    parser.add_argument("--seed", type=int, default=0)
    options = harness.parse(parser, arguments, {"lists": 1, "items": 30})
    chosen = arms.parse_arms(parser, options, {"min_context": MIN_CONTEXT})
    body = {key: getattr(options, key) for key in ("model", "seed", "lists", "items", "questions")}
    try:
        with Recorder(options.out, "lists", {**body, "cells": {}}, resume=True) as record:
            failed = run(options, chosen, record)
    except (OtherResultError, ValueError) as error:
        parser.error(str(error))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
