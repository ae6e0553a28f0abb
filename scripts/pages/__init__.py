# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What README.md and the pages of docs/ take from code and from result files."""
