# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whether what a server answered is right.

A judge compares tokens of sparse requests with Hugging Face under the mask that the tests use, and
raises an ``AssertionError`` that says where they part.
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.served.asks import ALL, NEW_TOKENS, SCHEMA
from benchmarks.soak import judge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from benchmarks.served.asks import Answer, Ask
    from benchmarks.served.rows import Row

    Judge = Callable[[Row, Path, str, list, list], None]

_PROMPTS_APART = 1e-3  # of log-probabilities of a prompt, by the order of sums


def _rocketkv(row: Row, model: Path, log: str, prompts: list, tokens: list, **stored: Any) -> None:
    from support.masked import assert_tokens_of_hugging_face

    (size,) = set(re.findall(r"ROCKETKV: .* block size (\d+)", log))
    dim = harness.head_dim(json.loads((model / "config.json").read_text()))
    own = {"block_size": int(size), "head_dim": dim, "max_token_budget": ALL}
    assert_tokens_of_hugging_face(model, prompts, tokens, **own, **stored, **row.settings)


def _sparda(row: Row, model: Path, log: str, prompts: list, tokens: list, **stored: Any) -> None:
    from support.masked_sparda import assert_tokens_of_hugging_face

    assert_tokens_of_hugging_face(model, prompts, tokens, **stored, **row.settings)


def _policy(row: Row, model: Path, log: str, prompts: list, tokens: list) -> None:
    from support.policy_cases import CASES, assert_tokens_of_hugging_face

    (case,) = (case for case in CASES if case.name == row.backend)
    assert_tokens_of_hugging_face(case, model, prompts, tokens)


def _rounded(key: Any, value: Any) -> tuple[Any, Any]:
    from support.fp8 import truncated

    return truncated(key, 1.0), truncated(value, 1.0)


JUDGES: dict[str, Judge] = {
    "rocketkv": _rocketkv, "sparda": _sparda,
    # Queries of float32 that wait take four slots a number.
    "rocketkv_fp8": partial(_rocketkv, stored=_rounded, query_slots=4),
    "sparda_fp8": partial(_sparda, stored=_rounded), "policy": _policy,
}  # fmt: skip


def compare(name: str, got: Answer, expected: Answer, where: str) -> list[str]:
    """What is wrong with an answer that has to be the same as another one."""
    if got.error or expected.error:
        return [f"{name}: {got.error or 'answered'}; {where}: {expected.error or 'answered'}"]
    faults = []
    for tokens, logprobs in zip(got.tokens, got.logprobs, strict=True):
        found = judge.difference(tokens, logprobs, expected.tokens[0], expected.logprobs[0])
        if len(tokens) != len(expected.tokens[0]):
            faults.append(f"{name}: {len(tokens)} tokens; {where}: {len(expected.tokens[0])}")
        elif found and not found.tie:
            faults.append(
                f"{name}: other than {where} from token {found.at} on (log-probabilities "
                f"{found.gap:.2g} apart)"
            )
    return faults


def of_batch(
    asks: Sequence[Ask], waves: Sequence[Mapping[str, Answer]], stock: Mapping[str, Answer],
    everything: bool,
) -> list[str]:  # fmt: skip
    """What is wrong with the batch that is sent twice.

    Args:
        asks: Its requests.
        waves: Answers of ours.
        stock: Answers of stock vLLM.
        everything: Sparse requests read all of their context.
    """
    faults, differ = [], 0
    for ask in asks:
        first, second = (wave[ask.name] for wave in waves)
        if not ask.sparse or everything:
            faults += compare(ask.name, first, stock[ask.name], "stock vLLM")
        else:
            differ += first.tokens != stock[ask.name].tokens
            if not first.error and len(first.tokens[0]) != NEW_TOKENS:
                faults.append(f"{ask.name}: {len(first.tokens[0])} of {NEW_TOKENS} tokens")
        faults += compare(f"{ask.name}, again", second, first, "the first time")
    if not everything and not differ:
        faults.append("nothing was tested: sparse requests got what stock vLLM answers")
    return faults


def of_features(
    answers: Mapping[str, Answer], stock: Mapping[str, Answer], plain: Answer
) -> list[str]:
    """What is wrong with answers to :func:`.asks.features`.

    Args:
        answers: Of ours.
        stock: Of stock vLLM.
        plain: Ours to the prompt that is sampled twice.
    """
    faults = [f"{name}: {found.error}" for name, found in answers.items() if found.error]
    if faults:
        return faults
    if len(answers["two samples"].tokens) != 2:
        faults.append("two samples: not two")
    faults += compare("two samples", answers["two samples"], plain, "one sample")
    faults += compare("schema, dense", answers["schema, dense"], stock["schema, dense"], "stock")
    for text in answers["schema"].texts + answers["schema, dense"].texts:
        try:
            fits = json.loads(text)["a"] in SCHEMA["properties"]["a"]["enum"]  # type: ignore[index]
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            faults.append(f"schema: {text!r} does not fit")
    name = "log-probabilities of the prompt"
    ours, theirs = answers[name].prompt_logprobs, stock[name].prompt_logprobs
    apart = [abs(one - other) for one, other in zip(ours, theirs, strict=False)]
    if len(ours) != len(theirs) or not apart or not max(apart) <= _PROMPTS_APART:
        faults.append(f"{name}: {len(ours)} and {len(theirs)}, {max(apart, default=0)} apart")
    return faults


def of_counters(row: Row, asks: Sequence[Ask], grown: Mapping[str, float]) -> list[str]:
    """What is wrong with counters after the batch was sent twice.

    Args:
        row: Served.
        asks: The batch.
        grown: By how much each metric grew.
    """
    counted = [ask for ask in asks if _is_counted(row, ask)]
    wanted = {
        "vllm:sparse_requests_total": 2 * len(counted),
        "vllm:sparse_dense_fallbacks_total": 2 * (len(asks) - len(counted)),
        "vllm:sparse_decode_rows_total": 2 * len(counted) * (NEW_TOKENS - 1),
    }
    faults = []
    for name, value in wanted.items():
        found = grown.get(name, 0.0)
        if found < value if not row.exact else found != value:
            faults.append(f"{name} grew by {found:.0f}, not by {value}")
    kind = "blocks" if row.backend == "SPARDA" else "tokens"
    shares = [(f"vllm:sparse_selected_{kind}_total", f"vllm:sparse_visible_{kind}_total")]
    if row.settings.get("sparse_prefill"):
        shares.append(
            ("vllm:sparse_prompt_blocks_needed_total", "vllm:sparse_prompt_blocks_visible_total")
        )
    for part, whole in shares:
        if not 0 < grown.get(part, 0.0) <= grown.get(whole, 0.0):
            faults.append(f"{part} grew by {grown.get(part)}, {whole} by {grown.get(whole)}")
        if row.judge != "stock" and grown.get(part) == grown.get(whole):
            faults.append(f"nothing was tested: {part} is all there is")
    evicting = row.backend in ("ROCKETKV", "SNAPKV", "STREAMINGLLM") and row.judge != "stock"
    for name in (*row.grows, *["vllm:sparse_blocks_evicted_total"] * evicting):
        if not grown.get(name):
            faults.append(f"{name} did not grow")
    return faults


def _is_counted(row: Row, ask: Ask) -> bool:
    """Whether sparse attention serves a request, be it that it reads everything."""
    if ask.dense:
        return False
    if ask.sparse or row.backend == "SPARDA":
        return True
    # Nothing that QUEST keeps makes a prompt dense, nor a budget where nothing is evicted.
    return ask.name == "covered" and (row.backend == "QUEST" or row.judge == "stock")
