# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Hours of hard traffic against a real `vllm serve`: every answer checked, everything back."""
