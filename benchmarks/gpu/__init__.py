# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Checks and benchmarks for a GPU host, which may have no network.

``make gpu-first``, ``gpu-check``, ``gpu-bench`` and ``gpu-tune`` each run a list of stages, one
subprocess each, within a budget of minutes; the others go on from the file of the first. The
processes that plan and print need nothing but Python; torch, vLLM and the plugin are only imported
by the stages. These must find vLLM on PYTHONPATH and the plugin installed beside it, because vLLM
finds plugins by their metadata; the first stage says what to run
if not::

    export PYTHONPATH=$PWD:/tmp/site
    python3 -m pip install --no-index --no-deps --upgrade --target /tmp/site dist/*.whl
    make gpu-first ARGS="--out results"
"""
