# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The private tail of a compressed request: what is kept, and how its blocks are laid out."""
