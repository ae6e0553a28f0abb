# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Kernels: one reference in PyTorch for each, and faster twins behind :mod:`.dispatch`."""
