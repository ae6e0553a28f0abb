# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Readable PyTorch definitions of every kernel; they run on any device."""
