# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Every command that README and the pages print is one that its program takes."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import harness, results, run_all
from benchmarks.quality import questions
from scripts.pages import fill
from vllm_sparse import cli
from vllm_sparse.config import load_settings

if TYPE_CHECKING:
    from pathlib import Path

ROOT = fill.ROOT
TEXTS = [
    *(*fill.pages(), ROOT / "CONTRIBUTING.md", ROOT / "assets/README.md"),
    *sorted((ROOT / "examples").glob("*.py")), ROOT / "benchmarks/training_text.py",
]  # fmt: skip
# What stands for something: what is not here is a name, and any name will do.
BLANKS = {"TOKENS": "4096", "N": "2", "KIND": "h100", "dense,NAME-512": "dense,quest-512"}
PROGRAM = re.compile(
    r"""(\w+=\S*\ |taskset\ -c\ \S+\ |env\ )* (\.venv/bin/)?
    ( python3?\ -m\ (?P<module>benchmarks\.[\w.]+)
    | (python3?\ )?(?P<script>(scripts|examples)/\w+\.py)
    | (?P<tool>vllm-sparse) | (?P<make>make) | (?P<gpu>gpu-check(?=\ --)) | (?P<serve>vllm\ serve)
    )(?=\ |$)""",
    re.VERBOSE,
)


class ParsedError(BaseException):
    """The command line is understood; nothing else is wanted of the program."""


def lines_of(text: str) -> list[str]:
    """Command lines of blocks, and what may be one within a paragraph."""
    fenced = re.compile(r"^ *```sh\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
    found = [line for block in fenced.findall(text) for line in _joined(block)]
    within = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [*found, *(" ".join(each.split()) for each in within)]


def _joined(block: str) -> list[str]:
    lines = re.sub(r"\\+\n", " ", block).splitlines()
    return [re.sub(r" +# .*", "", line).strip() for line in lines]


def commands_of(text: str) -> list[str]:
    """Commands that the tests below take apart, one program each."""
    parts = [part for line in lines_of(text) for part in re.split(r" && | \| | &(?= |$)", line)]
    return [part for part in parts if PROGRAM.match(part) and not part.endswith(" ...")]


def read(path: Path) -> str:
    """A page, or what a program says about itself, with its indented lines as a block."""
    if path.suffix != ".py":
        return path.read_text()
    about = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.sub(r"((?:^    .*\n)+)", r"```sh\n\1```\n", about, flags=re.MULTILINE)


COMMANDS = sorted({each for path in TEXTS for each in commands_of(read(path))})


def programs() -> list[str]:
    """Modules and scripts that somebody runs."""
    files = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    mains = [path for path in files if '__name__ == "__main__"' in path.read_text()]
    return sorted({str(path.relative_to(ROOT)) for path in mains} - {"benchmarks/worker.py"})


@pytest.fixture
def parse(monkeypatch):
    """Calls a program's entry point, which ends when it has understood its arguments.

    Those of a benchmark are understood where it opens its result or looks for its model.
    """
    right, within = argparse.ArgumentParser.parse_args, []

    def parse_args(parser, *arguments, **named):
        found = right(parser, *arguments, **named)
        if not within:
            raise ParsedError
        return found

    def harness_parse(*arguments, parse=harness.parse):
        within.append(True)
        try:
            return parse(*arguments)
        finally:
            within.pop()

    def stop(*_, **__):
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(harness, "parse", harness_parse)
    monkeypatch.setattr(harness, "exit_cleanly", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(results.Recorder, "__init__", stop)
    for name in ("resolve_model", "tokenizer_of"):
        monkeypatch.setattr(harness, name, stop)
    monkeypatch.setattr(questions, "lacking", lambda _: "")  # of what is not installed here
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, "1")  # which programs set, if nobody has
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(ROOT)

    def run(program: str, arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        main = cli.main
        if program.endswith(".py"):
            main = partial(runpy.run_path, program, run_name="__main__")
        elif program != "vllm-sparse":
            package = (ROOT / program.replace(".", "/")).is_dir()
            main = importlib.import_module(program + ".__main__" * package).main
        with pytest.raises(ParsedError):
            main()

    return run


def _check(command: str, parse) -> None:
    found = PROGRAM.match(command)
    assert found is not None
    command = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", command)
    words = shlex.split(command[found.end() :], comments=True)
    words = [BLANKS.get(word, word) for word in words]
    if found["make"]:
        printed = subprocess.run(
            ["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for part in map(str.strip, printed.splitlines()):
            if (inner := PROGRAM.match(part)) and inner["module"]:
                _check(part, parse)
    elif found["serve"]:
        if "--additional-config" in words:
            given = json.loads(words[words.index("--additional-config") + 1])
            backend = words[words.index("--attention-backend") + 1].lower()
            given["vllm_sparse"].pop("forecast", None)  # a file that the reader will have
            load_settings(given, backend)
    else:
        program = found["module"] or found["script"] or "vllm-sparse"
        program = "benchmarks.gpu.check" if found["gpu"] else program
        if len(words) < 2 and program == "vllm-sparse":  # the name of a command
            words = [*words, "--help"]
            with pytest.raises(SystemExit) as ended:
                parse(program, words)
            assert ended.value.code == 0
        else:
            parse(program, words)


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_is_understood(command, parse):
    _check(command, parse)


@pytest.mark.parametrize("name", run_all.published())
def test_what_made_a_result_is_understood(name, parse):
    """Or `make bench` could not make it again."""
    for program, *arguments in run_all.published()[name]:
        parse(f"benchmarks.{program}", arguments)


def test_what_is_wrong_is_seen(parse):
    for wrong in (
        "python -m benchmarks.capacity --request 6 --elements 3",
        "python -m benchmarks.speed --cells smollm2-1",
        "python -m benchmarks.accuracy --arms dense,rocket",
        "make bench ARGS=--elements",
        "vllm-sparse plan MODEL --elements",
        "python scripts/decode_step.py MODEL",
    ):
        with pytest.raises(SystemExit) as ended:
            _check(wrong, parse)
        assert ended.value.code == 2, wrong


@pytest.mark.parametrize("path", programs())
def test_a_program_explains_itself_and_a_page_names_it(path, parse, capsys):
    name = path.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
    named = "\n".join(page.read_text() for page in (*TEXTS, ROOT / "Makefile"))
    assert path in named if path.startswith("scripts/") else f"-m {name}" in named
    with pytest.raises(SystemExit) as ended:
        parse(path if path.startswith("scripts/") else name, ["--help"])
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_there_are_commands():
    assert len(COMMANDS) > 100
    found = [match.groupdict() for match in map(PROGRAM.match, COMMANDS) if match]
    kinds = {kind for each in found for kind, name in each.items() if name}
    assert kinds == {"module", "script", "tool", "make", "gpu", "serve"}
