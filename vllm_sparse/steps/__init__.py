# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What one step asks of each layer, planned once for all of them. Nothing here knows vLLM."""
