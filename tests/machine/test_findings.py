# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Levels and the exit status."""

from __future__ import annotations

import pytest

from vllm_sparse.machine.findings import error, fine, status, warning

WORDS = ("what", "why", "do")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], 0),
        ([fine("x", "y")], 0),
        ([warning("x", *WORDS), fine("x", "y")], 1),
        ([fine("x", "y"), error("x", *WORDS), warning("x", *WORDS)], 2),
    ],
)
def test_the_status_is_that_of_the_worst(found, expected):
    assert status(found) == expected
