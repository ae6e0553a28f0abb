# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Comparing kernels with their references, in the interpreter."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace

import pytest

from benchmarks.gpu import bench, check, stages


def test_the_check_prints_its_worst_errors():
    def row(kernel, error, case):
        return {"kernel": kernel, "error": error, "limit": 0.01, "ok": error <= 0.01, "case": case}

    rows = [row("append", 0.0, "a"), row("append", 0.5, "b"), row("top", 1e9, "c")]
    status = {"status": "failed", "reason": "", "seconds": 1.0}
    engine = {"same": 5, "requests": 6, "graphs": "CUDAGraphMode.FULL_DECODE_ONLY"}
    text, further = check.summary(
        {
            check.PARITY: {**status, "rows": rows, "facts": {}},
            "chunked": {**status, "rows": [{"gap": 0.02}], "facts": engine},
        }
    )
    assert re.search(r"append +0\.5 +0\.01 +NO +b", text)
    assert re.search(r"top +1000000000 +0\.01 +NO +c", text)
    assert re.search(r"chunked +5/6 +1 +0\.02 +FULL_DECODE_ONLY", text)
    assert not further["passed"]


def test_kernel_parity_runs_in_the_interpreter(tmp_path, monkeypatch):
    """As the program runs it; the same arguments without --tiny and --device are the real thing.

    But that a busy machine has longer than a GPU would need.
    """
    pytest.importorskip("triton")
    plan = check.plan
    monkeypatch.setattr(
        check, "plan", lambda options: [replace(each, limit_s=3600) for each in plan(options)]
    )
    arguments = ["--tiny", "--device", "cpu", "--only", check.PARITY, "--out", str(tmp_path)]
    assert check.main([*arguments, "--budget-s", "3600"]) == 0
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    rows = result["stages"][check.PARITY]["rows"]
    assert {row["kernel"] for row in rows} >= {
        "append",
        "select slots",
        "whole step",
        "whole stage 1",
        "select blocks, Forecast",
        "select blocks, softmax",
        "resolve",
        "copy pieces",
        "paged steps",
        "attend frames",
        "attend part, causal",
        "attend part, chosen",
        "write tokens",
        "complete windows",
        "keep queries",
        "recall queries",
    }
    assert all(row["ok"] for row in rows)
    assert result["passed"]
    assert result["sanitizer_errors"] is None


def test_kernel_parity_notices_a_wrong_kernel(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from vllm_sparse.kernels.triton import attention

    from benchmarks.ops import parity, sparda

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sparda, "TINY_CASES", ())
    right = attention.attend_slots

    def wrong(cache, query, output, **arguments):
        right(cache, query, output, **arguments)
        output[-1, -1] *= 0.5

    wrong.__signature__ = inspect.signature(right)
    monkeypatch.setattr(attention, "attend_slots", wrong)
    options = bench.parser_of().parse_args(["--tiny", "--device", "cpu"])
    report = stages.Report(tmp_path / "kernels.json")
    with pytest.raises(stages.CheckFailedError, match="attend slots"):
        parity.check(report, options)
    failed = {row["kernel"] for row in report.rows if not row["ok"]}
    assert failed == {"attend slots", "attend all kept"}


def sparda_failures(monkeypatch) -> set[str]:
    """Kernels that differ in a tiny case."""
    import torch

    from benchmarks.ops import sparda

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = torch.device("cpu")
    generator = torch.Generator(device).manual_seed(0)
    found = sparda.check(sparda.TINY_CASES[0], device, generator, graphs=True)
    return {name for name, error, limit in found if error > limit}


def test_sparda_parity_notices_a_piece_that_is_not_copied(monkeypatch):
    pytest.importorskip("triton")
    from vllm_sparse.kernels.triton import sparda_paging

    right = sparda_paging.copy_pieces

    def wrong(target, target_index, source, source_index, count):
        right(target, target_index, source, source_index, (count - 1).clamp(min=0))

    monkeypatch.setattr(sparda_paging, "copy_pieces", wrong)
    assert sparda_failures(monkeypatch) == {"copy pieces", "paged steps"}


def test_sparda_parity_notices_wrong_choices_and_tables(monkeypatch):
    pytest.importorskip("triton")
    from vllm_sparse.kernels.triton import sparda_paging, sparda_select, sparda_tokens

    def marked(table, wanted, step, error, right=sparda_paging.resolve):
        result = right(table, wanted, step, error)
        table.recent[-1] = False
        return result

    def unlike(compressed, vectors, *rest, right=sparda_select.select_blocks, **options):
        return right(compressed, vectors.flip(0), *rest, **options)

    unlike.__signature__ = inspect.signature(sparda_select.select_blocks)

    def host_only(host, slab, frame_of, *rest, right=sparda_tokens.write_tokens, **options):
        right(host, slab, frame_of.fill_(-1), *rest, **options)

    host_only.__signature__ = inspect.signature(sparda_tokens.write_tokens)
    monkeypatch.setattr(sparda_paging, "resolve", marked)
    monkeypatch.setattr(sparda_select, "select_blocks", unlike)
    monkeypatch.setattr(sparda_tokens, "write_tokens", host_only)
    expected = {"resolve", "select blocks, Forecast", "select blocks, softmax", "write tokens"}
    assert sparda_failures(monkeypatch) == expected
