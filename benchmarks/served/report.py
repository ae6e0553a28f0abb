# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A result of the rows as a table."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import table

_SAID = {"stock": "stock vLLM's", "itself": "the same twice, not stock's", "": "\N{EN DASH}"}


def render(result: dict[str, Any]) -> str:
    """One line for each row."""
    lines = [{"row": name, **found} for name, found in result["rows"].items()]
    return table(
        lines,
        {
            "row": "row",
            "backend": "backend",
            "options": lambda line: f"`{' '.join(line['options'])}`" if line["options"] else "",
            "tokens of sparse requests": lambda line: _SAID.get(line["judge"], "Hugging Face's"),
            "sparse decode rows": _rows,
            "processes": "processes",
            "": lambda line: "; ".join(line["faults"]).partition("\n")[0] or "right",
        },
    )


def _rows(line: dict[str, Any]) -> str:
    if not line["judge"]:
        return "refused to start"
    return f"{line.get('counters', {}).get('sparse_decode_rows_total', 0):.0f}"
