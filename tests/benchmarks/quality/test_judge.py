# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The judge's options with made-up engines: what they ask for is done or refused."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest
from support.workers import IdleWorker

from benchmarks import arms, harness
from benchmarks.quality import judge, lab, prompts, questions

QUESTION = SimpleNamespace(
    task="vt", index=0, prompt=[1] * 4000, max_tokens=20, score=lambda reply: float(reply)
)


class FakeWorker(IdleWorker):
    """Scores a half with any settings."""

    def call(self, command, **arguments):
        return [{"text": "0.5"}]


class FakeLab:
    """Notes which arms it was asked for; scores one for each."""

    asked: tuple[str, ...] = ()

    def __init__(self, *_):
        pass

    def answers(self, schemes):
        type(self).asked = tuple(schemes)
        return {name: [1] for name in schemes}


@pytest.fixture(autouse=True)
def _made_up(monkeypatch, tmp_path):
    tokenizer = SimpleNamespace(eos_token_id=0, decode=lambda tokens: str(tokens[0]))
    network = SimpleNamespace(heads=prompts.Heads(4, 2, 16, 0.25), eos={0}, forecast=None)
    for module, name, made in (
        (importlib.util, "find_spec", lambda name: name),
        (questions, "load", lambda *_: [QUESTION]),
        (harness, "resolve_model", lambda name: tmp_path),
        (harness, "engine_args", lambda *_, **__: {}),
        (harness, "tokenizer_of", lambda name: tokenizer),
        (judge, "Worker", FakeWorker),
        (prompts, "Network", lambda *_, **__: network),
        (prompts, "saved", lambda *_: None),
        (lab, "Lab", FakeLab),
    ):
        monkeypatch.setattr(module, name, made)


def run(tmp_path, *options, tasks=("vt",)):
    out = tmp_path / "quality.json"
    judge.main(["--contexts", "4096", "--tasks", *tasks, "--out", str(out), *options])
    return json.loads(out.read_text())["arms"]


def test_settings_reach_the_arms_that_are_served(tmp_path):
    found = run(tmp_path, "--arms", "dense,rocketkv-512", "--setting", "window=32")
    assert found["rocketkv-512"]["settings"]["window"] == 32
    assert found["rocketkv-512"]["4096"]["vt"]["0"]["score"] == 0.5


def whole(tmp_path):
    return json.loads((tmp_path / "quality.json").read_text())


def test_a_file_says_how_long_questions_and_replies_are(tmp_path):
    run(tmp_path, "--arms", "dense")
    lengths = {"prompt_tokens": 4000, "max_tokens": 20}
    assert whole(tmp_path)["questions"] == {"4096": {"vt": {"0": lengths}}}


@pytest.mark.parametrize(("what", "other"), [("prompt", [1] * 2000), ("max_tokens", 40)])
def test_a_file_does_not_mix_questions_of_two_lengths(tmp_path, capsys, monkeypatch, what, other):
    run(tmp_path, "--lab", "--arms", "dense")
    monkeypatch.setattr(QUESTION, what, other)
    with pytest.raises(SystemExit):
        run(tmp_path, "--lab", "--arms", "dense,window16-512")
    assert "would not be to the same text; name another file" in capsys.readouterr().err
    assert list(whole(tmp_path)["arms"]) == ["dense"]


def test_arms_that_read_everything_are_marked(tmp_path):
    found = run(tmp_path, "--lab", "--arms", "dense,default-62,default-63,window16-2048")
    marked = {
        name for name, cells in found.items() if "read_everything" in cells["4096"]["vt"]["0"]
    }
    assert marked == {"dense", "default-63"}  # 63 blocks are 4,032 tokens


def test_a_file_does_not_mix_settings(tmp_path, capsys):
    run(tmp_path, "--arms", "dense,rocketkv-512", "--setting", "window=32")
    run(tmp_path, "--arms", "dense,rocketkv-512", "--setting", "window=32")
    with pytest.raises(SystemExit):
        run(tmp_path, "--arms", "dense,rocketkv-512", "--setting", "window=16")
    assert "name another file with --out" in capsys.readouterr().err


def test_a_file_does_not_mix_prompts_of_two_dtypes(tmp_path, capsys):
    run(tmp_path, "--lab", "--arms", "dense")
    with pytest.raises(SystemExit):
        run(tmp_path, "--lab", "--arms", "dense,window16-512", "--prompt-dtype", "float32")
    assert "has prompt_dtype 'bfloat16' and this run 'float32'" in capsys.readouterr().err


def test_the_laboratory_refuses_settings(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--lab", "--arms", "dense,rocketkv-512", "--setting", "window=32")
    assert "name the arm that has the value" in capsys.readouterr().err
    assert not (tmp_path / "quality.json").exists()


@pytest.mark.parametrize("group", ["policies", "ablations", "votes"])
def test_the_laboratory_takes_groups(tmp_path, group):
    found = run(tmp_path, "--lab", "--arms", group)
    assert tuple(found) == FakeLab.asked == tuple(judge.LABORATORY.get(group) or arms.GROUPS[group])


def test_what_the_laboratory_cannot_do_is_said_before_any_question(tmp_path):
    with pytest.raises(SystemExit, match="sparse-dense is served, but the laboratory"):
        run(tmp_path, "--lab", "--arms", "selectors")
    with pytest.raises(SystemExit, match="forecast-16 needs weights"):
        run(tmp_path, "--lab", "--arms", "dense,forecast-16")


def test_what_is_not_installed_is_said_before_any_question(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(tmp_path, "--lab", "--arms", "dense", tasks=("multivalue", "cwe"))
    assert "cwe: lm-eval makes their questions and is not installed" in capsys.readouterr().err
    run(tmp_path, "--lab", "--arms", "dense", tasks=("multivalue",))


def test_kept_prompts_are_of_the_same_model_and_dtype_and_text(tmp_path, monkeypatch):
    files = []
    monkeypatch.setattr(prompts, "saved", lambda network, tokens, file: files.append(file))
    folder = "--lab", "--arms", "dense", "--keep", "--scratch", str(tmp_path)
    for further in ((), ("--prompt-dtype", "float32"), ("--model", "smollm2")):
        for number in range(2):
            run(tmp_path / f"{len(files)}-{number}", *folder, *further)
    monkeypatch.setattr(QUESTION, "prompt", [2] * 4000)  # of another seed
    run(tmp_path / "seed", *folder)
    assert [files.index(file) for file in files] == [0, 0, 2, 2, 4, 4, 6]
