# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Training of SparDA's Forecast on a frozen Hugging Face model, and its evaluation.

``objective`` holds the loss, ``backbone`` the frozen model, ``forecast`` what is trained,
``samples`` what one layer hands to the loss, ``trainer`` the loop. Nothing here imports vLLM.
"""
