# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Judges arms by tasks that are harder than needles, in a server or outside of it.

``python -m benchmarks.quality.judge`` starts an engine per arm, asks it every question and writes
each cell as soon as it exists; run again, it goes on where it was. ``--lab`` answers outside the
server: one dense prompt per question serves all arms, oracles and candidates of
`benchmarks.quality.candidates` included, at a fraction of the time.

All arms answer the same questions, greedily; scores are compared in pairs with the first arm's.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import arms, harness
from benchmarks.quality import questions
from benchmarks.results import FOLDER, OtherResultError, Recorder
from benchmarks.worker import Worker, WorkerError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from benchmarks.quality.questions import Question

MIN_CONTEXT = 1024
# Names of arms by the name of a group, with --lab.
LABORATORY = {
    "votes": [
        "dense",
        *(f"{kind}-{budget}" for budget in (256, 512, 1024) for kind in ("paper", "window16")),
        *("pool15-1024", "window128-1024", "idealvotes-1024"),
    ],
}
QUICK = {"questions": 2, "contexts": [4096], "tasks": ["vt", "niah_multikey_2"]}


def serve(options: argparse.Namespace, chosen: list[arms.Arm], record: Recorder) -> list[str]:
    """Asks an engine of each arm what the file lacks; returns the arms whose engine failed.

    Raises:
        OtherResultError: The file has answers of an arm with other settings.
    """
    failed = []
    for arm in chosen:
        cells = record.body["arms"].setdefault(arm.name, {"settings": arm.settings})
        if cells["settings"] != arm.settings:
            raise OtherResultError(
                f"{record.path} has {arm.name} with {cells['settings']} and this run with "
                f"{arm.settings}; name another file with --out"
            )
        for context in options.contexts:
            missing = list(_missing(options, cells, context, record))
            if not missing:
                continue
            arguments = harness.engine_args(
                harness.resolve_model(options.model), context, 2 * context,
                enforce_eager=True, max_num_seqs=1,
            )  # fmt: skip
            try:
                with Worker(arm, arguments, served=True) as worker:
                    for question in missing:
                        reply = worker.call(
                            "complete", prompts=[question.prompt], max_tokens=question.max_tokens
                        )
                        _note(cells, context, question, reply[0]["text"])
                        record.save()
            except WorkerError as error:
                harness.progress(f"{error}\n{arm.name} at {context} failed")
                failed.append(arm.name)
    return failed


def experiment(options: argparse.Namespace, names: list[str], record: Recorder) -> None:
    """Answers outside the server, all arms of a question at once."""
    import torch

    from benchmarks.quality import candidates, lab, prompts

    network = prompts.Network(
        harness.resolve_model(options.model), forecast=options.forecast,
        prompt_dtype=getattr(torch, options.prompt_dtype),
    )  # fmt: skip
    try:
        every = {
            context: candidates.schemes(names, context, network) for context in options.contexts
        }
    except ValueError as error:
        sys.exit(str(error))
    tokenizer = harness.tokenizer_of(options.model)
    eos = network.eos | {tokenizer.eos_token_id}
    for context, schemes in every.items():
        everything = record.body["arms"]
        for name in schemes:
            everything.setdefault(name, {})
        for question in _questions(options, context, record):
            todo = {
                name: scheme
                for name, scheme in schemes.items()
                if not _has(everything[name], context, question)
            }
            if not todo:
                continue
            kept = repr((options.model, options.prompt_dtype, question.prompt)).encode()
            file = options.scratch / f"{hashlib.sha256(kept).hexdigest()}.pt"
            prompt = prompts.saved(network, question.prompt, file if options.keep else None)
            found = lab.Lab(network, prompt, question.max_tokens, eos)
            for name, tokens in found.answers(todo).items():
                cell = _note(everything[name], context, question, tokenizer.decode(tokens))
                if not todo[name].leaves_out(len(question.prompt), question.max_tokens):
                    cell["read_everything"] = True
            if question.index < options.recall:
                for name, scheme in todo.items():
                    cell = everything[name].setdefault("recall", {}).setdefault(str(context), {})
                    kept, read = found.recall(scheme)
                    cell.setdefault(question.task, []).append({"kept": kept, "read": read})
            record.save()


def _questions(options: argparse.Namespace, context: int, record: Recorder) -> Iterator[Question]:
    for task in options.tasks:
        for question in questions.load(
            options.model, context, task, options.questions, options.seed
        ):
            _describe(record, context, question)
            yield question


def _describe(record: Recorder, context: int, question: Question) -> None:
    """Notes how long a question and its reply are: a task may fill a part of its context only.

    Raises:
        OtherResultError: The file's answers are to questions of another length.
    """
    lengths = {"prompt_tokens": len(question.prompt), "max_tokens": question.max_tokens}
    of_task = record.body["questions"].setdefault(str(context), {}).setdefault(question.task, {})
    noted = of_task.setdefault(str(question.index), lengths)
    if noted != lengths:
        raise OtherResultError(
            f"{record.path} has question {question.index} of {question.task} with {noted} and this "
            f"run with {lengths}, so replies would not be to the same text; name another file with "
            "--out"
        )


def _has(cells: dict[str, Any], context: int, question: Question) -> bool:
    return str(question.index) in cells.get(str(context), {}).get(question.task, {})


def _missing(
    options: argparse.Namespace, cells: dict[str, Any], context: int, record: Recorder
) -> Iterator[Question]:
    every = _questions(options, context, record)
    return (each for each in every if not _has(cells, context, each))


def _note(cells: dict[str, Any], context: int, question: Question, reply: str) -> dict[str, Any]:
    """Keeps a reply and returns its cell."""
    of_task = cells.setdefault(str(context), {}).setdefault(question.task, {})
    cell = {"score": round(question.score(reply), 4), "reply": reply}
    of_task[str(question.index)] = cell
    return cell


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("quality.judge", __doc__, "2 questions of 2 tasks")
    harness.add_model(parser, "qwen")
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 8192])
    groups = f", with --lab a group: {', '.join(LABORATORY)}; the first one is dense"
    arms.add_options(parser, "dense,rocketkv-1024", groups)
    parser.add_argument(
        "--tasks", nargs="+", choices=questions.TASKS, default=list(questions.TASKS)
    )
    parser.add_argument("--questions", type=int, default=20, help="of each task, at most 100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lab", action="store_true", help="outside the server")
    parser.add_argument(
        "--prompt-dtype", choices=("bfloat16", "float32"), default="bfloat16",
        help="what prompts are computed in, with --lab; on some CPUs float32 takes less time",
    )  # fmt: skip
    parser.add_argument(
        "--recall", type=int, default=0,
        help="questions of each task whose dense attention is compared with what arms keep and "
        "read, with --lab",
    )  # fmt: skip
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "vllm-sparse-prompts",
        help="for dense prompts, 17 KB a token of Qwen 0.5B, with --lab",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="keep dense prompts there")
    parser.set_defaults(out=FOLDER / "quality.json")
    options = harness.parse(parser, arguments, QUICK)
    if options.lab and options.out == FOLDER / "quality.json":
        options.out = FOLDER / "quality-lab.json"
    if options.lab and options.setting:
        parser.error(
            "--setting is for arms that are served; with --lab name the arm that has the value, or "
            "add it to KINDS in benchmarks/quality/candidates.py"
        )
    if lacking := questions.lacking(options.tasks):
        parser.error(lacking)
    body = {
        "model": options.model, "seed": options.seed, "lab": options.lab,
        "questions": {}, "arms": {},
    }  # fmt: skip
    if options.lab:
        body["prompt_dtype"] = options.prompt_dtype
    try:
        with Recorder(options.out, "quality", body, resume=True) as record:
            if options.lab:
                group = LABORATORY.get(options.arms) or arms.GROUPS.get(options.arms)
                experiment(options, list(group or options.arms.split(",")), record)
                return
            chosen = arms.parse_arms(parser, options, {"min_context": MIN_CONTEXT}, baseline=True)
            failed = serve(options, chosen, record)
    except OtherResultError as error:
        parser.error(str(error))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
