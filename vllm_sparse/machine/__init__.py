# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What this machine offers and what stands in the way: no engine, GPU, torch or vLLM needed."""
