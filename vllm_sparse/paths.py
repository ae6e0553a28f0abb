# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Where files are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_ENV = "VLLM_SPARSE_CACHE"


def cache_dir() -> Path:
    """``$VLLM_SPARSE_CACHE``, or ``~/.cache/vllm-sparse``: for what can be made again."""
    configured = os.environ.get(CACHE_ENV)
    return Path(configured) if configured else Path.home() / ".cache" / "vllm-sparse"
