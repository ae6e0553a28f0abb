# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Counters of what the backends really do, at vLLM's ``/metrics`` and in its log."""

from __future__ import annotations

from typing import Any

from vllm_sparse.metrics.published import counters, folder

__all__ = ["counters", "folder"]


def __getattr__(name: str) -> Any:
    """vLLM's entry point, which alone imports vLLM."""
    if name == "SparseStatLogger":
        from vllm_sparse.metrics.stat_logger import SparseStatLogger

        return SparseStatLogger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
