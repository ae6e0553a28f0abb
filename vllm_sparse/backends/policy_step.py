# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""One layer's step under a policy: what the stock implementation does of it, and what ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_sparse.errors import IntegrityError
from vllm_sparse.kernels.fp8 import as_numbers

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_sparse.steps.layer import SparseLayer
    from vllm_sparse.steps.split import StepMetadata


def attend_step(
    sparse: SparseLayer,
    stock: Any,
    layer: Any,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache: Tensor,
    step: StepMetadata,
    output: Tensor,
    *scales: Tensor | None,
) -> Tensor:
    """Attend one step.

    Args:
        sparse: Ours.
        stock: The stock implementation: ``forward`` and ``do_kv_cache_update``.
        layer: The attention layer.
        query: Post-RoPE queries, ``[tokens, H, D]``.
        key: ``[tokens, G, D]``; ``None`` is refused.
        value: ``[tokens, G, D]``; ``None`` is refused.
        cache: ``[blocks, G, block_size, C]``, bytes if it is fp8.
        step: The step.
        output: Written, ``[tokens, H, D]``.
        *scales: Of a quantised output; not supported, handed on.

    Returns:
        ``output``.

    Raises:
        IntegrityError: The model brings queries alone, for keys that may have been compacted.
    """
    if key is None or value is None:
        raise IntegrityError(
            f"{layer.layer_name} reads its keys and values once more in the same step, when they "
            "may have been compacted. Leave out --attention-backend"
        )
    stored, cache = cache, as_numbers(cache)
    if step.rows is not None:
        sparse.decode_rows(cache, query, key, value, step.rows, output)
        return output
    if step.dense is not None or step.pages is not None:
        tokens = sparse.stock_layout.tokens(stored)
    if step.pages is not None:
        count = len(step.pages.slots)
        stock.do_kv_cache_update(layer, key[:count], value[:count], tokens, step.pages.slots)
        sparse.index_pages(cache, step.pages)
        if sparse.reads_all and step.pages.whole is not None:
            stock.forward(layer, query, key, value, tokens, step.pages.whole, output, *scales)
            return output
    if step.dense is not None:
        index = step.dense_index
        if index is None:
            parts = query, key, value, output
        else:
            parts = query[index], key[index], value[index], torch.empty_like(query[index])
        if step.pages is None:
            stock.do_kv_cache_update(layer, parts[1], parts[2], tokens, step.dense.slot_mapping)
        stock.forward(layer, *parts[:3], tokens, step.dense, parts[3], *scales)
        if index is not None:
            output[index] = parts[3]
        for prompt in step.prompts:
            sparse.end_prompt(cache, query, prompt)
    for rows in step.sparse:
        sparse.decode(cache, query, key, value, rows, output)
    return output
