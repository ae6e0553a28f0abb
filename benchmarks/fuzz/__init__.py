# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Generated requests against a real `vllm serve`: it may refuse them, but never fail."""
