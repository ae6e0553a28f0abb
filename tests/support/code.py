# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Runs code that must not find what a test's own process has imported."""

from __future__ import annotations


def serve(code: str) -> None:
    """Run it, for :func:`support.forked.run_forked`."""
    exec(code, {})
