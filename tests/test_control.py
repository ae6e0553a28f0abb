# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What requests may say of themselves."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_sparse.control import (
    AS_SET,
    DENSE,
    SPARSE,
    TOKEN_BUDGET,
    Allowed,
    control_of,
    is_ours,
)
from vllm_sparse.errors import RequestError

# What JSON holds, beyond what vLLM's schema lets through.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5,
)
OTHERS = st.dictionaries(st.text().filter(lambda name: not is_ours(name)), VALUES, max_size=4)


@given(OTHERS, st.sampled_from([True, False, 1, 0]))
def test_what_others_say_is_theirs(others, value):
    assert control_of(others) == AS_SET
    assert control_of({**others, SPARSE: value}) == (AS_SET if value else DENSE)


@pytest.mark.parametrize("nothing", [None, {}])
def test_most_requests_say_nothing(nothing):
    assert control_of(nothing) == AS_SET


@given(OTHERS, VALUES)
def test_other_values_are_refused(others, value):
    if type(value) in (bool, int) and value in (0, 1):
        return
    with pytest.raises(RequestError, match=r"vllm_sparse\.sparse: .* neither true nor false"):
        Allowed().check({**others, SPARSE: value})


@given(
    OTHERS, st.text(max_size=9), st.sampled_from(["vllm_sparse.", "vllm-sparse.", "VLLM_SPARSE"])
)
def test_misspelt_names_are_refused(others, rest, prefix):
    name = prefix + rest
    if name in (SPARSE, TOKEN_BUDGET):
        return
    with pytest.raises(RequestError) as refused:
        Allowed().check({**others, name: False})
    assert (
        str(refused.value)
        == f"{name}: unknown; a request may set vllm_sparse.sparse and vllm_sparse.token_budget"
    )


def test_a_server_may_have_to_refuse_dense_requests():
    allowed = Allowed(never_dense="of the weather; wait")
    allowed.check({SPARSE: True})
    Allowed().check({SPARSE: False})
    with pytest.raises(RequestError, match="false cannot be had here: of the weather; wait"):
        allowed.check({SPARSE: False})


@given(OTHERS, st.integers(1, 2**31 - 1))
def test_a_budget_is_its_own_control(others, tokens):
    assert control_of({**others, TOKEN_BUDGET: tokens}) == tokens
    assert control_of({**others, TOKEN_BUDGET: tokens, SPARSE: True}) == tokens
    with pytest.raises(RequestError, match="contradict each other"):
        control_of({**others, TOKEN_BUDGET: tokens, SPARSE: False})


@given(VALUES)
@example(0)
@example(2**31)
def test_other_budgets_are_refused(value):
    if type(value) is int and 0 < value < 2**31:
        return
    with pytest.raises(RequestError, match=r"vllm_sparse\.token_budget: .* is no number of tokens"):
        control_of({TOKEN_BUDGET: value})


def test_a_server_bounds_budgets():
    def attempt(tokens):
        if tokens % 2:
            raise ValueError(f"{tokens} is odd")

    allowed = Allowed(most_tokens=99, try_budget=attempt)
    allowed.check({TOKEN_BUDGET: 98})
    Allowed(most_tokens=98, try_budget=attempt).check({TOKEN_BUDGET: 98})
    for tokens, why in (
        (100, "100 is more than the 99 that this server allows"),
        (97, "97 is odd"),
    ):
        with pytest.raises(RequestError, match=why):
            allowed.check({TOKEN_BUDGET: tokens})
    never = Allowed(never_budget="of the weather", most_tokens=99)
    with pytest.raises(RequestError, match="token_budget cannot be had here: of the weather"):
        never.check({TOKEN_BUDGET: 98})
    for nothing in (None, {}, {SPARSE: True}, {SPARSE: False}):
        never.check(nothing)
