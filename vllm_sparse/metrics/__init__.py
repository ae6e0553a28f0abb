# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Counters of what the backends really do, at vLLM's ``/metrics`` and in its log."""

from __future__ import annotations

from vllm_sparse.metrics.published import counters, folder

__all__ = ["counters", "folder"]
