# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Compiles a policy's kernels of GPUs before the first request comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_sparse.kernels.fp8 import as_numbers
from vllm_sparse.kernels.types import Rows
from vllm_sparse.steps.prompts import PromptEnd
from vllm_sparse.steps.split import SparseRows

if TYPE_CHECKING:
    from vllm_sparse.backends.policy_gpu import PolicyGpuImpl
    from vllm_sparse.kv.spec import PolicySpec

# Tokens of a prompt that is long enough for several programs to read it.
_LONG = 1024


def warm_up(
    impl: PolicyGpuImpl, spec: PolicySpec, dtype: torch.dtype, device: torch.device, drafts: bool
) -> None:
    """Compile what vLLM's dummy runs need not reach: a prompt's end, and both kinds of decode.

    The first requests would wait for it otherwise.

    Args:
        impl: One of the layers that are alike.
        spec: The group's.
        dtype: The model's.
        device: Where.
        drafts: Requests may bring several tokens to any batch.
    """
    sparse, window = impl.sparse, spec.policy.window
    size = spec.block_size
    blocks = -(-max(window + 2 * size, _LONG) // size)
    layout = sparse.stock_layout
    content = 2 * layout.head_dim + layout.channels // layout.page_size
    shape = (blocks, impl.num_kv_heads, size, content)
    cache = as_numbers(torch.zeros(shape, dtype=spec.dtype, device=device))
    table = torch.arange(blocks, dtype=torch.int32, device=device)
    lengths = torch.tensor([blocks * size, 1], dtype=torch.int32, device=device)
    heads, dim = impl.num_heads + 2 * impl.num_kv_heads, impl.head_size
    tokens = torch.zeros(max(window, 1), heads, dim, dtype=dtype, device=device)
    query, key, value = tokens.split([impl.num_heads, *2 * [impl.num_kv_heads]], 1)
    pages = layout.page_size
    prompt = PromptEnd(table, blocks * size, 1, 1, pages, 0, len(tokens), 0, True, lengths)
    sparse.end_prompt(cache, query, prompt)
    row = lengths[:1]
    rows = SparseRows(None, table[None], row, row, row, pages)
    sparse.decode(cache, query, key, value, rows, torch.empty_like(query))
    alone = Rows(table[None], row, row, torch.full_like(row, -1), row if drafts else None)
    sparse.decode_rows(cache, query, key, value, alone, torch.empty_like(query))
