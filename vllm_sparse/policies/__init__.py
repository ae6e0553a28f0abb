# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The algorithms as pure functions on tensors. Nothing here knows vLLM."""
