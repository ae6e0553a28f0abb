# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Training recipes, one YAML file each: ``train-forecast --recipe NAME`` selects NAME.yaml."""
