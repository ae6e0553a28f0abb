# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Demo: small models, a long document and a side-by-side run of two servers."""
