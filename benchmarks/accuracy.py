# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Accuracy of the backends against dense attention: needles, two-turn conversations, prose.

Every arm is an engine of its own that answers the same questions. Tasks:

* ``single``, ``multikey``: share of questions answered with the exact value (`benchmarks.needles`).
* ``two-turn``: the second question of a conversation, with the prefix cache warm, emptied between
  the turns, or partly overwritten by other requests in a small pool.
* ``prose``: KL divergence from the dense arm, teacher-forced through decode (`benchmarks.teacher`).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

from benchmarks import corpus, harness, needles
from benchmarks.engine import Worker

TASKS = ("single", "multikey", "two-turn", "prose")
FULL_ARMS = (
    "dense,rocket-128,rocket-256,rocket-512,rocket-1024,stage1-512,stage2-512,"
    "page1-512,page2-512,skip1-512"
)
MIN_CONTEXT = 1024  # below every prompt, so that the arms are sparse at 2048 tokens too
PROSE_CONTEXT = 4096
PROSE_TOKENS = 192
POOL_CONTEXTS = 12  # KV pool of the other tests, in contexts of the greatest length
PRESSURE_POOL = 2.25  # KV pool of the two-turn test under pressure, in contexts
WARM, COLD, PRESSURE = "warm", "cold", "pressure"


# Commands, executed in the worker process.


def complete(llm, prompts: list[list[int]], max_tokens: int) -> list[dict]:
    """Returns the greedy completions, and how many prompt tokens came from the prefix cache."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [
        {"text": output.outputs[0].text, "cached_tokens": output.num_cached_tokens or 0}
        for output in outputs
    ]


def forget(llm) -> None:
    """Empties the prefix cache."""
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache could not be emptied")


def force(llm, prompts: list[list[int]], forced: list[list[int]], record_to: list[str]) -> None:
    """Generates given continuations and records the log-probabilities."""
    from benchmarks import teacher

    params = [
        teacher.sampling_params(tokens, Path(path))
        for tokens, path in zip(forced, record_to, strict=True)
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for output, tokens in zip(outputs, forced, strict=True):
        if list(output.outputs[0].token_ids) != list(tokens):
            raise RuntimeError("the engine did not generate the forced tokens")


def counters(llm) -> dict:
    """Returns the plugin's metrics."""
    from benchmarks.counters import sparse

    return sparse(llm)


# The benchmark.


def ask(worker: Worker, questions: list[needles.Question]) -> dict:
    """Asks all questions and returns accuracy and completions.

    Questions about one context follow each other, so that the prefix cache serves the later ones.
    """
    started = time.perf_counter()
    worker.call("forget")
    replies: dict[int, dict] = {}
    for wave in itertools.zip_longest(*needles.by_context(questions)):
        indices = [index for index in wave if index is not None]
        prompts = [questions[index].prompt for index in indices]
        answers = worker.call("complete", prompts=prompts, max_tokens=needles.ANSWER_TOKENS)
        replies.update(zip(indices, answers, strict=True))
    correct = [
        needles.is_correct(replies[index]["text"], question.answer)
        for index, question in enumerate(questions)
    ]
    return {
        "accuracy": sum(correct) / len(correct),
        "correct": sum(correct),
        "questions": len(correct),
        "prompt_tokens": [min(lengths := [len(q.prompt) for q in questions]), max(lengths)],
        "seconds": round(time.perf_counter() - started, 1),
        "wrong": [
            {**question.detail, "expected": question.answer, "got": replies[index]["text"]}
            for index, question in enumerate(questions)
            if not correct[index]
        ],
    }


def converse(
    worker: Worker,
    tokenizer,
    conversations: list[needles.Conversation],
    mode: str,
    others: list[list[int]],
) -> dict:
    """Holds the conversations, one after the other, and returns how the questions were answered.

    Args:
        worker: The engine.
        tokenizer: The model's tokenizer.
        conversations: What to ask.
        mode: What happens to the prefix cache between the turns.
        others: Long prompts of other users, for the mode "pressure".
    """
    correct: list[tuple[bool, bool]] = []
    cached: list[int] = []
    for talk in conversations:
        worker.call("forget")
        first = [{"role": "user", "content": f"{talk.context}\n\n{talk.questions[0]}"}]
        reply = _complete_one(worker, needles.chat_prompt(tokenizer, first, talk.prefixes[0]))
        answer = talk.prefixes[0] + reply["text"].split("\n")[0]
        second = [
            *first,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": talk.questions[1]},
        ]
        prompt = needles.chat_prompt(tokenizer, second, talk.prefixes[1])
        if mode == COLD:
            worker.call("forget")
        if mode == PRESSURE:
            worker.call("complete", prompts=others[:2], max_tokens=needles.ANSWER_TOKENS)
            prompts = [prompt, others[2]]
            final = worker.call("complete", prompts=prompts, max_tokens=needles.ANSWER_TOKENS)[0]
        else:
            final = _complete_one(worker, prompt)
        cached.append(final["cached_tokens"])
        correct.append(
            (
                needles.is_correct(reply["text"], talk.answers[0]),
                needles.is_correct(final["text"], talk.answers[1]),
            )
        )
    return {
        "first_turn": sum(first for first, _ in correct),
        "second_turn": sum(second for _, second in correct),
        "conversations": len(correct),
        "second_turn_cached_tokens": harness.summary(cached),
    }


def _complete_one(worker: Worker, prompt: list[int]) -> dict:
    return worker.call("complete", prompts=[prompt], max_tokens=needles.ANSWER_TOKENS)[0]


def run_arm(arm: harness.Arm, options: argparse.Namespace, tokenizer, scratch: Path) -> dict:
    """Runs all tasks on one arm and returns its part of the result."""
    model = harness.resolve_model(options.model)
    longest = max([*options.contexts, *([PROSE_CONTEXT + 256] if "prose" in options.tasks else [])])
    # Compilation is cached per setting, so compiling every arm would take longer than it saves.
    # More requests than fit the pool never run; without the limit SPARDA would plan its device
    # memory for so many that everything stayed on the device.
    common = {"enforce_eager": not options.compiled, "max_num_seqs": POOL_CONTEXTS}
    pool_tokens = POOL_CONTEXTS * longest
    arguments = harness.engine_args(model, longest, pool_tokens=pool_tokens, **common)
    if "prose" in options.tasks:
        arguments["logits_processors"] = ["benchmarks.teacher:ForcedTokens"]
    result: dict = {"backend": arm.settings and arm.backend, "settings": arm.settings}
    with Worker("benchmarks.accuracy", arm, arguments, served=True) as worker:
        for task, context in itertools.product(options.tasks, options.contexts):
            if task in ("single", "multikey"):
                make = needles.single if task == "single" else needles.multikey
                limit = context - needles.ANSWER_TOKENS
                questions = make(tokenizer, limit, options.questions, options.seed)
                cell = result.setdefault(task, {})[str(context)] = ask(worker, questions)
                harness.progress(
                    f"{arm.name}: {task} {context}: {cell['correct']}/{cell['questions']} "
                    f"in {cell['seconds']:.0f} s"
                )
        if "two-turn" in options.tasks:
            talks = _conversations(options, tokenizer)
            result["two-turn"] = {
                mode: converse(worker, tokenizer, talks, mode, []) for mode in (WARM, COLD)
            }
        if "prose" in options.tasks:
            result["prose"] = _prose(worker, arm, options, tokenizer, scratch)
        result["metrics"] = worker.call("counters")
    if "two-turn" in options.tasks:
        context = options.two_turn_context
        pool_tokens = int(PRESSURE_POOL * context)
        arguments = harness.engine_args(model, context, pool_tokens, **common)
        others = corpus.documents(tokenizer, 3, context - needles.ANSWER_TOKENS)
        with Worker("benchmarks.accuracy", arm, arguments, served=True) as worker:
            result["two-turn"][PRESSURE] = {
                **converse(worker, tokenizer, talks, PRESSURE, others),
                "preemptions": worker.call("counters")["vllm:num_preemptions"],
            }
        for mode, cell in result["two-turn"].items():
            harness.progress(
                f"{arm.name}: two-turn {mode}: {cell['second_turn']}/{cell['conversations']}, "
                f"cached {cell['second_turn_cached_tokens']['median']:.0f} tokens"
            )
    return result


def _conversations(options: argparse.Namespace, tokenizer) -> list[needles.Conversation]:
    limit = options.two_turn_context - needles.ANSWER_TOKENS
    return needles.two_turn(tokenizer, limit, options.conversations, options.seed)


def _prose(
    worker: Worker, arm: harness.Arm, options: argparse.Namespace, tokenizer, scratch: Path
) -> dict:
    """Forces the arm through the passages and compares it with the first arm, which is dense."""
    from benchmarks import teacher

    # One more than is compared: the first token comes from prefill.
    passages = corpus.prose_tokens(tokenizer, options.passages, PROSE_CONTEXT + PROSE_TOKENS + 1)
    forced = [passage[PROSE_CONTEXT:] for passage in passages]
    references = [scratch / f"dense-{index}.npy" for index in range(len(passages))]
    is_reference = not references[0].exists()
    paths = references if is_reference else [scratch / f"arm-{i}.npy" for i in range(len(passages))]
    worker.call("forget")
    worker.call(
        "force",
        prompts=[passage[:PROSE_CONTEXT] for passage in passages],
        forced=forced,
        record_to=[str(path) for path in paths],
    )
    compared = [
        teacher.compare(reference, path, tokens)
        for reference, path, tokens in zip(references, paths, forced, strict=True)
    ]
    if not is_reference:
        for path in paths:
            path.unlink()
    mean = {
        key: sum(one[key] for one in compared) / len(compared)
        for key in ("kl", "top1_agreement", "nll_dense", "nll")
    }
    harness.progress(f"{arm.name}: prose KL {mean['kl']:.4f}, top-1 {mean['top1_agreement']:.3f}")
    return {**mean, "context": PROSE_CONTEXT, "passages": compared}


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--model", default="qwen", help="name, alias (smollm2, qwen) or path")
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 4096, 8192])
    harness.add_arm_options(parser, FULL_ARMS, "; the first one is dense")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--questions", type=int, default=20, help="per needle cell")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--two-turn-context", type=int, default=4096)
    parser.add_argument("--passages", type=int, default=4, help="of prose")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--quick", action="store_true", help="4 questions, 2 conversations, 1 text")
    parser.add_argument("--out", type=Path, default=harness.RESULTS_DIR / "accuracy.json")
    options = parser.parse_args()
    if options.quick:
        options.questions, options.conversations, options.passages = 4, 2, 1

    harness.exit_cleanly()
    environment = harness.environment()
    arms = harness.parse_arms(parser, options, {"min_context": MIN_CONTEXT})
    if arms[0].settings is not None:
        parser.error("the first arm must be dense: the others are compared with it")

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(harness.resolve_model(options.model))
    results = {}
    with tempfile.TemporaryDirectory(prefix="vllm-sparse-prose-") as scratch:
        for arm in arms:
            results[arm.name] = run_arm(arm, options, tokenizer, Path(scratch))
            body = {
                "model": options.model,
                "seed": options.seed,
                "two_turn_context": options.two_turn_context,
                "arms": results,
            }
            harness.write_result(options.out, "accuracy", environment, body)


if __name__ == "__main__":
    main()
