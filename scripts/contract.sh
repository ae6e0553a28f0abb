#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
#
# Compares what we use of vLLM with the Python files of another version's wheel (some 340 MB).
# Usage: scripts/contract.sh VERSION
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=$1 folder=build/contract/$1 python=$PWD/.venv/bin/python
if [ ! -d "$folder/vllm" ]; then
  wheel=$(mktemp -d)
  trap 'rm -rf "$wheel"' EXIT
  "$python" -m pip download -q --no-deps --only-binary :all: -d "$wheel" "vllm==$version"
  "$python" - "$wheel" "$folder" <<'CODE'
import sys
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as files:
    files.extractall(sys.argv[2], [name for name in files.namelist() if name.endswith(".py")])
CODE
fi
VLLM_SPARSE_CONTRACT=$PWD/$folder/vllm "$python" -m pytest -q -n 0 tests/test_contract.py
