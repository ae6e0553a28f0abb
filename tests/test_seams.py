# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Methods that ours go on from."""

from __future__ import annotations

from vllm_sparse.seams import replace_once


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
