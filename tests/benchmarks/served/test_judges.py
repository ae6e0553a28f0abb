# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What is found wrong with answers and counters of a served row."""

from __future__ import annotations

import pytest

from benchmarks.served import asks, judges
from benchmarks.served.rows import ROWS, Row

ROW = Row("a row")


def answer(*tokens: int, **changes) -> asks.Answer:
    whole = [*tokens, *[5] * (asks.NEW_TOKENS - len(tokens))]
    found = asks.Answer([whole], [[-1.0 - token for token in whole]], [""], [])
    return found._replace(**changes)


def batch_of(sparse: asks.Answer, **others: asks.Answer) -> dict[str, asks.Answer]:
    batch = asks.batch(own_budgets=True)
    return {ask.name: others.get(ask.name, sparse if ask.sparse else answer()) for ask in batch}


def faults(*waves, everything=False) -> list[str]:
    stock = batch_of(answer())
    return judges.of_batch(asks.batch(own_budgets=True), waves, stock, everything)


def test_right_answers_are_right():
    assert faults(*[batch_of(answer(9))] * 2) == []
    assert faults(*[batch_of(answer())] * 2, everything=True) == []


@pytest.mark.parametrize(
    ("waves", "said"),
    [
        ([batch_of(answer(9), dense=answer(7))] * 2, "dense: other than stock vLLM from token 0"),
        ([batch_of(answer(9)), batch_of(answer(8))], "sparse, again: other than the first time"),
        ([batch_of(answer())] * 2, "nothing was tested"),
        ([batch_of(answer(9, error="status 500"))] * 2, "status 500"),
        ([batch_of(answer(9, tokens=[[9]], logprobs=[[-10.0]]))] * 2, "1 of 40 tokens"),
    ],
)
def test_wrong_answers_are_found(waves, said):
    assert any(said in fault for fault in faults(*waves))


def test_what_reads_everything_has_to_equal_stock():
    assert faults(*[batch_of(answer(9))] * 2, everything=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vllm:sparse_decode_rows_total": 0}, "sparse_decode_rows_total grew by 0"),
        ({"vllm:sparse_blocks_evicted_total": 0}, "sparse_blocks_evicted_total did not grow"),
        ({"vllm:sparse_selected_tokens_total": 9000}, "is all there is"),
        ({"vllm:sparse_selected_tokens_total": 0}, "grew by 0"),
        ({"vllm:prefix_cache_hits_total": 0}, "prefix_cache_hits_total did not grow"),
        ({}, ""),
    ],
)
def test_counters_tell_what_ran_densely(changes, said):
    grown = {
        "vllm:sparse_requests_total": 4, "vllm:sparse_dense_fallbacks_total": 6,
        "vllm:sparse_decode_rows_total": 4 * (asks.NEW_TOKENS - 1),
        "vllm:sparse_visible_tokens_total": 9000, "vllm:sparse_selected_tokens_total": 90,
        "vllm:sparse_blocks_evicted_total": 3, "vllm:prefix_cache_hits_total": 32, **changes,
    }  # fmt: skip
    found = judges.of_counters(ROW, asks.batch(own_budgets=True), grown)
    assert [said in fault for fault in found] == [True] * bool(said)


@pytest.mark.parametrize(
    ("needed", "said"), [(66, "is all there is"), (0, "needed_total grew by 0"), (60, "")]
)
def test_sparse_prompts_have_to_skip_blocks(needed, said):
    grown = {
        "vllm:sparse_requests_total": 8, "vllm:sparse_dense_fallbacks_total": 2,
        "vllm:sparse_decode_rows_total": 8 * (asks.NEW_TOKENS - 1),
        "vllm:sparse_visible_blocks_total": 90, "vllm:sparse_selected_blocks_total": 30,
        "vllm:sparse_prompt_blocks_visible_total": 66,
        "vllm:sparse_prompt_blocks_needed_total": needed, "vllm:prefix_cache_hits_total": 32,
    }  # fmt: skip
    row = Row("sparse prompts", "SPARDA", "sparda", settings={"sparse_prefill": True})
    found = judges.of_counters(row, asks.batch(own_budgets=False), grown)
    assert [said in fault for fault in found] == [True] * bool(said)


def features(**changes) -> dict[str, asks.Answer]:
    schema = answer(texts=['{"a":"so"}'])
    found = {ask.name: schema for ask in asks.features()}
    found["two samples"] = answer(tokens=[answer().tokens[0]] * 2, logprobs=answer().logprobs * 2)
    name = "log-probabilities of the prompt"
    return found | {name: answer(prompt_logprobs=[-1.0, -2.0])} | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"two samples": answer()}, "not two"),
        ({"schema": answer(texts=['{"a":1}'])}, "does not fit"),
        ({"schema": answer(texts=["w7"])}, "does not fit"),
        ({"schema, dense": answer(9, texts=['{"a":"so"}'])}, "other than stock"),
        ({"log-probabilities of the prompt": answer(prompt_logprobs=[-1.0, -2.1])}, "apart"),
        ({"log-probabilities of the prompt": answer()}, "0 and 2"),
    ],
)
def test_features_of_the_api(changes, said):
    found = judges.of_features(features(**changes), features(), answer())
    assert [said in fault for fault in found] == [True] * bool(said)


def test_rows_have_names_of_their_own_and_judges_that_exist():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert {row.judge for row in ROWS} <= judges.JUDGES.keys() | {"stock", "itself"}
    assert {row.backend for row in ROWS} == {
        "ROCKETKV", "SPARDA", "QUEST", "SNAPKV", "STREAMINGLLM",
    }  # fmt: skip
