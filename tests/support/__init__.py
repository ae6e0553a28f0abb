# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What tests share: engines, stand-ins for GPUs, ahead-of-time compilation."""
