# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A tap: what a layer's input says of the blocks that the next layer will read.

An attention backend sees queries, keys and values, never the hidden states that a Forecast needs.
So each attention layer's ``qkv_proj`` changes its class (its name, parameters and quantisation
stay) to one that also projects its input and records the result, where the backend finds it as
``layer.sparda_tap``.

Notation: T tokens, G KV heads of this rank, D head size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.rotary_embedding import (
    Phi3LongRoPEScaledRotaryEmbedding,
    RotaryEmbedding,
)
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_sparse.kernels.types import Rotary

OP_NAME = "vllm_sparse_record_forecast"


def _record(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, qkv: Tensor, values: Tensor
) -> None:
    # CUDA graphs pad the batch, at most to a few tokens more than the scheduler allows.
    tokens = min(hidden.shape[0], values.shape[0])
    # The product lands where it is read: one launch.
    target, hidden = values[:tokens].flatten(1), hidden[:tokens]
    if bias is None:
        torch.mm(hidden, weight.T, out=target)
    else:
        torch.addmm(bias, hidden, weight.T, out=target)


def _record_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, qkv: Tensor, values: Tensor
) -> None:
    return None


if not hasattr(torch.ops.vllm, OP_NAME):
    # qkv is not touched. That it might be is what keeps the compiler from moving the recording
    # behind the attention that reads it.
    direct_register_custom_op(OP_NAME, _record, ["qkv", "values"], _record_fake)


class ForecastTap(nn.Module):
    """Projects and records the input of one attention layer.

    Attributes:
        values: Recorded projections of the last step, before RoPE, ``[T, parts, G, D]``. Part -1 is
            what the next layer will look for. In layer 0, part 0 is for layer 0 itself. Layers two
            apart share this memory: it holds until the layer after the next runs.
    """

    weight: Tensor
    bias: Tensor | None
    values: Tensor

    def __init__(self, rotary: Any, hidden_size: int, values: Tensor, has_bias: bool) -> None:
        """Set up an unfilled tap, which records NaN.

        Args:
            rotary: The model's rotary embedding.
            hidden_size: Width of the layer's input.
            values: Where to record, ``[T, parts, G, D]``.
            has_bias: Whether projections add a bias.
        """
        super().__init__()
        self._rotary = (rotary,)  # a tuple: the module belongs to the model, not to the tap
        self._filled = [False] * values.shape[1]
        rows = values[0].numel()
        weight = values.new_full((rows, hidden_size), torch.nan)
        self.register_buffer("weight", weight, persistent=False)
        bias = values.new_zeros(rows) if has_bias else None
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("values", values, persistent=False)
        for buffer in self.buffers():  # no checkpoint has them, which vLLM asks when it reloads one
            vars(buffer)["weight_loader_numel"] = 0

    @property
    def ready(self) -> bool:
        """Whether every part has its weights."""
        return all(self._filled)

    def fill(self, part: int, weight: Tensor, bias: Tensor | None = None) -> None:
        """Set the projection of one part.

        Args:
            part: Index into ``values``' second dimension.
            weight: ``[G * D, hidden]``.
            bias: ``[G * D]`` or None.
        """
        self.weight.unflatten(0, (len(self._filled), -1))[part].copy_(weight)
        if self.bias is not None:
            own = self.bias.unflatten(0, (len(self._filled), -1))[part]
            own.zero_() if bias is None else own.copy_(bias)
        # Of a model that is built on "meta", others bring the memory, and what is in it.
        self._filled[part] |= not self.weight.is_meta

    def forward(self, hidden_states: Tensor, qkv: Tensor) -> None:
        """Record one step.

        Args:
            hidden_states: Input of ``qkv_proj``, ``[T, hidden]``.
            qkv: Its output; the recording happens before anything derived from it is used.
        """
        torch.ops.vllm.vllm_sparse_record_forecast(
            hidden_states, self.weight, self.bias, qkv, self.values
        )

    def rotary(self) -> Rotary | None:
        """What :meth:`rotate` does, in words that kernels know; ``None`` if they do not."""
        module = self._rotary[0]
        if isinstance(module, Phi3LongRoPEScaledRotaryEmbedding):
            begin = module.original_max_position_embeddings * module.use_long_rope
            return Rotary(module.long_short_cos_sin_cache[begin:], halves=True)
        ours = RotaryEmbedding.forward_native
        if isinstance(module, RotaryEmbedding) and type(module).forward_native is ours:
            cache = module._match_cos_sin_cache_dtype(self.values)
            return Rotary(cache, halves=bool(module.is_neox_style))
        return None

    def rotate(self, positions: Tensor, values: Tensor) -> Tensor:
        """Apply the model's rotary embedding.

        Args:
            positions: ``[T]``.
            values: ``[T, G, D]``, left as they are.

        Returns:
            ``[T, G, D]``.
        """
        tokens, _, dim = values.shape
        if not tokens:
            return values
        # Some kernels work in place, and some insist on a key.
        query = values.clone(memory_format=torch.contiguous_format).flatten(1)
        rotated, _ = self._rotary[0](positions, query, query.new_zeros(tokens, dim))
        return rotated.view(values.shape)


@functools.cache
def tapped_projection(base: type[nn.Module]) -> type[nn.Module]:
    """A QKV projection that also feeds its tap."""

    class Tapped(base):  # type: ignore[misc, valid-type]
        def forward(self, input_: Tensor) -> Any:
            output = super().forward(input_)
            self.forecast_tap(input_, output[0] if isinstance(output, tuple) else output)
            return output

    Tapped.__name__ = Tapped.__qualname__ = f"Tapped{base.__name__}"
    return Tapped
