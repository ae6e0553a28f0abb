# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Requests that nobody would write: every field right, wrong, huge, missing, or of another type."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import strategies as st

from benchmarks.soak.traffic import VOCAB
from vllm_sparse.control import SPARSE, TOKEN_BUDGET

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_MOST_TOKENS = 24  # that are written where the number is right


class Sent(NamedTuple):
    """A request.

    Attributes:
        path: Of the API.
        body: Anything that Python's JSON can spell, which is more than JSON can.
        leave_after: Lines of the answer after which the client goes away; `None` reads to the end.
    """

    path: str
    body: Any
    leave_after: int | None


def requests(model: str, longest: int) -> st.SearchStrategy[Sent]:
    """Returns what to draw requests from: two of three are ones that a server must answer.

    Args:
        model: Served name.
        longest: The server's longest context, in tokens.
    """
    prompts, messages = (
        _prompts(longest - _MOST_TOKENS),
        st.lists(_message(), min_size=1, max_size=3),
    )
    right = _either(
        _body(model, _COMPLETION, prompt=prompts), _body(model, _CHATTING, messages=messages)
    )
    wrong = _either(
        _body(model, _wrong(_COMPLETION), prompt=_wrong_prompts(longest)),
        _body(model, _wrong(_CHATTING), messages=st.one_of(messages, st.lists(_junk()), _junk())),
    )
    leave = st.one_of(st.none(), st.none(), st.none(), st.integers(0, 6))
    part = st.one_of(right.map(_consistent), right.map(_consistent), wrong)
    return st.builds(lambda part, lines: Sent(*part, lines), part, leave)


_Body = st.SearchStrategy[dict[str, Any]]
_Part = tuple[str, dict[str, Any]]


def _either(completion: _Body, chat: _Body) -> st.SearchStrategy[_Part]:
    return st.one_of(st.tuples(st.just(COMPLETIONS), completion), st.tuples(st.just(CHAT), chat))


def _body(model: str, fields: dict[str, st.SearchStrategy[Any]], **given: Any) -> _Body:
    """Short and greedy, but for the fields that are drawn."""
    base = {"model": model, "max_tokens": 4, "temperature": 0.0}
    names = st.builds(
        lambda some, ours: sorted({*some, *["vllm_xargs"] * ours}),
        st.lists(st.sampled_from(sorted(fields)), max_size=6), st.booleans(),
    )  # fmt: skip
    chosen = names.flatmap(
        lambda some: st.fixed_dictionaries({name: fields[name] for name in some})
    )
    return st.builds(
        lambda required, drawn: {**base, **required, **drawn}, st.fixed_dictionaries(given), chosen
    )


def _consistent(part: _Part) -> _Part:
    """What vLLM refuses together, made into what it serves."""
    path, body = part
    if body.get("n", 1) > 1:
        body["temperature"] = 1.0
    if "stream_options" in body or "prompt_logprobs" in body:
        body["stream"] = "stream_options" in body
        body.pop("prompt_logprobs" if body["stream"] else "", None)
    if "top_logprobs" in body:
        body["logprobs"] = True
    return path, body


def _junk() -> st.SearchStrategy[Any]:
    numbers = st.one_of(
        st.integers(-2, 2),
        st.sampled_from([-(2**63), 2**31, 2**63, 10**30, -1.5, 0.5, 1e308, 5e-324]),
        st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    )
    leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=4))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)
        ),
        max_leaves=4,
    )


def _wrong(fields: dict[str, st.SearchStrategy[Any]]) -> dict[str, st.SearchStrategy[Any]]:
    """Values of another type or range for half of the fields, and fields that do not fit."""
    return {
        name: st.one_of(right, right, _WRONG.get(name, _junk()), _junk())
        for name, right in {**_WRONG, **fields}.items()
    }


def _ids(least: int, most: int) -> st.SearchStrategy[list[int]]:
    """Token ids of any length, of which only the length and the first one are worth shrinking."""
    return st.builds(
        lambda first, length: [(first + 7 * i) % VOCAB for i in range(length)],
        st.integers(0, VOCAB - 1),
        st.one_of(st.integers(least, max(least, 40)), st.integers(least, most)),
    )


_WORDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40).map(
    lambda ids: " ".join(f"w{token}" for token in ids)
)


def _prompts(most: int) -> st.SearchStrategy[Any]:
    return st.one_of(
        _ids(1, most), _WORDS, st.lists(_ids(1, 60), min_size=1, max_size=3),
        st.lists(_WORDS, min_size=1, max_size=3),
    )  # fmt: skip


def _wrong_prompts(longest: int) -> st.SearchStrategy[Any]:
    return st.one_of(
        _prompts(longest), _ids(longest - 8, longest + 40), st.sampled_from(["", [], [""], [[]]]),
        st.lists(st.integers(-5, VOCAB + 5), max_size=8), _junk(),
    )  # fmt: skip


def _message() -> st.SearchStrategy[Any]:
    role = st.sampled_from(["user", "assistant", "system"])
    return st.fixed_dictionaries({"role": role, "content": _WORDS})


_OURS = st.one_of(
    st.fixed_dictionaries({SPARSE: st.booleans()}),
    st.fixed_dictionaries({TOKEN_BUDGET: st.sampled_from([32, 64, 128])}),
    st.just({"another": 1}),
)
_TOKEN = st.integers(0, VOCAB - 1)
_SHARED: dict[str, st.SearchStrategy[Any]] = {
    "vllm_xargs": _OURS,
    "max_tokens": st.integers(4, _MOST_TOKENS),
    "n": st.integers(1, 3),
    "temperature": st.floats(0.1, 2),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(1, 40),
    "min_p": st.floats(0, 1),
    "seed": st.integers(0, 9),
    "stop": st.one_of(st.just("w1"), st.lists(_WORDS, max_size=3)),
    "stop_token_ids": st.lists(_TOKEN, max_size=5),
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 4),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.1, 2),
    "prompt_logprobs": st.integers(0, 4),
    "priority": st.integers(-3, 3),
    "allowed_token_ids": st.lists(_TOKEN, min_size=1, max_size=4),
    "bad_words": st.lists(_WORDS, max_size=2),
    "logit_bias": st.dictionaries(_TOKEN.map(str), st.floats(-100, 100), max_size=3),
    "truncate_prompt_tokens": st.integers(1, 60),
    "use_beam_search": st.booleans(),
    "request_id": st.sampled_from(["the-same", "0"]),
    "cache_salt": st.sampled_from(["a", "b"]),
    "return_token_ids": st.booleans(),
}
_COMPLETION = {**_SHARED, "logprobs": st.integers(0, 6), "echo": st.booleans()}
_CHATTING = {
    **_SHARED,
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 6),
    "max_completion_tokens": st.integers(4, _MOST_TOKENS),
    "add_generation_prompt": st.booleans(),
    "echo": st.booleans(),
}
_NAMES = [SPARSE, TOKEN_BUDGET, "vllm_sparse.spars", "VLLM-SPARSE.sparse", "vllm_sparse", "another"]
_WRONG: dict[str, st.SearchStrategy[Any]] = {
    "vllm_xargs": st.dictionaries(
        st.sampled_from(_NAMES),
        st.one_of(st.booleans(), st.sampled_from([0, 1, 16, 64, 10**6, "64", "no"]), _junk()),
        max_size=2,
    ),
    "max_tokens": st.integers(-1, 2000),
    "n": st.sampled_from([0, -1, 100_000]),
    "stop": st.sampled_from(["", [""], [1]]),
    "prompt_logprobs": st.integers(-2, 5000),
    "logprobs": st.integers(-2, 5000),
    "allowed_token_ids": st.sampled_from([[], [-1], [VOCAB]]),
    "stop_token_ids": st.sampled_from([[-1], [VOCAB]]),
    "logit_bias": st.sampled_from([{"-1": 1}, {str(VOCAB): 1}, {"x": 1}, {"1": 1e9}]),
    "request_id": st.sampled_from(["", "\n", "x" * 5000]),
    "suffix": st.text(max_size=2),
    "continue_final_message": st.booleans(),
    "chat_template": st.sampled_from(["{{ no", "{{ messages }}"]),
    "tools": st.lists(_junk(), max_size=1),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    "structured_outputs": st.sampled_from([{"regex": "w1"}, {"regex": "("}, {"json": {}}, {}]),
    "kv_transfer_params": _junk(),
}
