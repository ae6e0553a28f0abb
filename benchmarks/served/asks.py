# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What every server is asked, by the openai client, and what it answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.gpu.shapes import random_prompt
from benchmarks.soak.serving import NAME
from benchmarks.soak.traffic import VOCAB

if TYPE_CHECKING:
    from collections.abc import Sequence

    import openai

ADAPTER = "adapter"
NEW_TOKENS = 40
SHORT = 100  # tokens of a prompt that every policy serves densely
ALL = 2048  # a budget of which ROCKETKV reads half in a step, so that it covers every context
SCHEMA = {
    "type": "object", "properties": {"a": {"enum": ["no", "so"]}}, "required": ["a"],
    "additionalProperties": False,
}  # fmt: skip
# Pairs of prompts share 400 tokens; all are several blocks of 128 long, as states may want.
PROMPTS = [
    (*random_prompt(100 + number // 2, 400, VOCAB), *random_prompt(number, 200 + 7 * number, VOCAB))
    for number in range(6)
]


class Ask(NamedTuple):
    """A request.

    Attributes:
        name: What it is for.
        prompt: Token ids.
        sparse: Our backend is to read only a part of it.
        dense: It asks to be served densely.
        asked: Its ``vllm_xargs``.
        adapted: By the adapter, where there is one.
        further: Of its body.
    """

    name: str
    prompt: tuple[int, ...]
    sparse: bool = True
    dense: bool = False
    asked: dict[str, Any] = {}  # noqa: RUF012
    adapted: bool = False
    further: dict[str, Any] = {}  # noqa: RUF012


class Answer(NamedTuple):
    """What came back.

    Attributes:
        tokens: Of each sample.
        logprobs: Of these tokens.
        texts: Of each sample.
        prompt_logprobs: Of each token of the prompt but the first, if asked for.
        error: Why nothing did.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    texts: list[str]
    prompt_logprobs: list[float]
    error: str = ""


def batch(own_budgets: bool) -> list[Ask]:
    """The requests that are sent at once, twice; the second time they find prefixes.

    Args:
        own_budgets: The server takes a budget from a request.
    """
    dense = {"vllm_sparse.sparse": False}
    covered = Ask("covered by blocks", PROMPTS[2][:SHORT], False)
    if own_budgets:
        covered = Ask("covered", PROMPTS[2], False, asked={"vllm_sparse.token_budget": ALL})
    return [
        Ask("sparse", PROMPTS[0]),
        Ask("sparse, adapted", PROMPTS[1], adapted=True),
        covered,
        Ask("short, adapted", PROMPTS[3][:SHORT], False, adapted=True),
        Ask("dense", PROMPTS[4], False, True, dense),
    ]


def features() -> list[Ask]:
    """Requests with what else the API offers, sent at once."""
    dense = {"vllm_sparse.sparse": False}
    schema = {"structured_outputs": {"json": SCHEMA}, "ignore_eos": False}
    return [
        # vLLM wants real sampling for n > 1; of the single best token it is deterministic.
        Ask("two samples", PROMPTS[0], further={"n": 2, "temperature": 1.0, "top_k": 1}),
        Ask("log-probabilities of the prompt", PROMPTS[5], further={"prompt_logprobs": 0}),
        Ask("schema", PROMPTS[1], further=schema),
        Ask("schema, dense", PROMPTS[1], False, True, dense, further=schema),
    ]


def ask_all(client: openai.OpenAI, asks: Sequence[Ask]) -> dict[str, Answer]:
    """Answers by the names of requests, which are sent at once."""
    with ThreadPoolExecutor(len(asks)) as pool:
        answers = pool.map(lambda ask: _answer(client, ask), asks)
        return {ask.name: answer for ask, answer in zip(asks, answers, strict=True)}


def _answer(client: openai.OpenAI, ask: Ask) -> Answer:
    import openai

    served = {model.id for model in client.models.list()}
    model = ADAPTER if ask.adapted and ADAPTER in served else NAME
    body = {
        "temperature": 0.0, "ignore_eos": True, "return_token_ids": True,
        "vllm_xargs": ask.asked, **ask.further,
    }  # fmt: skip
    try:
        got = client.completions.create(
            model=model, prompt=list(ask.prompt), max_tokens=NEW_TOKENS, logprobs=1,
            extra_body=body,
        )  # fmt: skip
    except openai.OpenAIError as error:
        return Answer([], [], [], [], str(error))
    said: list[Any] = list(got.choices)
    prompt = [
        next(iter(entry.values()))["logprob"]
        for entry in getattr(said[0], "prompt_logprobs", None) or []
        if entry
    ]
    return Answer(
        [choice.token_ids for choice in said],
        [choice.logprobs.token_logprobs for choice in said],
        [choice.text for choice in said],
        prompt,
    )
