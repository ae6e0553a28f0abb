# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Tells before anything is started what a model will need and gain: no GPU, weights or engine."""
