# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The command where torch and vLLM are broken, where they hang, and on a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from support.site import package

from vllm_sparse.cli import main
from vllm_sparse.doctor import examine
from vllm_sparse.doctor.model import model_findings
from vllm_sparse.machine import observe
from vllm_sparse.machine.findings import error, fine, warning


def test_it_works_where_nothing_else_does(tmp_path):
    """Neither torch nor vLLM nor what vLLM imports can be imported."""
    package(tmp_path, "torch", "raise ImportError('libtorch.so: not found')")
    package(tmp_path, "vllm", "raise RuntimeError('first line\\n\\noperator nms does not exist')")
    package(tmp_path, "torchvision", "raise RuntimeError('another torch')")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vllm_sparse.cli", "doctor", "--json", "--thorough"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    wrong = [found for found in json.loads(done.stdout) if found["level"] == "error"]
    said = "\n".join(found["what"] for found in wrong)
    assert "cannot be imported: ImportError: libtorch.so: not found" in said
    assert "cannot be imported: RuntimeError: operator nms does not exist" in said
    assert "torchvision does not load with this torch: RuntimeError: another torch" in said
    assert "vLLM cannot load it: RuntimeError: operator nms does not exist" in said
    assert len(wrong) == 4
    assert all(found["why"] and found["todo"] for found in wrong)


@pytest.mark.parametrize(
    ("body", "stopped"),
    [("import time; time.sleep(900)", "time"), ("import os; os._exit(3)", "died")],
)
def test_imports_that_hang_or_crash(monkeypatch, tmp_path, body, stopped):
    package(tmp_path, "torch", f"print('noise', flush=True); {body}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    begin = time.monotonic()
    seen = observe.Probe(examine.PROBE, (), 0.5 if stopped == "time" else 600.0).collect()
    assert time.monotonic() - begin < 600
    assert (seen.facts, seen.stopped) == ({}, stopped)
    if stopped == "died":
        assert seen.noise == "noise"


def test_text_and_status(monkeypatch, capsys):
    found = [fine("a", "well", "since"), warning("b", "slow", "because", "this")]
    monkeypatch.setattr(examine, "examine", lambda model, thorough: found)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok       a: well (since)",
        "WARNING  b: slow",
        "         why: because",
        "         do:  this",
        "",
        "0 errors, 1 warnings",
    ]
    found.append(error("c", "broken", "because", "that"))
    assert main(["doctor", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)[2]["todo"] == "that"


def test_a_dependency_of_ours_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "psutil", None)
    for name in ("vllm_sparse.kv.host.memory", "vllm_sparse.doctor.examine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["doctor"]) == 2
    assert "psutil is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        ({"findings": [["model", "ok", "fits", "", ""]]}, "ok", "fits"),
        ({"error": "KeyError: 'x'"}, "warning", "KeyError"),
        (None, "ok", "--thorough"),
    ],
)
def test_a_model_is_looked_at_by_the_probe(monkeypatch, facts, level, words):
    seen = observe.Observed({} if facts is None else {"model": facts}, "" if facts else "time")
    made = SimpleNamespace(collect=lambda *wanted: seen)
    monkeypatch.setattr(examine, "Probe", lambda module, arguments, seconds: made)
    found = examine.examine("somewhere")[-1]
    assert (found.subject, found.level) == ("model", level)
    assert words in found.what


def test_a_model(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
        "vocab_size": 1000, "max_position_embeddings": 8192,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    findings = model_findings(str(path))
    assert {found.level for found in findings} == {"ok"}
    assert any("host pool of one request 0.01 GiB" in found.what for found in findings)
    path.write_text(json.dumps({**config, "kv_lora_rank": 512}))
    weights, *backends = model_findings(str(path))
    assert weights.level == "ok"
    assert {found.level for found in backends} == {"warning"}
    assert all("MLA" in found.what for found in backends)
    path.write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    assert model_findings(str(path))[0].level == "error"
    assert model_findings(str(tmp_path / "none"))[0].level == "error"
