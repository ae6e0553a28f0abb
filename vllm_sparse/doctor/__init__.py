# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""``vllm-sparse doctor``: whether this machine, and a model on it, can be served, and how well."""
