# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Benchmarks: accuracy, speed and capacity of the backends against stock vLLM.

Run from the repository root, for example ``python -m benchmarks.speed --quick``. Every program
measures both sides of a comparison in one run and writes one JSON file with the command in it.
"""
