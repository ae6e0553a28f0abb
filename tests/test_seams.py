# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Methods that ours go on from."""

from __future__ import annotations

import pytest

from vllm_sparse.seams import after, before, replace_once


def test_a_method_is_replaced_once_and_goes_on_to_the_stock_one():
    class Stock:
        def method(self, number):
            """What it does."""
            return [number]

    def make(stock):
        return lambda self, number: [*stock(self, number), "ours"]

    for _ in range(2):  # as plugins are loaded again
        replace_once(Stock, "method", make)
    assert Stock().method(3) == [3, "ours"]
    assert Stock.method.__doc__ == "What it does."


def test_something_is_done_before_and_after_a_method():
    said = []

    class Stock:
        def method(self, number, *, more):
            said.append("stock")
            return number + more

    for _ in range(2):
        before(Stock, "method", lambda self, number, more: said.append(("before", number, more)))
    assert Stock().method(3, more=4) == 7
    assert said == [("before", 3, 4), "stock"]

    class Other(Stock):
        def method(self, number, *, more):
            return super().method(number, more=more)

    after(Other, "method", lambda self, number, more: said.append(("after", number, more)))
    said.clear()
    assert Other().method(1, more=2) == 3
    assert said == [("before", 1, 2), "stock", ("after", 1, 2)]


def test_what_is_refused_before_a_method_does_not_reach_it():
    class Stock:
        def method(self):
            raise AssertionError

    def refuse(_):
        raise LookupError

    before(Stock, "method", refuse)
    with pytest.raises(LookupError):
        Stock().method()
