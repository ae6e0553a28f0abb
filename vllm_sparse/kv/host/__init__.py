# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""KV blocks in host memory, and the device's frames that cache them."""
