# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Accuracy of the backends against dense attention: needles, two-turn conversations, prose.

Every arm is an engine of its own that answers the same questions. Tasks:

* ``single``, ``multikey``: share of questions answered with the exact value (`benchmarks.needles`).
* ``two-turn``: the second question of a conversation, with the prefix cache warm, emptied between
  the turns, or partly overwritten by other requests in a small pool.
* ``prose``: KL divergence from the dense arm, teacher-forced through decode (`benchmarks.teacher`).

Each cell is in the result file as soon as it exists; ``--resume`` skips those that are there.
``--preset policies`` compares the policies at equal budgets that way.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import arms, corpus, harness, needles
from benchmarks.results import FOLDER, OtherResultError, Recorder
from benchmarks.worker import Worker, WorkerError

if TYPE_CHECKING:
    import argparse

TASKS = ("single", "multikey", "two-turn", "prose")
MIN_CONTEXT = 1024  # below every prompt, so that the arms are sparse at 2048 tokens too
PROSE_CONTEXT = 4096
PROSE_TOKENS = 192
POOL_CONTEXTS = 12  # KV pool of the other tests, in contexts of the greatest length
PRESSURE_POOL = 2.25  # KV pool of the two-turn test under pressure, in contexts
MODES = ("warm", "cold", "pressure")
QUICK = {"questions": 4, "conversations": 2, "passages": 1}
PRESETS = {
    "policies": {
        **{"arms": "policies", "contexts": [4096], "tasks": ["single", "multikey", "prose"]},
        **{"questions": 20, "resume": True, "out": FOLDER / "accuracy-policies.json"},
    }
}


def judged(questions: list[needles.Question], replies: list[str]) -> dict[str, Any]:
    """Returns how many questions were answered, and the replies to the others."""
    wrong = [
        {**question.detail, "expected": question.answer, "got": reply}
        for question, reply in zip(questions, replies, strict=True)
        if not needles.is_correct(reply, question.answer)
    ]
    count = len(questions)
    return {
        "accuracy": 1 - len(wrong) / count,
        "correct": count - len(wrong),
        "questions": count,
        "wrong": wrong,
    }


def ask(worker: Worker, questions: list[needles.Question]) -> dict[str, Any]:
    """Asks all questions and returns accuracy and completions.

    Questions about one context follow each other, so that the prefix cache serves the later ones.
    """
    started = time.perf_counter()
    worker.call("forget")
    replies = [""] * len(questions)
    for wave in itertools.zip_longest(*needles.by_context(questions)):
        indices = [index for index in wave if index is not None]
        prompts = [questions[index].prompt for index in indices]
        answers = worker.call("complete", prompts=prompts, max_tokens=needles.ANSWER_TOKENS)
        for index, answer in zip(indices, answers, strict=True):
            replies[index] = answer["text"]
    return {
        **judged(questions, replies),
        "prompt_tokens": [min(lengths := [len(q.prompt) for q in questions]), max(lengths)],
        "seconds": round(time.perf_counter() - started, 1),
    }


def converse(
    worker: Worker,
    tokenizer: Any,
    conversations: list[needles.Conversation],
    mode: str,
    others: list[list[int]],
) -> dict[str, Any]:
    """Holds the conversations, one after the other, and returns how the questions were answered.

    Args:
        worker: The engine.
        tokenizer: The model's tokenizer.
        conversations: What to ask.
        mode: One of `MODES`: what happens to the prefix cache between the turns.
        others: Long prompts of other users, for the mode "pressure".
    """

    def complete(*prompts: list[int]) -> dict:
        return worker.call("complete", prompts=prompts, max_tokens=needles.ANSWER_TOKENS)[0]

    correct: list[tuple[bool, bool]] = []
    cached: list[int] = []
    for talk in conversations:
        worker.call("forget")
        first = [{"role": "user", "content": f"{talk.context}\n\n{talk.questions[0]}"}]
        reply = complete(needles.chat_prompt(tokenizer, first, talk.prefixes[0]))
        answer = talk.prefixes[0] + reply["text"].split("\n")[0]
        second = [
            *first,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": talk.questions[1]},
        ]
        prompt = needles.chat_prompt(tokenizer, second, talk.prefixes[1])
        if mode == "cold":
            worker.call("forget")
        if mode == "pressure":
            complete(*others[:2])
        final = complete(prompt, *others[2:])
        cached.append(final["cached_tokens"])
        pairs = zip((reply, final), talk.answers, strict=True)
        correct.append(tuple(needles.is_correct(got["text"], wanted) for got, wanted in pairs))
    return {
        "first_turn": sum(first for first, _ in correct),
        "second_turn": sum(second for _, second in correct),
        "conversations": len(correct),
        "second_turn_cached_tokens": harness.summary(cached),
    }


class _Run:
    """All arms of a run, cell by cell."""

    def __init__(
        self, options: argparse.Namespace, names: list[str], record: Recorder, scratch: Path
    ) -> None:
        self._options, self._names = options, names
        self._record, self._scratch = record, scratch
        self._tokenizer = harness.tokenizer_of(options.model)

    @functools.cached_property
    def _talks(self) -> list[needles.Conversation]:
        options, limit = self._options, self._options.two_turn_context - needles.ANSWER_TOKENS
        return needles.two_turn(self._tokenizer, limit, options.conversations, options.seed)

    def arm(self, arm: arms.Arm) -> None:
        """Measures what the file lacks of an arm; starts no engine if nothing is missing."""
        options = self._options
        found = self._record.body["arms"].setdefault(arm.name, {})
        found |= {"backend": arm.settings and arm.backend, "settings": arm.settings}
        needles_of = [
            (task, str(context))
            for task, context in itertools.product(options.tasks, options.contexts)
            if task in ("single", "multikey") and str(context) not in found.get(task, {})
        ]
        turns = found.setdefault("two-turn", {}) if "two-turn" in options.tasks else {}
        modes = [mode for mode in MODES if "two-turn" in options.tasks and mode not in turns]
        prose = "prose" in options.tasks and ("prose" not in found or self._lacks_reference(arm))
        if needles_of or prose or {"warm", "cold"} & set(modes):
            with self._worker(arm, self._longest(), POOL_CONTEXTS) as worker:
                for task, context in needles_of:
                    cell = ask(worker, self._questions(task, int(context)))
                    found.setdefault(task, {})[context] = cell
                    self._save(f"{arm.name}: {task} {context}: {cell['correct']}")
                for mode in ("warm", "cold"):
                    if mode in modes:
                        self._converse(worker, mode, turns)
                if prose:
                    cell = self._prose(worker, arm)
                    found.setdefault("prose", cell)
                    self._save(f"{arm.name}: prose KL {cell['kl']:.4f}")
                found["metrics"] = worker.call("counters")
        if "pressure" in modes:
            with self._worker(arm, options.two_turn_context, PRESSURE_POOL) as worker:
                self._converse(worker, "pressure", turns)
                preempted = worker.call("counters")["vllm:num_preemptions"]
                turns["pressure"]["preemptions"] = preempted
        self._record.save()

    def _save(self, line: str) -> None:
        self._record.save()
        harness.progress(line)

    def _longest(self) -> int:
        options = self._options
        room = options.prose_context + options.prose_tokens + 64
        return max([*options.contexts, *([room] if "prose" in options.tasks else [])])

    def _worker(self, arm: arms.Arm, context: int, pool: float) -> Worker:
        # Compilation is cached per setting, so compiling every arm would take longer than it saves.
        # More requests than fit the pool never run; without the limit SPARDA would plan its device
        # memory for so many that everything stayed on the device.
        arguments = harness.engine_args(
            harness.resolve_model(self._options.model), context, int(pool * context),
            enforce_eager=True, max_num_seqs=POOL_CONTEXTS,
        )  # fmt: skip
        if "prose" in self._options.tasks:
            arguments["logits_processors"] = ["benchmarks.teacher:ForcedTokens"]
        return Worker(arm, arguments, served=True)

    def _questions(self, task: str, context: int) -> list[needles.Question]:
        limit = context - needles.ANSWER_TOKENS
        options = self._options
        return needles.SETS[task](self._tokenizer, limit, options.questions, options.seed)

    def _converse(self, worker: Worker, mode: str, turns: dict) -> None:
        limit = self._options.two_turn_context - needles.ANSWER_TOKENS
        others = corpus.documents(self._tokenizer, 3, limit) if mode == "pressure" else []
        cell = turns[mode] = converse(worker, self._tokenizer, self._talks, mode, others)
        self._save(f"{worker.arm.name}: two-turn {mode}: {cell['second_turn']}")

    def _references(self) -> list[Path]:
        return [self._scratch / f"dense-{index}.npy" for index in range(self._options.passages)]

    def _lacks_reference(self, arm: arms.Arm) -> bool:
        """Whether the baseline must read the prose again, for arms that are still to follow it."""
        found = self._record.body["arms"]
        waiting = any("prose" not in found.get(name, {}) for name in self._names)
        return arm.name == self._names[0] and waiting and not self._references()[0].exists()

    def _prose(self, worker: Worker, arm: arms.Arm) -> dict[str, Any]:
        """Forces the arm through the passages and compares it with the dense one."""
        from benchmarks import teacher

        # One more than is compared: the first token comes from prefill.
        count, context = self._options.passages, self._options.prose_context
        length = context + self._options.prose_tokens + 1
        passages = corpus.prose_tokens(self._tokenizer, count, length)
        forced = [passage[context:] for passage in passages]
        references = self._references()
        own = [path.with_name(f"arm-{path.name}") for path in references]
        paths = own if references[0].exists() else references
        worker.call("forget")
        worker.call(
            "force",
            prompts=[passage[:context] for passage in passages],
            forced=forced,
            record_to=[str(path) for path in paths],
        )
        compared = [teacher.compare(*each) for each in zip(references, paths, forced, strict=True)]
        for path in own:
            path.unlink(missing_ok=True)
        return {
            **harness.mean_of(compared, teacher.MEANS),
            "context": context,
            "kl_by_quarter": [
                statistics.mean(parts)
                for parts in zip(*(each["kl_by_quarter"] for each in compared), strict=True)
            ],
            "passages": compared,
        }


def run(options: argparse.Namespace, chosen: list[arms.Arm]) -> list[str]:
    """Measures all arms and returns the names of those whose engine failed."""
    body = {
        "model": options.model, "seed": options.seed,
        "two_turn_context": options.two_turn_context, "questions": options.questions, "arms": {},
    }  # fmt: skip
    if (prose := (options.prose_context, options.prose_tokens)) != (PROSE_CONTEXT, PROSE_TOKENS):
        body["prose"] = "{}+{}".format(*prose)
    failed = []
    record = Recorder(options.out, "accuracy", body, resume=options.resume)
    with record, tempfile.TemporaryDirectory(prefix="vllm-sparse-prose-") as scratch:
        measured = _Run(options, [arm.name for arm in chosen], record, Path(scratch))
        for arm in chosen:
            try:
                measured.arm(arm)
            except WorkerError as error:
                if arm is chosen[0] or not options.resume:
                    raise
                harness.progress(f"{error}\n{arm.name} failed; --resume tries again")
                failed.append(arm.name)
    return failed


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("accuracy", __doc__, "4 questions, 2 conversations, 1 text")
    harness.add_model(parser, "qwen")
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 4096, 8192])
    arms.add_options(parser, "ablations", "; the first one is dense")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--questions", type=int, default=20, help="per needle cell")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--two-turn-context", type=int, default=4096)
    parser.add_argument("--passages", type=int, default=4, help="of prose")
    parser.add_argument(
        "--prose-context", type=int, default=PROSE_CONTEXT, help="tokens of its prompts"
    )
    parser.add_argument(
        "--prose-tokens", type=int, default=PROSE_TOKENS, help="that follow, one a decode step"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="only what --out does not have yet")
    parser.add_argument("--preset", choices=PRESETS, help="defaults of a whole comparison")
    options = harness.parse(parser, arguments, QUICK, PRESETS)
    chosen = arms.parse_arms(parser, options, {"min_context": MIN_CONTEXT}, baseline=True)
    try:
        failed = run(options, chosen)
    except OtherResultError as error:
        parser.error(str(error))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
