# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The benchmark of whole prompts with made-up engines, and its arithmetic."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from support.workers import IdleWorker

from benchmarks import clock, corpus, harness, prompts, report, worker


class FakeWorker(IdleWorker):
    """Stock vLLM takes 10 s, of which 6 in its attention; others 5 s."""

    def call(self, command, **given):
        if command != "timed_prefill":
            return {}
        if self.arm.settings is None:
            return {"seconds": 10.0, "cpu": 18.0, "attention": 6.0, "counters": {}}
        counted = {
            "vllm:sparse_prompt_blocks_visible_total": 8.0,
            "vllm:sparse_prompt_blocks_needed_total": 6.0,
        }
        own = {"seconds": 5.0, "cpu": 9.0, "attention": 2.0, "choose_blocks": 0.5}
        return {**own, "counters": counted}


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    monkeypatch.setattr(worker, "Worker", FakeWorker)
    monkeypatch.setattr(harness, "resolve_model", lambda name: name)
    monkeypatch.setattr(harness, "kv_bytes_per_token", lambda model: 1)
    monkeypatch.setattr(harness, "tokenizer_of", lambda name: None)
    monkeypatch.setattr(
        corpus, "documents", lambda _, count, length: [[n] * length for n in range(count)]
    )


def test_what_is_measured_is_compared_with_stock(tmp_path, capsys):
    path = tmp_path / "prompts.json"
    prompts.main(["--out", str(path), "--contexts", "4096", "--arms", "dense,prompts-32"])
    (cell,) = json.loads(path.read_text())["cells"]
    assert set(cell["arms"]) == {"dense", "prompts-32"}
    row = cell["arms"]["prompts-32"]
    assert row["settings"]["sparse_prefill"] == 32
    assert row["speedup_seconds"] == row["speedup_cpu"] == 2
    assert row["needed_share_of_blocks"] == 0.75
    share = row["share_of_pairs"]
    assert row["bound"] == pytest.approx(10 / (4 + share * 6))
    shown = report.render(path)
    assert "| prompts-32 | 5.0 | 9.0 | 2.00x | 2.00x |" in shown
    capsys.readouterr()


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (13, 2), (16, 3), (16, 9), (17, 4)])
def test_the_share_of_pairs_is_counted(tokens, blocks):
    read = [
        min(query // 4, blocks - 1) * 4 + query % 4 + 1  # whole blocks before its own, and a part
        for query in range(tokens)
    ]
    every = tokens * (tokens + 1) / 2
    assert prompts.share_of_pairs(tokens, blocks, 4) == pytest.approx(sum(read) / every)


class Kernels(NamedTuple):
    choose_blocks: object
    attend_part: object


def test_the_clock_sees_layers_and_kernels_and_starts_anew():
    runtime = SimpleNamespace(kernels=Kernels(lambda: "chosen", lambda: "attended"))

    def forward(value):
        return value, runtime.kernels.choose_blocks(), runtime.kernels.attend_part()

    impl = SimpleNamespace(forward=forward, layer=SimpleNamespace(runtime=runtime))
    compilation = SimpleNamespace(static_forward_context={"a": SimpleNamespace(impl=impl)})
    config = SimpleNamespace(compilation_config=compilation)
    worker = SimpleNamespace(model_runner=SimpleNamespace(vllm_config=config))
    clock.attach(worker)
    clock.spent(worker)
    assert impl.forward(3) == (3, "chosen", "attended")
    found = clock.spent(worker)
    assert set(found) == {"attention", "choose_blocks", "attend_part", "cpu"}
    assert 0 < found["choose_blocks"] < found["attention"]
    assert set(clock.spent(worker)) == {"cpu"}
