# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Device functions that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter would multiply the bits of bfloat16 as integers. Products of two bfloat16
# are exact in float32, so this computes what tensor cores do.
_UPCAST = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b):
    """Matrix product accumulated in float32; float32 operands keep their precision."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
