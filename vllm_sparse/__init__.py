# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Sparse attention and sparse KV memory for stock vLLM."""

__version__ = "0.1.0"
