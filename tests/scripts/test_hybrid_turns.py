# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Three turns of a conversation beside states and windows find what the page says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "drafts.md"


def test_turns_find_what_the_page_says(monkeypatch, capsys):
    from scripts import hybrid_turns
    from vllm_sparse.kv.manager import PromptAwareManager

    monkeypatch.setattr(
        PromptAwareManager, "_pin", PromptAwareManager._pin
    )  # the script changes it
    monkeypatch.setattr(sys, "argv", ["hybrid_turns.py"])
    hybrid_turns.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 2 * 3
    assert [row for row in rows if row not in PAGE.read_text().splitlines()] == []
    for beside in ("states", "windows"):
        (ours,) = (row for row in rows if row.startswith(f"| {beside} | ROCKETKV | "))
        first, second, third = (int(hit.replace(",", "")) for hit in ours.split("|")[3:6])
        assert first == 0 < second <= third
