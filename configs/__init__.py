# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Presets, one YAML file per model: ``{"vllm_sparse": {"config": "NAME"}}`` selects NAME.yaml."""
