# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Every kind of server that the table of features has, started once and asked the same things."""
