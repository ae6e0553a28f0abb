# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The demo's document, its report and its verdict; the servers themselves are not started."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_sparse.demo import document
from vllm_sparse.demo.run import DECODE_ROWS, Outcome, find_problems, report, sparse_options
from vllm_sparse.demo.server import Server, ServerError

ANSWERS = [f"It is {fact.answer}." for fact in document.FACTS]


def outcome(**changes) -> Outcome:
    values = {
        "name": "ROCKETKV",
        "answers": ANSWERS,
        "prompt_tokens": 7000,
        "ttft_seconds": 5.0,
        "decode_tokens_per_second": 20.0,
        "kv_blocks": 50,
        "counters": {DECODE_ROWS: 123.0},
    }
    return Outcome(**(values | changes))


def test_document_is_deterministic_and_holds_each_fact_once():
    text = document.build_document()
    assert text == document.build_document()
    for fact in document.FACTS:
        assert text.count(fact.sentence) == text.count(fact.answer) == 1
        assert text.index(fact.sentence) / len(text) == pytest.approx(fact.depth, abs=0.02)
    assert text.count("\n\nDay ") == document.DAYS - 1


def test_entries_differ():
    entries = document.build_document().split("\n\n")
    bodies = {entry.split(". ", 1)[1] for entry in entries if entry.startswith("Day ")}
    assert len(bodies) == document.DAYS


def test_report_compares_both_servers():
    text = report(outcome(name="stock vLLM", kv_blocks=400, decode_tokens_per_second=16), outcome())
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["KV blocks held while decoding"][-3:] == ["400", "50", "0.12"]
    assert rows["decode tokens/s"][-3:] == ["16.0", "20.0", "1.25"]
    assert f"{DECODE_ROWS} 123" in text


def test_good_run_has_no_problems():
    assert not list(find_problems(outcome()))


def test_wrong_answer_is_a_problem():
    (problem,) = find_problems(outcome(answers=["I do not know.", ANSWERS[1]]))
    assert "I do not know." in problem


@pytest.mark.parametrize("counters", [{}, {DECODE_ROWS: 0.0}])
def test_unused_backend_is_a_problem(counters):
    (problem,) = find_problems(outcome(counters=counters))
    assert DECODE_ROWS in problem


def test_options_select_backend_and_preset():
    assert sparse_options("ROCKETKV", "smollm2-135m") == [
        "--attention-backend",
        "ROCKETKV",
        "--additional-config",
        '{"vllm_sparse": {"config": "smollm2-135m"}}',
    ]


def test_server_that_ends_early_shows_its_log(tmp_path, monkeypatch):
    script = tmp_path / "vllm"
    script.write_text(f"#!{sys.executable}\nprint('no such model')\nraise SystemExit(3)\n")
    script.chmod(0o755)
    monkeypatch.setattr("vllm_sparse.demo.server._vllm_executable", lambda: str(script))
    with pytest.raises(ServerError, match=r"status 3:\n  \| no such model"):
        Server(["MODEL"], tmp_path / "log").__enter__()


def test_server_that_never_answers_is_stopped(tmp_path, monkeypatch):
    script = tmp_path / "vllm"
    script.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    script.chmod(0o755)
    monkeypatch.setattr("vllm_sparse.demo.server._vllm_executable", lambda: str(script))
    server = Server(["MODEL"], tmp_path / "log", start_timeout_seconds=0.1)
    with pytest.raises(ServerError, match="not healthy"):
        server.__enter__()
    assert server._process.poll() is not None


def test_command_line_starts_without_torch():
    code = (
        "import sys; from vllm_sparse.cli import build_parser; build_parser(); "
        "assert not {'torch', 'vllm', 'openai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
