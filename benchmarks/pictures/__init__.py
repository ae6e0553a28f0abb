# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Pictures of the results, drawn from the files in ``benchmarks/results`` and from nothing else."""
