# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""GPU kernels in Triton: fixed shapes, lengths read on the device, nothing copied to the host."""
