# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""CPU kernels in C++, compiled once per machine with the compiler that vLLM's CPU build needs."""
