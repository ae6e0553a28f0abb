# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Slow references that the tests compare the library with. They import nothing of it."""
